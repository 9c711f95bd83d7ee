"""Catch-up subscriptions."""

from __future__ import annotations

import threading
from typing import Any

from tests.conformance.server_cases.probe import ANY, NO, Probe, case, three


@case
def subscribe_stream_from_start_goes_live(p: Probe) -> Any:
    s = three(p, n=2)
    sub = p.client.subscribe_to_stream(s, include_caught_up=True)
    threading.Timer(0.7, lambda: p.append(s, p.event(9), ANY)).start()
    return p.take(sub, 4)


@case
def subscribe_stream_position_is_exclusive(p: Probe) -> Any:
    s = three(p)
    return p.take(p.client.subscribe_to_stream(s, stream_position=2, include_caught_up=True), 3)


@case
def subscribe_missing_stream_waits(p: Probe) -> Any:
    sub = p.client.subscribe_to_stream(p.stream("later"), include_caught_up=True)
    threading.Timer(0.7, lambda: p.append(p.stream("later"), p.event(1), NO)).start()
    return p.take(sub, 2)


@case
def subscribe_from_end(p: Probe) -> Any:
    s = three(p)
    sub = p.client.subscribe_to_stream(s, from_end=True)
    threading.Timer(0.5, lambda: p.append(s, p.event(9), ANY)).start()
    return p.take(sub, 1)


@case
def subscribe_tombstoned_stream(p: Probe) -> Any:
    s = three(p, n=1)
    p.client.tombstone_stream(s, current_version=ANY)
    return p.do(lambda: p.take(p.client.subscribe_to_stream(s), 1, 2))


@case
def subscribe_then_tombstone(p: Probe) -> Any:
    s = three(p, n=1)
    sub = p.client.subscribe_to_stream(s)
    threading.Timer(0.6, lambda: p.client.tombstone_stream(s, current_version=ANY)).start()
    return p.take(sub, 4)


@case
def subscribe_then_soft_delete_then_append(p: Probe) -> Any:
    s = three(p, n=1)
    sub = p.client.subscribe_to_stream(s)

    def later() -> None:
        p.client.delete_stream(s, current_version=ANY)
        p.append(s, p.event(8), ANY)

    threading.Timer(0.6, later).start()
    return p.take(sub, 2)


@case
def subscribe_all_position_is_exclusive(p: Probe) -> Any:
    s = three(p)
    at = p.client.get_stream(s)[2].commit_position
    return p.take(
        p.client.subscribe_to_all(commit_position=at, filter_include=(p.prefix + ".*",), filter_by_stream_name=True), 2
    )


@case
def subscribe_all_with_caught_up(p: Probe) -> Any:
    s = three(p, n=2)
    at = p.client.get_stream(s)[0].commit_position
    sub = p.client.subscribe_to_all(
        commit_position=at, filter_include=(p.prefix + ".*",), filter_by_stream_name=True, include_caught_up=True
    )
    threading.Timer(0.7, lambda: p.append(s, p.event(9), ANY)).start()
    return p.take(sub, 3)


@case
def subscribe_all_checkpoints_when_nothing_matches(p: Probe) -> Any:
    at = p.client.append_to_stream(p.stream(), current_version=NO, events=[p.event(i) for i in range(60)])
    first = p.client.get_stream(p.stream())[0].commit_position
    sub = p.client.subscribe_to_all(
        commit_position=first,
        filter_include=("never" + p.prefix,),
        include_checkpoints=True,
        window_size=10,
        checkpoint_interval_multiplier=2,
    )
    got = p.take(sub, 2, 2)
    return [got, at > (first or 0)]


@case
def subscribe_all_from_between_two_events(p: Probe) -> Any:
    at = p.client.append_to_stream(p.stream(), current_version=NO, events=[p.event()])
    return p.take(p.client.subscribe_to_all(commit_position=at - 1), 1)
