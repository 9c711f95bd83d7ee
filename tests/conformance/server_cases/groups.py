"""Persistent subscriptions."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

from tests.conformance.server_cases.probe import ANY, Probe, case, three


def group(p: Probe, s: str, **kw: Any) -> Any:
    return p.do(lambda: p.client.create_subscription_to_stream(group_name="g", stream_name=s, **kw))


def consume(
    p: Probe, s: str, verdict: Callable[[Any, int], str], count: int, seconds: float = 20, **kw: Any
) -> list[str]:
    got: list[str] = []
    sub = p.client.read_subscription_to_stream(group_name="g", stream_name=s, **kw)

    def run() -> None:
        try:
            for e in sub:
                got.append(f"{p.show(e)} retry={e.retry_count}")
                word = verdict(e, len(got))
                if word == "ack":
                    sub.ack(e)
                elif word != "none":
                    sub.nack(e, cast("Any", word))
                if len(got) >= count:
                    sub.stop()
        except Exception as error:
            got.append(f"error {type(error).__name__}")

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    sub.stop()
    thread.join(3)
    return got


@case
def group_create_twice_and_delete(p: Probe) -> Any:
    s = three(p)
    return [
        group(p, s),
        group(p, s),
        p.do(lambda: p.client.delete_subscription("g", s)),
        p.do(lambda: p.client.delete_subscription("g", s)),
    ]


@case
def group_reads_from_start_and_acks(p: Probe) -> Any:
    s = three(p)
    group(p, s)
    return consume(p, s, lambda e, n: "ack", 5)


@case
def group_start_is_inclusive(p: Probe) -> Any:
    s = three(p)
    group(p, s, stream_position=3)
    return consume(p, s, lambda e, n: "ack", 2)


@case
def group_nack_retry(p: Probe) -> Any:
    s = three(p, n=2)
    group(p, s, max_retry_count=2)
    return consume(p, s, lambda e, n: "retry" if e.stream_position == 0 else "ack", 4)


@case
def group_nack_park_and_replay(p: Probe) -> Any:
    s = three(p, n=2)
    group(p, s)
    first = consume(p, s, lambda e, n: "park" if e.stream_position == 0 else "ack", 2)
    p.until(lambda: p.client.get_subscription_info("g", s).parked_message_count > 0)
    info = p.client.get_subscription_info("g", s)
    p.client.replay_parked_events("g", s)
    return [first, info.parked_message_count, consume(p, s, lambda e, n: "ack", 1)]


@case
def group_nack_skip(p: Probe) -> Any:
    s = three(p, n=3)
    group(p, s)
    return consume(p, s, lambda e, n: "skip", 3)


@case
def group_timeout_redelivers(p: Probe) -> Any:
    s = three(p, n=1)
    group(p, s, message_timeout=1.0, max_retry_count=1)
    return consume(p, s, lambda e, n: "none", 2)


@case
def group_maximum_subscribers(p: Probe) -> Any:
    s = three(p, n=1)
    group(p, s, max_subscriber_count=1)
    held = p.client.read_subscription_to_stream("g", s)
    out = p.do(lambda: p.client.read_subscription_to_stream("g", s))
    held.stop()
    return out


@case
def group_missing(p: Probe) -> Any:
    s = three(p, n=1)
    return [
        p.do(lambda: p.client.read_subscription_to_stream("none", s)),
        p.do(lambda: p.client.get_subscription_info("none", s)),
        p.do(lambda: p.client.replay_parked_events("none", s)),
        p.do(lambda: p.client.list_subscriptions_to_stream(s)),
    ]


@case
def group_bad_settings(p: Probe) -> Any:
    s = three(p, n=1)
    return [
        group(p, s, consumer_strategy="Invented"),
        group(p, s, read_batch_size=500, history_buffer_size=500),
        group(p, s, live_buffer_size=0),
    ]


@case
def group_info(p: Probe) -> Any:
    s = three(p, n=1)
    group(p, s)
    info = p.client.get_subscription_info("g", s)
    keep = (
        "event_source",
        "group_name",
        "status",
        "start_from",
        "message_timeout",
        "max_retry_count",
        "live_buffer_size",
        "history_buffer_size",
        "read_batch_size",
        "checkpoint_after",
        "min_checkpoint_count",
        "max_checkpoint_count",
        "consumer_strategy",
        "max_subscriber_count",
        "parked_message_count",
        "resolve_links",
        "extra_statistics",
    )
    return {k: p.normalise(str(getattr(info, k))) for k in keep if hasattr(info, k)}


@case
def group_that_listens_is_given_what_max_count_hides(p: Probe) -> Any:
    s = three(p, n=1)
    p.client.set_stream_metadata(s, metadata={"$maxCount": 2}, current_version=ANY)
    group(p, s)
    subscription = p.client.read_subscription_to_stream(group_name="g", stream_name=s)
    got = [next(subscription)]
    subscription.ack(got[0])
    p.append(s, [p.event(n) for n in (1, 2, 3)], ANY)
    for event in subscription:
        got.append(event)
        subscription.ack(event)
        if event.stream_position == 3:
            break
    subscription.stop()
    return [p.show(event) for event in got]
