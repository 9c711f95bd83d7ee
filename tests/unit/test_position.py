"""The delivery rules one class at a time. How they hold together: `test_simulation.py`."""

from __future__ import annotations

import json
from binascii import crc32
from collections import defaultdict
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.protocol.position import (
    ALL_BUCKETS,
    BUCKETS,
    CARRIED,
    NESTING,
    RESERVED,
    Accepted,
    Arrival,
    Chain,
    Lanes,
    Ticket,
    Window,
    bucket_of,
    carried,
    partition_key,
)
from tidings.stores import RecordedEvent

FEW = range(4)
histories = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), max_size=40).map(
    lambda steps: [(sum(step for step, _ in steps[: n + 1]), bucket) for n, (_, bucket) in enumerate(steps)]
)
"""Strategy of logs: rising positions, each with one of four buckets."""


def event(stream: str = "order-1", metadata: bytes = b"", type: str = "Happened", position: int = 1) -> RecordedEvent:
    return RecordedEvent(position, stream, 0, type, b"{}", metadata, True, bytes(16), 0)


# ---- partition key and bucket --------------------------------------------------------


@given(st.text())
def test_a_bucket_is_the_low_byte_of_the_crc_of_the_key(key: str) -> None:
    assert bucket_of(key) == crc32(key.encode("utf-8", "surrogatepass")) % BUCKETS
    assert bucket_of(key) in ALL_BUCKETS


def test_buckets_of_known_keys_never_change() -> None:
    """Watermarks are stored per bucket: with another function, everything would be handled again."""
    known = {key: bucket_of(key) for key in ("order-1", "", "größe-ß", "\N{SNOWMAN}")}
    assert known == {"order-1": 239, "": 0, "größe-ß": 99, "\N{SNOWMAN}": 84}


@given(st.text(min_size=1), st.dictionaries(st.text(), st.integers()))
def test_the_partition_key_of_the_metadata_wins(key: str, more: dict[str, int]) -> None:
    written = event(metadata=json.dumps(more | {"partitionKey": key}, ensure_ascii=False).encode())
    assert partition_key(written) == key
    assert carried(written) == bucket_of(key)


@pytest.mark.parametrize(
    "metadata",
    [
        b"",
        b"{}",
        b'{"partitionKey":""}',
        b'{"partitionKey":null}',
        b'{"partitionKey":7}',
        b'{"partitionKey":7.5}',
        b'{"partitionKey":NaN}',
        b'{"partitionKey":["a"]}',
        b'{"inner":{"partitionKey":"a"}}',
        b'["partitionKey"]',
        b'"partitionKey"',
        b'{"partitionKey":"a"',
        b'{"partitionKey":"\xff"}',
        b'{"partitionKey":"\\ud800"}',
        '{"partitionKey":"a"}'.encode("utf-16"),
        b"[" * 100_000 + b'"partitionKey"',
    ],
)
def test_without_a_usable_partition_key_the_stream_is_the_key(metadata: bytes) -> None:
    assert partition_key(event("order-9", metadata)) == "order-9"


def test_a_key_is_the_same_at_every_depth_of_the_stack_and_for_every_limit_of_integers() -> None:
    """Relay and service may run different interpreters: if only one of them found a key, an event would be handled
    twice."""
    near = b'{"partitionKey":"k","deep":' + b"[" * (NESTING - 1) + b"]" * (NESTING - 1) + b"}"
    beyond = b'{"partitionKey":"k","deep":' + b"[" * NESTING + b"]" * NESTING + b"}"
    number = b'{"partitionKey":"k","number":' + b"9" * 50_000 + b"}"
    assert [partition_key(event("s", metadata)) for metadata in (near, beyond, number)] == ["k", "s", "k"]

    def deeper(levels: int, metadata: bytes) -> str:
        return deeper(levels - 1, metadata) if levels else partition_key(event("s", metadata))

    assert [deeper(200, metadata) for metadata in (near, beyond, number)] == ["k", "s", "k"]


@given(st.binary())
def test_any_metadata_has_a_key(metadata: bytes) -> None:
    assert partition_key(event("s", b'{"partitionKey"' + metadata)) != ""


@pytest.mark.parametrize("reserved", ["$settings", "$$order-1", "tidings_relay-main", "tidings_log"])
def test_reserved_streams_and_types_are_not_carried(reserved: str) -> None:
    assert carried(event(stream=reserved)) is None
    assert carried(event(type=reserved)) is None


@given(st.sampled_from([*RESERVED, "", "tidings", "tidings.", "order"]), st.text(), st.text())
def test_what_is_carried_passes_the_filter_that_stores_evaluate(prefix: str, stream: str, type: str) -> None:
    written = event(stream=prefix + stream, type=type)
    assert carried(written) is None or CARRIED.matches(written)
    if not type.startswith(RESERVED):
        assert (carried(written) is not None) == CARRIED.matches(written)


# ---- chain and accepted --------------------------------------------------------------


@given(histories, st.integers(-1, 50))
def test_previous_is_never_below_the_event_before_in_the_bucket(log: list[tuple[int, int]], start: int) -> None:
    chain, before = Chain(start), dict[int, int]()
    for position, bucket in log:
        if position > start:
            previous = chain.stamp(bucket, position)
            assert before.get(bucket, -1) <= previous < position
        before[bucket] = position


@given(histories, st.data())
def test_markers_name_the_last_position_of_every_bucket_since_the_one_before(
    log: list[tuple[int, int]], data: st.DataObject
) -> None:
    chain, base = Chain(0), 0
    since = dict[int, int]()
    for position, bucket in log:
        chain.stamp(bucket, position)
        chain.confirm(bucket, position)
        since[bucket] = position
        if data.draw(st.booleans()):
            assert chain.mark(position) == (base, since)
            base, since = position, {}
    assert chain.mark(10**6) == (base, since)
    assert chain.mark(10**6) == (10**6, {})


@given(histories)
def test_over_a_bus_without_faults_every_event_is_next_and_again_a_duplicate(log: list[tuple[int, int]]) -> None:
    chain, accepted = Chain(0), Accepted(FEW, 0, {})
    for position, bucket in log:
        previous = chain.stamp(bucket, position)
        chain.confirm(bucket, position)
        assert accepted.offer(bucket, position, previous) is Arrival.NEXT
        assert accepted.offer(bucket, position, previous) is Arrival.DUPLICATE
    head = log[-1][0] if log else 1
    assert accepted.hear(head, *chain.mark(head)) is Arrival.NEXT
    assert accepted.reached == head


@given(histories, st.integers(0, 2**32))
def test_over_any_bus_passes_make_up_for_every_loss_and_nothing_comes_twice(
    log: list[tuple[int, int]], seed: int
) -> None:
    random, chain, accepted, got = Random(seed), Chain(0), Accepted(FEW, 0, {}), list[tuple[int, int]]()
    messages = [(position, bucket, chain.stamp(bucket, position)) for position, bucket in log]
    arriving = [message for message in messages for _ in range(random.choice((0, 1, 1, 1, 2)))]
    for n in range(len(arriving)):
        if random.random() < 0.2:
            other = random.randrange(len(arriving))
            arriving[n], arriving[other] = arriving[other], arriving[n]

    def heal(upto: int) -> None:
        got.extend((at, of) for at, of in log if accepted.reached < at <= upto and accepted.read(of, at))
        accepted.reach(upto)

    for position, bucket, previous in arriving:
        arrival = accepted.offer(bucket, position, previous)
        if arrival is Arrival.NEXT:
            got.append((position, bucket))
        elif arrival is Arrival.GAP:
            heal(position)
    for position, bucket in log:
        chain.confirm(bucket, position)
    head = log[-1][0] if log else 1
    if accepted.hear(head, *chain.mark(head)) is Arrival.GAP:
        heal(head)
    assert sorted(got) == log
    for bucket in FEW:
        order = [at for at, of in got if of == bucket]
        assert order == sorted(order)


@given(histories, histories, st.integers(-1, 60))
def test_accepted_made_anew_from_floor_and_watermarks_knows_what_was_handled(
    handled: list[tuple[int, int]], more: list[tuple[int, int]], floor: int
) -> None:
    watermarks = {bucket: position for position, bucket in handled}
    accepted = Accepted(FEW, floor, watermarks)
    for bucket in FEW:
        assert accepted.tail(bucket) == max(watermarks.get(bucket, -1), floor)
    for position, bucket in handled:
        assert accepted.offer(bucket, position, -1) is Arrival.DUPLICATE
        assert not accepted.read(bucket, position)


def test_a_previous_above_the_tail_is_a_gap_and_accepts_nothing() -> None:
    accepted = Accepted(FEW, 10, {})
    assert accepted.offer(0, 20, 11) is Arrival.GAP
    assert accepted.tail(0) == 10
    assert accepted.offer(0, 20, 10) is Arrival.NEXT
    assert accepted.tail(0) == 20


def test_events_of_other_ranges_buckets_are_dropped_whoever_brings_them() -> None:
    accepted = Accepted(range(2), -1, {})
    assert accepted.offer(2, 5, -1) is Arrival.DUPLICATE
    assert not accepted.read(2, 5)
    assert accepted.hear(6, -1, {2: 6}) is Arrival.NEXT


def test_a_marker_is_heard_once_and_needs_its_base_and_every_touched_bucket() -> None:
    accepted = Accepted(FEW, 10, {})
    assert accepted.hear(20, 11, {}) is Arrival.GAP
    assert accepted.hear(20, 10, {1: 15}) is Arrival.GAP
    assert accepted.reached == 10
    assert accepted.offer(1, 15, 10) is Arrival.NEXT
    assert accepted.hear(20, 10, {1: 15}) is Arrival.NEXT
    assert accepted.hear(20, 10, {1: 15}) is Arrival.DUPLICATE
    assert [accepted.tail(bucket) for bucket in FEW] == [20] * 4


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 99)), max_size=50))
def test_tails_never_fall(steps: list[tuple[int, int]]) -> None:
    accepted, before = Accepted(FEW, -1, {}), [-1] * 4
    for n, (bucket, position) in enumerate(steps):
        if n % 3 == 0:
            accepted.reach(position)
        else:
            accepted.read(bucket, position)
        tails = [accepted.tail(bucket) for bucket in FEW]
        assert all(new >= old for new, old in zip(tails, before, strict=True))
        assert min(tails) >= accepted.reached
        before = tails


def test_reaching_forgets_only_tails_that_say_nothing_more() -> None:
    accepted = Accepted(FEW, -1, {})
    for bucket in FEW:
        accepted.read(bucket, 10 + bucket)
    accepted.reach(11)
    assert [accepted.tail(bucket) for bucket in FEW] == [11, 11, 12, 13]


# ---- lanes ---------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(["push", "take", "all", "finish", "again"]), max_size=200),
    st.randoms(use_true_random=False),
)
def test_lanes_are_first_in_first_out_per_bucket_one_at_a_time_and_lose_nothing(
    steps: list[str], random: Random
) -> None:
    lanes: Lanes[int] = Lanes()
    pushed, done, out = defaultdict[int, list[int]](list), defaultdict[int, list[int]](list), dict[int, int]()

    def finish(bucket: int) -> None:
        done[bucket].append(out.pop(bucket))
        lanes.finish(bucket)

    for n, step in enumerate(steps):
        if step == "push":
            bucket = random.randrange(4)
            pushed[bucket].append(n)
            lanes.push(bucket, n)
        elif step == "take":
            waiting = {bucket for bucket in pushed if bucket not in out and pushed[bucket] != done[bucket]}
            taken = lanes.take()
            assert (taken is not None) == bool(waiting)
            if taken is not None:
                assert taken[0] in waiting
                out[taken[0]] = taken[1]
        elif step == "all":
            waiting = {bucket for bucket in pushed if bucket not in out and pushed[bucket] != done[bucket]}
            items = lanes.take_all()
            assert sorted(items) == sorted(pushed[bucket][len(done[bucket])] for bucket in waiting)
            out |= {bucket: pushed[bucket][len(done[bucket])] for bucket in waiting}
            assert lanes.take() is None
        elif out:
            bucket = random.choice(sorted(out))
            if step == "finish":
                finish(bucket)
            else:
                del out[bucket]
                lanes.again(bucket)
        assert len(lanes) == sum(map(len, pushed.values())) - sum(map(len, done.values()))
    while out or len(lanes):
        while (taken := lanes.take()) is not None:
            out[taken[0]] = taken[1]
        finish(next(iter(out)))
    assert done == pushed


def test_the_bucket_that_has_waited_longest_is_next_and_a_repetition_goes_first() -> None:
    lanes: Lanes[str] = Lanes()
    for bucket, item in ((1, "a"), (2, "b"), (1, "c")):
        lanes.push(bucket, item)
    assert lanes.take() == (1, "a")
    lanes.again(1)
    assert lanes.take() == (1, "a")
    assert lanes.take() == (2, "b")
    assert lanes.take() is None
    lanes.finish(1)
    assert lanes.take() == (1, "c")


# ---- settled -------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["begin", "done", "end", "pop"]), max_size=200), st.randoms(use_true_random=False))
def test_values_come_in_order_each_once_and_never_past_the_first_that_has_not_ended(
    steps: list[str], random: Random
) -> None:
    settled: Window[int] = Window()
    begun, popped, open_ = list[int](), list[int](), dict[int, Ticket[int]]()
    for n, step in enumerate(steps):
        if step in ("begin", "done"):
            ticket = settled.begin(n, done=step == "done")
            begun.append(n)
            if step == "begin":
                open_[n] = ticket
        elif step == "end" and open_:
            open_.pop(random.choice(sorted(open_))).done = True
        else:
            popped += settled.pop()
            ended = begun[: begun.index(min(open_))] if open_ else begun
            assert popped == ended
            assert settled.pop() == []
        assert len(settled) == len(begun) - len(popped)
    for ticket in open_.values():
        ticket.done = True
        ticket.done = True
    assert popped + settled.pop() == begun
