"""A service that crashes on one event does not crash for ever: processes that really die, and what the next does."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.integration.databases import answers, database_url, on_server
from tests.integration.embedded import Happened, embedded, rows, until
from tests.integration.mortal import POISON, mortal
from tidings import Context, Service
from tidings.database.engine import Database, open_database
from tidings.database.inbox import Inbox
from tidings.database.layout import resize
from tidings.database.lineage import Lineage
from tidings.database.notebook import Notebook
from tidings.delivery.failure_memory import FailureMemory
from tidings.delivery.resources import Resources
from tidings.delivery.site import Joined, Site
from tidings.delivery.succession import Succession
from tidings.errors import Fenced

pytestmark = pytest.mark.postgresql

EVENTS = [Happened(key=f"k{n % 3}", n=n) for n in range(60)]
ROOT = Path(__file__).parents[2]


async def start(folder: Path, kind: str) -> int:
    """Run one process until it has settled everything or died. Return its exit status."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.integration.mortal", str(folder), kind, cwd=ROOT
    )
    return await asyncio.wait_for(child.wait(), 60)


def crashes() -> int:
    """Return how many processes the event kills before one does not run it: without a notebook, one more."""
    return 3 if on_server() else 2


def notebooks(folder: Path) -> list[Path]:
    return list(folder.glob("audit.db-begun-*"))


async def append(folder: Path) -> None:
    async with embedded(folder, Service("first")) as world:
        await world.append(*EVENTS)


@pytest.mark.parametrize("kind", ["session", "free"])
async def test_the_third_time_it_is_dead_without_being_run_and_its_neighbours_are_handled(
    tmp_path: Path, kind: str
) -> None:
    await append(tmp_path)
    assert [await start(tmp_path, kind) for _ in range(crashes() + 1)] == [-9] * crashes() + [0]
    assert (tmp_path / "runs").read_text().split() == ["run"] * crashes(), "the last process did not run it"
    (reason,) = await answers(tmp_path, "SELECT reason FROM tidings_dead")
    assert str(reason).startswith("ProcessCrashed: 2 times")
    done = await answers(tmp_path, "SELECT n FROM audit ORDER BY id")
    assert sorted(done, key=str) == sorted((e.n for e in EVENTS if e.n != POISON), key=str)
    for key in range(3):
        mine = [n for n in done if int(str(n)) % 3 == key]
        assert mine == sorted(mine, key=lambda n: int(str(n))), "in order within a key"
    assert await answers(tmp_path, "SELECT count(*) FROM tidings_begun") == [0]
    assert await answers(tmp_path, "SELECT active FROM tidings_floors") == [None], "the last process ended cleanly"
    assert not notebooks(tmp_path)


async def test_slow_neighbours_are_not_condemned_with_it(tmp_path: Path) -> None:
    await append(tmp_path)
    assert [await start(tmp_path, "slow") for _ in range(crashes() + 1)] == [-9] * crashes() + [0]
    (reason,) = await answers(tmp_path, "SELECT reason FROM tidings_dead")
    assert str(reason).startswith("ProcessCrashed")
    assert len(await answers(tmp_path, "SELECT n FROM audit")) == len(EVENTS) - 1


async def test_without_a_notebook_it_is_found_one_crash_later(tmp_path: Path) -> None:
    """The case after a crash on another machine, or with a database on a server."""
    await append(tmp_path)
    statuses = []
    for _ in range(4):
        statuses.append(await start(tmp_path, "session"))
        for notebook in notebooks(tmp_path):
            notebook.unlink()
    assert statuses == [-9, -9, -9, 0]
    (reason,) = await answers(tmp_path, "SELECT reason FROM tidings_dead")
    assert str(reason).startswith("ProcessCrashed: 2 times")
    assert len(await answers(tmp_path, "SELECT n FROM audit")) == len(EVENTS) - 1


@pytest.mark.parametrize("blind", [False, True], ids=["noted", "blind"])
async def test_an_event_of_its_past_that_kills_a_late_handler_is_dead_after_as_many_crashes(
    tmp_path: Path, blind: bool
) -> None:
    """The watermark is above the handler's whole past, but the notes about it still count."""
    await append(tmp_path)
    assert await start(tmp_path, "healed") == 0
    statuses: list[int] = []
    while len(statuses) < 5 and (not statuses or statuses[-1]):
        statuses.append(await start(tmp_path, "late"))
        for notebook in notebooks(tmp_path) if blind else ():
            notebook.unlink()
    assert statuses == [-9] * (3 if blind else crashes()) + [0]
    assert await answers(tmp_path, "SELECT handler FROM tidings_dead") == ["late"]
    assert await answers(tmp_path, "SELECT count(*) FROM tidings_begun") == [0]
    assert len(await answers(tmp_path, "SELECT n FROM audit")) == len(EVENTS)


async def test_a_clean_end_in_the_middle_of_a_handler_is_no_crash(tmp_path: Path) -> None:
    await append(tmp_path)
    statuses = [await start(tmp_path, kind) for kind in ("session", "leaves", "leaves")]
    assert statuses == [-9, 0, 0]
    assert (tmp_path / "runs").read_text().split() == ["run"] * 3
    assert await answers(tmp_path, "SELECT count(*) FROM tidings_dead") == [0]
    assert await answers(tmp_path, "SELECT active FROM tidings_floors") == [None]


async def test_retried_from_the_dead_letters_it_is_run_again(tmp_path: Path) -> None:
    await append(tmp_path)
    assert [await start(tmp_path, "session") for _ in range(crashes() + 1)] == [-9] * crashes() + [0]
    service = mortal("healed", tmp_path)
    async with embedded(tmp_path, service) as world:
        from tidings.operations.dead import DeadLetters

        letters = DeadLetters(world.running[0].database, service.name, await world.store.log_id())
        (letter,) = await letters.list()
        await letters.retry([letter.id])
        await world.settled()
        assert sorted(n for _, n in await rows(service)) == list(range(60))


async def test_a_process_that_joins_again_in_the_middle_of_a_suspect_still_suspects_it(tmp_path: Path) -> None:
    await append(tmp_path)
    assert [await start(tmp_path, "rejoins") for _ in range(crashes() + 1)] == [-9] * crashes() + [0]
    assert (tmp_path / "runs").read_text().split() == ["run"] * 2 * crashes()
    (reason,) = await answers(tmp_path, "SELECT reason FROM tidings_dead")
    assert str(reason).startswith("ProcessCrashed: 2 times")


async def test_a_handler_that_survives_the_event_does_not_clear_it_for_the_next_one(tmp_path: Path) -> None:
    await append(tmp_path)
    assert [await start(tmp_path, "second") for _ in range(crashes() + 1)] == [-9] * crashes() + [0]
    reasons = await answers(tmp_path, "SELECT reason FROM tidings_dead")
    assert all(str(reason).startswith("ProcessCrashed: 2 times") for reason in reasons)
    handlers = await answers(tmp_path, "SELECT handler FROM tidings_dead")
    assert {"handle", "behind"} <= set(handlers)
    assert await answers(tmp_path, "SELECT count(*) FROM tidings_begun") == [0]


@pytest.mark.sqlite("only a process with its database in a file keeps a notebook beside it")
async def test_resizing_after_a_crash_leaves_no_notebook_behind(tmp_path: Path) -> None:
    await append(tmp_path)
    assert await start(tmp_path, "session") == -9
    assert notebooks(tmp_path)
    async with open_database(database_url(tmp_path, "audit")) as database:
        await resize(database, "audit", 2)
    assert not notebooks(tmp_path)
    assert await start(tmp_path, "leaves") == 0


@pytest.mark.sqlite("a notebook stands beside the database's file")
async def test_what_has_ended_is_in_no_notebook(tmp_path: Path) -> None:
    """Otherwise the next process would suspect the event, or nothing more would be noted."""
    service, under_way, gate = Service("audit", concurrency=2), list[int](), asyncio.Event()

    @service.on(Happened)
    async def handle(event: Happened, context: Context) -> None:
        if event.n == 59:
            under_way.append(context.position)
            await gate.wait()

    async with embedded(tmp_path, service) as world:
        await world.append(*EVENTS)
        await until(lambda: bool(under_way) and len(world.running[0].at_work()) == 1)
        (notebook,) = notebooks(tmp_path)
        assert list(Notebook.read(str(notebook)) or {}) == under_way
        gate.set()
        await world.settled()
        assert Notebook.read(str(notebook)) == {}


PROCESS = "this one"


def succession(service: Service, database: Database, inbox: Inbox, log: UUID, memory: FailureMemory) -> Succession:
    store: Any = None
    site = Site(service, store, None, database, Resources("audit", None), PROCESS, memory)
    return Succession(Joined.of(site, inbox, Lineage(log)))


async def test_who_takes_over_again_after_another_removed_its_notebook_makes_it_anew(tmp_path: Path) -> None:
    service, log, buckets, memory = Service("audit"), uuid4(), range(256), FailureMemory()
    async with open_database(f"sqlite:///{tmp_path}/audit.db") as database:
        inbox = Inbox(database, "audit", log, buckets)
        await inbox.join()
        found = succession(service, database, inbox, log, memory)
        await found.take_over()
        found.notebook.begin(7, 1)
        (notebook,) = notebooks(tmp_path)
        notebook.unlink()  # as another process does, which has read it
        await found.take_over()
        assert Notebook.read(str(notebook)) == {7: 1}
        found.notebook.close()


async def _notes(database: Database, inbox: Inbox) -> dict[int, int]:
    async with database.turn, database.transaction() as connection:  # reading them forgets what is settled
        return await inbox.notes.read(connection)


async def test_joining_again_keeps_suspects_and_notes_and_corrects_the_count_of_what_was_cut_off(
    tmp_path: Path,
) -> None:
    service, log, buckets, memory = Service("audit"), uuid4(), range(256), FailureMemory()
    async with open_database(database_url(tmp_path, "audit")) as database:
        inbox = Inbox(database, "audit", log, buckets)
        await inbox.join()
        async with database.transaction() as connection:  # what a process leaves that crashes
            assert await inbox.occupancy.take(connection, "other") is None
            await inbox.notes.add(connection, {3: (1, 1), 5: (1, 1)})

        def joins() -> Succession:
            return succession(service, database, inbox, log, memory)

        first = joins()
        await first.take_over()
        assert first.caution.suspects == {3, 5}
        first.caution.notes.taken(3, 1)
        async with database.transaction() as connection:
            await inbox.notes.add(connection, {3: first.caution.note(3)})
        assert await _notes(database, inbox) == {3: 2, 5: 1}
        first.notebook.close()
        second = joins()
        await second.take_over()
        assert second.caution.suspects == {3, 5}
        assert second.caution.wants(5)
        assert second.caution.wants(7), "without a notebook of the other process, others are noted, too"
        assert await _notes(database, inbox) == {3: 1, 5: 1}
        second.notebook.close()


async def test_a_takeover_that_was_cut_off_after_its_commit_is_done_again(tmp_path: Path) -> None:
    service, log, buckets, memory = Service("audit"), uuid4(), range(256), FailureMemory()
    async with open_database(database_url(tmp_path, "audit")) as database:
        inbox = Inbox(database, "audit", log, buckets)
        await inbox.join()
        async with database.transaction() as connection:
            await inbox.occupancy.take(connection, "other")
            await inbox.notes.add(connection, {3: (1, 1)})
            await inbox.occupancy.take(connection, PROCESS)
        found = succession(service, database, inbox, log, memory)
        await found.take_over()
        assert found.caution.suspects == {3}
        assert found.caution.wants(7)
        found.notebook.close()


@pytest.mark.parametrize(("at_work", "fenced"), [(None, False), (PROCESS, False), ("other", True)])
async def test_whom_the_bus_has_not_chosen_takes_over_from_nobody_who_is_noted_as_being_at_work(
    tmp_path: Path, at_work: str | None, fenced: bool
) -> None:
    service, log, buckets, memory = Service("audit"), uuid4(), range(256), FailureMemory()
    async with open_database(database_url(tmp_path, "audit")) as database:
        inbox = Inbox(database, "audit", log, buckets)
        await inbox.join()
        async with database.transaction() as connection:
            if at_work is not None:
                await inbox.occupancy.take(connection, at_work)
        found = succession(service, database, inbox, log, memory)
        if fenced:
            with pytest.raises(Fenced, match="another process has begun"):
                await found.take_over(unless_at_work=True)
        else:
            await found.take_over(unless_at_work=True)
        assert await inbox.read_active() == ("other" if fenced else PROCESS)
        found.notebook.close()
