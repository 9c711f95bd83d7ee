"""Reading which keys are blocked while other transactions, which the reading may or may not see, block some."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection

from tests.unit.test_keys import A, fail, fresh
from tidings._support.timers import Timers
from tidings.database.held_events import Line
from tidings.database.held_rows import HeldRows
from tidings.delivery.breaker import Breakers
from tidings.delivery.due import Due
from tidings.delivery.hindrances import Hindrances
from tidings.delivery.inflight import InFlight
from tidings.delivery.keys import Keys

B: Line = ("b", "")
CONNECTION = cast("AsyncConnection", None)


class Rows:
    """The database: what it answers was decided when it was asked."""

    def __init__(self) -> None:
        self.there: dict[int, dict[Line, int]] = {0: {B: 1}}
        self.asked, self.answers = asyncio.Event(), asyncio.Event()

    async def blocked(self, connection: AsyncConnection) -> dict[int, dict[Line, int]]:
        seen = {bucket: dict(lines) for bucket, lines in self.there.items()}
        self.asked.set()
        await self.answers.wait()
        return seen


class Site:
    """Hindrances whose next reading is due."""

    def __init__(self) -> None:
        self.keys, self.rows = Keys(), Rows()
        self.due = Due(self.keys, Timers())
        self.due.stale = True
        breakers: Any = Breakers(lambda: 0.0)
        self.hindrances = Hindrances(cast("HeldRows", self.rows), self.keys, breakers, self.due)

    def hold_apart(self) -> InFlight:
        item = fail(fresh(1, "a"))
        self.keys.ended(item, apart=True)
        return item

    def commit(self, item: InFlight) -> None:
        self.rows.there[0][A] = 1
        self.keys.committed([item])

    async def refresh(self) -> None:
        await self.hindrances.refresh(CONNECTION, ())


@pytest.mark.parametrize("committed", [False, True], ids=["still under way", "committed meanwhile"])
async def test_a_key_that_was_blocked_apart_while_keys_were_read_stays_blocked(committed: bool) -> None:
    site = Site()
    reading = asyncio.create_task(site.refresh())
    await site.rows.asked.wait()
    item = site.hold_apart()
    if committed:
        site.commit(item)
    site.rows.answers.set()
    await reading
    assert site.keys.blocked == {0: {A: 1, B: 1}}


async def test_all_other_keys_are_read_while_a_key_is_blocked_apart() -> None:
    """Under traffic of which something fails all the time, keys would never be read otherwise."""
    site = Site()
    site.rows.answers.set()
    item = site.hold_apart()
    await site.refresh()
    assert site.keys.blocked == {0: {A: 1, B: 1}}
    site.rows.there = {0: {}}
    site.due.stale = True
    await site.refresh()
    assert site.keys.blocked == {0: {A: 1}}, "an operator has freed the other one"
    site.commit(item)
    site.rows.there = {}
    site.due.stale = True
    await site.refresh()
    assert site.keys.blocked == {}


async def test_what_operators_change_while_keys_are_read_is_read_next() -> None:
    site = Site()
    reading = asyncio.create_task(site.refresh())
    await site.rows.asked.wait()
    site.due.stale = True
    site.rows.answers.set()
    await reading
    assert site.due.stale


KEYS = ("a", "b")
STEPS = st.lists(
    st.tuples(st.sampled_from(["hold apart", "commit", "drop", "ask", "answer"]), st.sampled_from(KEYS)), max_size=30
)


@given(STEPS)
def test_a_key_is_blocked_while_it_has_a_row_or_will_have_one_and_free_soon_after(steps: list[tuple[str, str]]) -> None:
    """A group holds an event of a key that is free; an operator drops what is held; keys are read now and then."""
    keys, rows, apart = Keys(), Counter[Line](), dict[Line, InFlight]()
    seen: list[dict[int, dict[Line, int]]] = []

    def snapshot() -> dict[int, dict[Line, int]]:
        return {0: dict(rows)} if rows else {}

    for what, key in steps:
        line = (key, "")
        if what == "hold apart" and not keys.must_wait(fresh(1, key)):
            apart[line] = fail(fresh(1, key))
            keys.ended(apart[line], apart=True)
        elif what == "commit" and line in apart:
            keys.committed([apart.pop(line)])
            rows[line] += 1
        elif what == "drop":
            rows.pop(line, None)
        elif what == "ask" and not seen:
            keys.reading()
            seen.append(snapshot())
        elif what == "answer" and seen:
            keys.read(seen.pop(), ())
        for each in KEYS:
            if rows[each, ""] or (each, "") in apart:
                assert keys.must_wait(fresh(2, each)), f"{each} is blocked"
        rows = +rows
    if seen:
        keys.read(seen.pop(), ())
    for line, item in apart.items():
        keys.committed([item])
        rows[line] += 1
    keys.reading()
    keys.read(snapshot(), ())
    assert keys.blocked == snapshot()


async def test_what_the_next_commit_says_is_added_to_what_was_read() -> None:
    site = Site()
    site.rows.answers.set()
    item = fail(fresh(1, "a"))
    site.keys.ended(item)
    await site.hindrances.refresh(CONNECTION, [item])
    assert site.keys.blocked == {0: {A: 1, B: 1}}
    assert not site.due.stale
