"""Room for answers: who waits for it and who gets it, and who reads too slowly to keep it."""

from __future__ import annotations

import asyncio
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from tidings.server.budgets import LITTLE, MIB, PAGES, SPARE, Allowance, Charge, Limits, Treasury
from tidings.server.pace import Pace
from tidings.server.pages import COPIES, PAGE_BYTES, Pages, size_of
from tidings.server.refusals import Refusal
from tidings.server.wire import Resolved
from tidings.stores import RecordedEvent

LIMITS = Limits(connection_bytes=24 * MIB, user_bytes=32 * MIB, process_bytes=40 * MIB)


def full() -> tuple[Treasury, Charge, Charge]:
    """A process without room for a large call: one connection holds 24 MiB, and another one 6."""
    treasury = Treasury(LIMITS)
    charges = Charge(Allowance(treasury)), Charge(Allowance(treasury))
    for charge, size in zip(charges, (24, 6), strict=True):
        charge.hold(size * MIB)
    return treasury, *charges


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_call_waits_until_another_one_gives_its_room_back() -> None:
    treasury, holder, _ = full()
    waiter = Charge(Allowance(treasury))
    waiting = asyncio.create_task(waiter.wait_for(3 * MIB))
    await turns()
    assert not waiting.done()
    assert treasury.wants(holder)
    holder.hold(-3 * MIB)
    await turns()
    assert not waiting.done(), "a reader leaves some room for requests"
    holder.hold(-SPARE)
    await waiting
    assert waiter.bytes == 3 * MIB
    assert not treasury.wants(holder)


async def test_who_waits_for_the_connections_room_waits_for_no_other_connection() -> None:
    treasury = Treasury(LIMITS)
    allowance = Allowance(treasury)
    first, second, stranger = Charge(allowance), Charge(allowance), Charge(Allowance(treasury))
    first.hold(23 * MIB)
    stranger.hold(MIB)
    waiting = asyncio.create_task(second.wait_for(2 * MIB))
    await turns()
    assert treasury.wants(first)
    assert not treasury.wants(stranger)
    stranger.hold(-MIB)
    await turns()
    assert not waiting.done()
    first.clear()
    await waiting


async def test_who_is_blocked_by_its_own_connection_stops_nobody_behind_it() -> None:
    treasury = Treasury(LIMITS)
    allowance = Allowance(treasury)
    full, free = Charge(allowance), Charge(Allowance(treasury))
    full.hold(24 * MIB)
    other = Charge(Allowance(treasury))
    other.hold(6 * MIB)
    blocked = asyncio.create_task(Charge(allowance).wait_for(MIB))
    behind = asyncio.create_task(free.wait_for(2 * MIB))
    await turns()
    other.hold(-6 * MIB)
    await behind
    assert not blocked.done()
    full.clear()
    await blocked


async def test_what_a_cancelled_call_was_given_is_given_back() -> None:
    treasury, holder, more = full()
    waiter = Charge(Allowance(treasury))
    waiting = asyncio.create_task(waiter.wait_for(3 * MIB))
    await turns()
    holder.clear()
    waiting.cancel()  # it has room now, but does not know
    await asyncio.gather(waiting, return_exceptions=True)
    more.clear()
    assert treasury.bytes == 0


async def test_who_finds_no_room_for_long_is_told_so() -> None:
    treasury = Treasury(Limits(request_seconds=0.01))
    holder, waiter = Charge(Allowance(treasury)), Charge(Allowance(treasury))
    holder.hold(200 * MIB)
    with pytest.raises(Refusal, match="no room"):
        await waiter.wait_for(MIB)
    assert waiter.bytes == 0


@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 3 * MIB), st.booleans()), max_size=60))
def test_no_more_room_is_given_than_there_is_and_nobody_waits_for_nothing(steps: list[tuple[int, int, bool]]) -> None:
    async def run() -> None:
        treasury = Treasury(LIMITS)
        charges = [Charge(Allowance(treasury)) for _ in range(8)]
        waiting: list[asyncio.Task[None]] = []
        for who, size, clears in steps:
            if clears:
                charges[who].hold(-charges[who].bytes)
            else:
                waiting.append(asyncio.create_task(charges[who].wait_for(size)))
            await turns()
            assert treasury.bytes <= LIMITS.process_bytes
            assert all(charge.allowance.bytes <= LIMITS.connection_bytes for charge in charges)
        for _ in range(len(waiting) + 1):
            for charge in charges:
                charge.hold(-charge.bytes)
            await turns()
        assert all(task.done() for task in waiting)

    asyncio.run(run())


def test_callers_without_credentials_have_a_quarter_and_the_rest_is_the_users() -> None:
    treasury = Treasury(Limits(), users=True)
    most = treasury.limits.process_bytes
    nameless = [Charge(Allowance(treasury)) for _ in range(8)]
    for charge in nameless:
        if not charge.excess(most // 16):
            charge.hold(most // 16)
    assert treasury.nameless_bytes == most // 4
    user = Charge(Allowance(treasury))
    user.of("admin")
    user.take(16 * MIB)
    with pytest.raises(Refusal, match="without credentials"):
        nameless[0].take(1)
    assert user.allowance.trusted
    assert not nameless[0].allowance.trusted


def test_connections_that_use_little_find_room_when_others_use_much() -> None:
    treasury = Treasury(Limits())
    for _ in range(4):
        Charge(Allowance(treasury)).hold(24 * MIB)
    little, much = Charge(Allowance(treasury)), Charge(Allowance(treasury))
    little.take(LITTLE)
    with pytest.raises(Refusal, match="process_bytes"):
        much.take(LITTLE + 1)


def test_pages_become_smaller_where_others_need_much() -> None:
    treasury = Treasury(Limits())
    seen = []
    for part in (0.2, 0.2, 0.2, 0.3):
        seen.append(Charge(Allowance(treasury)).page)
        Charge(Allowance(treasury)).hold(int(part * treasury.limits.process_bytes))
    seen.append(Charge(Allowance(treasury)).page)
    sizes = [size for _, size in PAGES]
    assert seen == [sizes[0], sizes[0], sizes[1], sizes[2], sizes[2]]


def event(size: int) -> Resolved:
    return RecordedEvent(1, "s", 0, "T", b"x" * size, b"", False, UUID(int=1).bytes, 0), None


async def test_a_page_is_counted_until_it_has_left() -> None:
    charge = Charge(Allowance(Treasury(Limits())))
    pages = Pages(charge)

    async def look(most: int) -> list[Resolved]:
        assert charge.bytes >= COPIES * most
        assert most == PAGE_BYTES
        return [event(1000)] * 3

    for _ in range(2):
        page = await pages.read(look, lambda page: page)
    assert charge.bytes == 2 * COPIES * size_of(page)
    pages.sent()
    pages.sent()
    assert charge.bytes == 0


async def test_an_event_larger_than_a_page_waits_for_room_of_its_own_size() -> None:
    treasury = Treasury(LIMITS)
    charge, other = Charge(Allowance(treasury)), Charge(Allowance(treasury))
    other.hold(22 * MIB)
    third = Charge(Allowance(treasury))
    third.hold(7 * MIB)
    looked = 0

    async def look(most: int) -> list[Resolved]:
        nonlocal looked
        looked += 1
        return [event(MIB)]

    reading = asyncio.create_task(Pages(charge).read(look, lambda page: page))
    await turns()
    assert looked == 1
    assert not reading.done()
    other.clear()
    await reading
    assert looked == 2
    assert charge.bytes == COPIES * size_of([event(MIB)])


# ---- pace ----------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.01, 1.9), st.integers(0, 99)), min_size=1, max_size=40))
def test_a_byte_from_time_to_time_does_not_make_a_reader_fast(steps: list[tuple[float, int]]) -> None:
    """A reader of less than a hundred bytes a second, where a thousand are asked for."""
    pace, now = Pace(1000, 2.0), 100.0
    for seconds, size in steps:
        pace.wait(now)
        now += seconds
        pace.took(int(size * seconds), now)
    waited = now - 100.0
    assert pace.late(now) <= 0
    assert waited < 2.3 or pace.late(now + 0.3) > 0


@given(st.lists(st.tuples(st.floats(0.01, 1.9), st.floats(0, 50)), min_size=1, max_size=40))
def test_who_reads_fast_enough_is_never_late(steps: list[tuple[float, float]]) -> None:
    pace, now = Pace(1000, 2.0), 100.0
    for seconds, rest in steps:
        pace.wait(now)
        now += seconds
        assert pace.late(now) <= 0
        pace.took(int(1001 * seconds) + 1, now)
        pace.rest(now)
        now += rest  # nothing waits: no time is counted
        assert pace.late(now) <= 0


def test_who_has_not_read_for_long_catches_up_soon() -> None:
    pace = Pace(1000, 2.0)
    pace.wait(100.0)
    assert pace.late(101.9) <= 0 < pace.late(102.1)
    assert pace.late(3700.0) > 0
    pace.took(2000, 3700.0)
    assert pace.late(3701.0) <= 0
