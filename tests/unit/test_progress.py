"""What one commit writes beside another process's: nothing of an event that the other has done, no letter twice."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from uuid import UUID

import pytest
import sqlalchemy as sa

from tidings.database.dead_letters import Letter
from tidings.database.engine import Database, open_database
from tidings.database.enrolment import Enrolment
from tidings.database.held_events import HeldEvent, held_event
from tidings.database.held_rows import Ended, HeldRows
from tidings.database.inbox import Inbox
from tidings.database.layout import settled
from tidings.database.staged_events import StagedEvent
from tidings.database.tables import dead, floors, held, partials, staged, watermarks
from tidings.delivery.batch import Batch
from tidings.delivery.inflight import InFlight, Role
from tidings.delivery.progress import Progress
from tidings.errors import Fenced
from tidings.modelling.handlers import Handler, Retry
from tidings.protocol.position import ALL_BUCKETS
from tidings.service import Service
from tidings.stores import EventData, RecordedEvent

LOG = UUID(int=7)
BUCKET, OTHER = 3, 4


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with open_database(f"sqlite:///{tmp_path}/shop.db") as database:
        yield database


class Process:
    """What one process of the service knows, and how it commits."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.inbox = Inbox(database, "shop", LOG, ALL_BUCKETS)
        self.held = HeldRows("shop", LOG, ALL_BUCKETS)

    async def join(self) -> Process:
        self.progress = Progress(self.inbox, self.held, await self.inbox.join(), time.monotonic)
        return self

    async def commit(self, batch: Batch) -> None:
        async with self.database.transaction() as connection:
            await self.progress.write(connection, batch, floor_now=False)
        self.progress.written(batch)


def event(position: int) -> RecordedEvent:
    return RecordedEvent(position, "orders", position, "Placed", b"{}", b"", True, UUID(int=position + 1).bytes, 0)


def item(position: int, held: HeldEvent | None = None) -> InFlight:
    async def handle() -> None:
        raise AssertionError("nobody runs it here")

    handler = Handler("handle", handle, (), (), Retry(), 1.0, threaded=False)
    return InFlight(event(position), BUCKET, handler, Role.PLAIN if held is None else Role.AGAIN, held)


def doubted(*items: InFlight) -> Batch:
    return Batch(doubted=list(items))


async def test_a_failure_at_an_event_that_nobody_else_has_done_is_no_reason_to_join_again(database: Database) -> None:
    ours = await Process(database).join()
    await ours.commit(doubted(item(5)))
    await ours.commit(Batch(moves={BUCKET: 5}))
    await ours.commit(doubted(item(6)))


async def test_an_event_that_failed_and_ended_before_the_same_commit_is_written(database: Database) -> None:
    ours = await Process(database).join()
    row = HeldEvent(event(5), BUCKET, "key", "handle", 1, 0, 0.0, "because", None)
    async with database.transaction() as connection:
        await ours.held.hold(connection, [row])
    fresh, again = item(6), item(5, row)
    batch = doubted(fresh, fresh, again)
    batch.finish(again)
    batch.finish(fresh)
    await ours.commit(batch)
    assert await settled(database, "shop", LOG, BUCKET) == 6


async def test_a_watermark_that_another_process_has_moved_is_not_moved_again(database: Database) -> None:
    ours, other = await Process(database).join(), await Process(database).join()
    await other.commit(Batch(moves={BUCKET: 5}))
    with pytest.raises(Fenced):
        await ours.commit(Batch(moves={BUCKET: 5}))
    assert await settled(database, "shop", LOG, BUCKET) == 5


async def test_a_failure_after_a_replay_was_asked_for_is_a_reason_to_join_again(database: Database) -> None:
    ours = await Process(database).join()
    async with database.transaction() as connection:
        await connection.execute(watermarks.update().values(replays=1))
    with pytest.raises(Fenced, match="or a replay was asked for"):
        await ours.commit(doubted(item(5)))


@pytest.mark.parametrize("bucket", [BUCKET, OTHER])
async def test_a_failure_where_another_process_has_gone_on_is_a_reason_to_join_again(
    database: Database, bucket: int
) -> None:
    ours, other = await Process(database).join(), await Process(database).join()
    await other.commit(Batch(moves={bucket: 5}))
    if bucket == BUCKET:
        with pytest.raises(Fenced, match=r"another process moved 1 of the watermarks of buckets \[3\]"):
            await ours.commit(doubted(item(5)))
    else:
        await ours.commit(doubted(item(5)))


async def test_a_failure_at_a_held_event_that_another_process_has_settled_is_a_reason_to_join_again(
    database: Database,
) -> None:
    rows = [HeldEvent(event(n), BUCKET, "key", "handle", 1, 0, 0.0, "because", None) for n in (5, 6)]
    ours = await Process(database).join()
    async with database.transaction() as connection:
        await ours.held.hold(connection, rows)
    await ours.commit(doubted(*(item(row.event.position, row) for row in rows)))
    async with database.transaction() as connection:
        await Process(database).held.end(connection, [Ended(rows[1])])
    await ours.commit(doubted(item(5, rows[0])))
    with pytest.raises(Fenced, match="the held event at position 6 is not as it was"):
        await ours.commit(doubted(*(item(row.event.position, row) for row in rows)))


READ = HeldEvent(event(5), BUCKET, "key", "handle", 3, 2, 1_000.0, "because", None, code="old")
"""A held event as this process has read it."""
LATER = READ._replace(attempts=4, tries=3, due=4_600.0, reason="again", detail="Traceback", code="new")
"""It has failed once more."""


async def rows_after(database: Database, meanwhile: sa.Update | sa.Delete | None, ended: Ended) -> list[HeldEvent]:
    """Return the held events after something was done to them while this one was at work."""
    ours = HeldRows("shop", LOG, ALL_BUCKETS)
    async with database.transaction() as connection:
        await ours.hold(connection, [READ])
    if meanwhile is not None:
        async with database.transaction() as connection:
            await connection.execute(meanwhile)
    try:
        async with database.transaction() as connection:
            await ours.end(connection, [ended])
    finally:
        async with database.reading() as connection:
            found = [held_event(row) for row in await connection.execute(sa.select(held))]
    return found


RETRIED = held.update().values(due=2_000.0, tries=0)
DROPPED = held.delete()
MADE_ANEW = held.update().values(due=2_000.0, tries=0, attempts=0)
"""It was skipped or dropped, and has come back: by a replay, or from the dead letters."""


async def test_what_came_of_a_held_event_is_written(database: Database) -> None:
    assert await rows_after(database, None, Ended(READ, LATER)) == [LATER]


@pytest.mark.parametrize("ended", [Ended(READ), Ended(READ, dead=True)], ids=["done", "dead"])
async def test_a_held_event_that_is_done_or_dead_is_held_no_more(database: Database, ended: Ended) -> None:
    assert await rows_after(database, None, ended) == []


async def test_an_attempt_that_failed_is_counted_and_does_not_undo_what_an_operator_has_ordered(
    database: Database,
) -> None:
    (found,) = await rows_after(database, RETRIED, Ended(READ, LATER))
    assert found == LATER._replace(tries=0, due=2_000.0)


async def test_an_event_that_an_operator_has_retried_meanwhile_does_not_die(database: Database) -> None:
    with pytest.raises(Fenced, match="an operator has retried"):
        await rows_after(database, RETRIED, Ended(READ, dead=True))
    async with database.reading() as connection:
        assert await connection.scalar(sa.select(held.c.tries)) == 0


async def test_an_event_that_an_operator_has_retried_meanwhile_and_that_succeeded_is_done(database: Database) -> None:
    assert await rows_after(database, RETRIED, Ended(READ)) == []


@pytest.mark.parametrize(
    "ended", [Ended(READ), Ended(READ, dead=True), Ended(READ, LATER)], ids=["done", "dead", "held"]
)
async def test_an_event_that_an_operator_has_dropped_meanwhile_does_not_come_back(
    database: Database, ended: Ended
) -> None:
    with pytest.raises(Fenced, match="an operator has retried, skipped or dropped it"):
        await rows_after(database, DROPPED, ended)


@pytest.mark.parametrize("ended", [Ended(READ, dead=True), Ended(READ, LATER)], ids=["dead", "held"])
async def test_a_failure_says_nothing_about_an_event_that_was_held_anew(database: Database, ended: Ended) -> None:
    with pytest.raises(Fenced):
        await rows_after(database, MADE_ANEW, ended)


async def test_who_does_not_know_what_a_held_event_has_emitted_emits_nothing_behind_it(database: Database) -> None:
    """The held event moves no watermark, and its key is free for whoever looks."""
    ours, other = await Process(database).join(), await Process(database).join()
    row = HeldEvent(event(5), BUCKET, "key", "handle", 1, 0, 0.0, "because", None)
    async with database.transaction() as connection:
        await ours.held.hold(connection, [row])
    again = item(5, row)
    again.leaves = [StagedEvent(BUCKET, 5, "answers", EventData("Answered", b"{}"))]
    batch = Batch()
    batch.finish(again)
    await ours.commit(batch)
    with pytest.raises(Fenced):
        await other.commit(Batch(moves={BUCKET: 6}))
    await ours.commit(Batch(moves={BUCKET: 6}))
    joined = await Process(database).join()
    assert [found.cause for found in await joined.inbox.read_staged()] == [5]
    await joined.commit(Batch(moves={BUCKET: 7}))


async def test_a_staged_event_that_two_processes_give_up_is_one_dead_letter(database: Database) -> None:
    one, two = await Process(database).join(), await Process(database).join()
    waiting = StagedEvent(BUCKET, 5, "orders", EventData("Placed", b"{}"))
    async with database.transaction() as connection:
        await one.inbox.staged.add(connection, [waiting])
    for process in (one, two):
        await process.commit(Batch(never=[(waiting.event.id, Letter.of_staged(waiting, 1, "too large"))]))
    async with database.reading() as connection:
        assert await connection.scalar(sa.select(sa.func.count()).select_from(staged)) == 0
        assert list(await connection.scalars(sa.select(dead.c.event_id))) == [str(waiting.event.id)]


HANDLERS = ("first", "slow", "second", "third")


def shared(position: int, *names: str) -> Batch:
    """Note that these of the event's four handlers have finished."""
    batch = Batch()
    for name in names:
        handler = replace(item(position).handler, name=name)
        batch.finish(InFlight(event(position), BUCKET, handler, Role.SHARED if name != HANDLERS[-1] else Role.PLAIN))
    return batch


@pytest.mark.parametrize("known", range(3))
@pytest.mark.parametrize("theirs", range(1, 4))
async def test_what_another_process_is_done_with_is_not_done_again_by_who_finishes_the_event(
    database: Database, known: int, theirs: int
) -> None:
    """Both processes know that the same handlers are done. The other one goes on, and this one believes that it is
    alone."""
    ours = await Process(database).join()
    if known:
        await ours.commit(shared(5, *HANDLERS[:known]))
    other = await Process(database).join()
    if theirs > known:
        await other.commit(shared(5, *HANDLERS[known:theirs]))
        with pytest.raises(Fenced, match="another process has handled position 5"):
            await ours.commit(shared(5, *HANDLERS[known:]))
        again = await Process(database).join()
        await again.commit(shared(5, *HANDLERS[theirs:]))
    else:
        await ours.commit(shared(5, *HANDLERS[known:]))
    async with database.reading() as connection:
        assert (await connection.execute(sa.select(partials))).all() == []


async def test_an_event_that_retention_removed_when_it_was_half_done_fences_nobody(database: Database) -> None:
    """Nobody can finish it. What was noted of it stood in the way of the next event with several handlers for ever."""
    ours = await Process(database).join()
    await ours.commit(shared(5, "first"))
    ours = await Process(database).join()
    await ours.commit(shared(9, "first"))
    await ours.commit(shared(9, *HANDLERS[1:]))
    await ours.commit(shared(12, "first"))
    async with database.reading() as connection:
        assert [row.position for row in await connection.execute(sa.select(partials))] == [12]
    assert await settled(database, "shop", LOG, BUCKET) == 9


async def test_who_was_alone_finishes_events_with_several_handlers_in_any_portions(database: Database) -> None:
    ours = await Process(database).join()
    for position, cut in enumerate([(4,), (1, 4), (2, 4), (1, 2, 3, 4), (4,)]):
        for begin, end in pairwise((0, *cut)):
            await ours.commit(shared(position, *HANDLERS[begin:end]))
    assert await settled(database, "shop", LOG, BUCKET) == 4


async def test_a_resize_between_the_first_look_of_an_enrolment_and_its_first_lock_fences_it(database: Database) -> None:
    """Else a row that is not there any more would end the service."""
    await Process(database).join()
    async with database.transaction() as connection:
        await connection.execute(floors.delete())
        with pytest.raises(Fenced, match="was resized"):
            await Enrolment(connection, Service("shop"), LOG, ALL_BUCKETS)._settled()
