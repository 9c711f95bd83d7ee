"""Persistent subscriptions' delivery as a pure class: who gets what, how often, and what a checkpoint may say."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from tidings.server.group_delivery import Consumer, Delivery, Item, Mark
from tidings.stores import RecordedEvent


def item(n: int, stream: str = "s", metadata: bytes = b"", *, replayed: bool = False) -> Item:
    event = RecordedEvent(n + 1, stream, n, "T", b"", metadata, True, UUID(int=n + 1).bytes, 0)
    return Item((event, None), Mark(n, n + 1), Mark(n - 1, n), replayed=replayed)


def delivery(strategy: str = "DispatchToSingle", retries: int = 1, timeout: float = 10.0, events: int = 0) -> Delivery:
    state = Delivery(strategy, retries, timeout, Mark(-1, 0))
    state.offer([item(n) for n in range(events)], Mark(events - 1, events))
    return state


def joined(state: Delivery, *slots: int) -> list[Consumer]:
    consumers = [Consumer(count) for count in slots]
    for consumer in consumers:
        state.join(consumer)
    state.dispatch(0.0)
    return consumers


def held(consumer: Consumer) -> list[int]:
    """Versions of the events that a consumer has not answered."""
    return [entry.original.version for entry in consumer.unanswered.values()]


def ids(*versions: int) -> list[bytes]:
    return [UUID(int=version + 1).bytes for version in versions]


def test_a_consumer_gets_as_many_as_it_has_slots() -> None:
    (consumer,) = joined(delivery(events=5), 3)
    assert held(consumer) == [0, 1, 2]


def test_an_answer_frees_a_slot() -> None:
    state = delivery(events=5)
    (consumer,) = joined(state, 2)
    state.done(consumer, ids(0))
    state.dispatch(0.0)
    assert held(consumer) == [1, 2]


def test_dispatch_to_single_stays_with_one_until_it_is_full() -> None:
    first, second = joined(delivery(events=5), 3, 3)
    assert (held(first), held(second)) == ([0, 1, 2], [3, 4])


def test_round_robin_takes_turns_and_skips_who_is_full() -> None:
    first, second = joined(delivery("RoundRobin", events=5), 1, 9)
    assert sorted(held(first) + held(second)) == [0, 1, 2, 3, 4]
    assert len(held(first)) == 1


@pytest.mark.parametrize("strategy", ["Pinned", "PinnedByCorrelation"])
def test_pinned_events_of_one_stream_go_to_one_consumer(strategy: str) -> None:
    state = Delivery(strategy, 1, 10.0, Mark(-1, 0))
    state.offer([item(n, f"s-{n % 7}") for n in range(70)], Mark(69, 70))
    consumers = joined(state, 100, 100, 100)
    owners = {entry.shown.stream: consumer for consumer in consumers for entry in consumer.unanswered.values()}
    assert all(
        owners[entry.shown.stream] is consumer for consumer in consumers for entry in consumer.unanswered.values()
    )
    assert len(set(owners.values())) > 1


def test_pinned_by_correlation_keeps_a_correlation_together_across_streams() -> None:
    state = Delivery("PinnedByCorrelation", 1, 10.0, Mark(-1, 0))
    note = b'{"$correlationId": "one"}'
    state.offer([item(n, f"s-{n}", note) for n in range(20)], Mark(19, 20))
    consumers = joined(state, 50, 50)
    assert sorted(len(held(consumer)) for consumer in consumers) == [0, 20]


def test_pinned_events_pass_one_that_is_full() -> None:
    state = Delivery("Pinned", 1, 10.0, Mark(-1, 0))
    state.offer([item(n, f"s-{n % 2}") for n in range(10)], Mark(9, 10))
    first, second = joined(state, 1, 50)
    assert {len(held(first)), len(held(second))} == {1, 5}
    assert state.finished() == Mark(-1, 0)


def test_what_is_tried_again_comes_before_what_is_new_and_in_order() -> None:
    state = delivery(events=4)
    (consumer,) = joined(state, 2)
    assert state.retry(consumer, ids(1, 0)) == []
    state.dispatch(0.0)
    assert held(consumer) == [0, 1]
    assert [entry.retries for entry in consumer.unanswered.values()] == [1, 1]


def test_after_its_retries_an_event_is_parked_and_unfinished_until_that_is_written() -> None:
    state = delivery(retries=0, events=2)
    (consumer,) = joined(state, 1)
    (parked,) = state.retry(consumer, ids(0))
    state.dispatch(0.0)
    assert held(consumer) == [1]
    assert state.finished() == Mark(-1, 0)
    state.parked(parked)
    assert state.finished() == Mark(0, 1)


def test_an_unanswered_event_is_late_after_the_timeout_and_not_before() -> None:
    state = delivery(events=1)
    (consumer,) = joined(state, 1)
    assert state.expired(9.9) == []
    assert held(consumer) == [0]
    assert state.expired(10.0) == []
    state.dispatch(10.0)
    assert [entry.retries for entry in consumer.unanswered.values()] == [1]
    assert len(state.expired(20.0)) == 1


def test_a_consumer_that_leaves_gives_back_what_it_had_without_counting() -> None:
    state = delivery(retries=0, events=2)
    first, second = joined(state, 2, 2)
    state.leave(first)
    state.dispatch(0.0)
    assert held(second) == [0, 1]


def test_a_replayed_event_does_not_hold_the_checkpoint() -> None:
    state = delivery(events=1)
    (consumer,) = joined(state, 5)
    state.replay([item(7, replayed=True)])
    state.dispatch(0.0)
    state.done(consumer, ids(0))
    assert held(consumer) == [7]
    assert state.finished() == Mark(0, 1)


def test_answers_for_what_a_consumer_does_not_hold_are_ignored() -> None:
    state = delivery(events=2)
    first, second = joined(state, 1, 1)
    state.done(second, [*ids(0), uuid4().bytes])
    assert (held(first), held(second)) == ([0], [1])


@given(
    st.lists(
        st.tuples(st.sampled_from(["ack", "retry", "park", "late", "leave", "join", "offer"]), st.integers(0, 5)),
        max_size=60,
    ),
    st.sampled_from(["DispatchToSingle", "RoundRobin", "Pinned", "PinnedByCorrelation"]),
)
def test_no_event_is_lost_and_no_checkpoint_passes_an_unfinished_one(
    steps: list[tuple[str, int]], strategy: str
) -> None:
    state = Delivery(strategy, 1, 1.0, Mark(-1, 0))
    consumers: list[Consumer] = []
    offered, now = 0, 0.0
    finished: set[int] = set()
    parking: list[Item] = []
    for verb, n in steps:
        now += 0.3
        if verb == "join":
            consumers.append(Consumer(n + 1))
            state.join(consumers[-1])
        elif verb == "offer":
            state.offer(
                [item(k, f"s-{k % 5}") for k in range(offered, offered + n)], Mark(offered + n - 1, offered + n)
            )
            offered += n
        elif verb == "late":
            parking += state.expired(now)
        elif consumers:
            consumer = consumers[n % len(consumers)]
            some = list(consumer.unanswered)[: n + 1]
            if verb == "ack":
                finished |= {consumer.unanswered[id_].original.version for id_ in some}
                state.done(consumer, some)
            elif verb == "retry":
                parking += state.retry(consumer, some)
            elif verb == "park":
                parking += state.park(consumer, some)
            else:
                state.leave(consumer)
                consumers.remove(consumer)
        if parking and n % 2:
            done = parking.pop()
            finished.add(done.original.version)
            state.parked(done)
        state.dispatch(now)
        assert all(len(consumer.unanswered) <= consumer.slots for consumer in consumers)
        assert set(range(state.finished().at + 1)) <= finished
    there = [entry.original.version for entry in (*state.buffer, *state.retries, *parking)]
    there += [version for consumer in consumers for version in held(consumer)]
    assert sorted([*there, *finished]) == list(range(offered))
