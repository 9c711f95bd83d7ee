"""Reading which keys are blocked while other transactions, which the reading may or may not see, block some."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
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
    assert site.keys.must_wait(fresh(2, "a"))
    assert site.due.stale, "it is read again with the next commit"


async def test_nothing_is_read_while_a_key_is_blocked_apart_and_all_of_it_afterwards() -> None:
    site = Site()
    site.rows.answers.set()
    item = site.hold_apart()
    await site.refresh()
    assert not site.rows.asked.is_set()
    assert site.keys.must_wait(fresh(2, "a"))
    assert not site.keys.must_wait(fresh(2, "b"))
    site.commit(item)
    await site.refresh()
    assert site.keys.blocked == {0: {A: 1, B: 1}}
    assert not site.due.stale


async def test_what_the_next_commit_says_is_added_to_what_was_read() -> None:
    site = Site()
    site.rows.answers.set()
    item = fail(fresh(1, "a"))
    site.keys.ended(item)
    await site.hindrances.refresh(CONNECTION, [item])
    assert site.keys.blocked == {0: {A: 1, B: 1}}
    assert not site.due.stale
