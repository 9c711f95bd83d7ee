"""Restoring from real files: the log, a service's database, or both. Nothing that a backup holds is lost, and nothing
is done again."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.databases import database_url
from tests.integration.embedded import (
    Followed,
    Happened,
    World,
    auditing,
    count,
    embedded,
    emitting,
    followed,
    letters,
    rows,
    until,
)
from tests.integration.served import open_log
from tidings import Hold, Retry, Service
from tidings.database.engine import open_database
from tidings.database.lineage import NothingToAdopt, adopt, lineage_of, renew
from tidings.database.tables import dead, held
from tidings.errors import LogBehind, LogChanged
from tidings.operations.backups import BackupRefused, read, restore, take
from tidings.operations.recount import Recount, recount
from tidings.stores import EventStore

pytestmark = pytest.mark.postgresql
FILES = pytest.mark.sqlite("the backup of a service's SQLite file")


def events(*numbers: int) -> list[Happened]:
    return [Happened(key=f"k{n % 3}", n=n) for n in numbers]


def files(folder: Path, *names: str) -> dict[str, Path]:
    """Copy the services before the log."""
    return {name: folder / f"{name}.db" for name in names}


async def run(folder: Path, service: Service, *more: Happened) -> tuple[list[int], list[int], World]:
    """Return what was handled, and what was emitted according to the log, when everything is settled."""
    async with embedded(folder, service) as world:
        await world.append(*more)
        await world.settled()
        return [n for _, n in await rows(service)], sorted(n for _, n in await followed(world.store)), world


async def new_identity(folder: Path, *services: str) -> None:
    """Do what `tidings log renew-identity` and `tidings log adopt` do."""
    async with open_log(folder) as store:
        await renew(store)
        await _follow(folder, store, *services)


async def _follow(folder: Path, store: EventStore, *services: str) -> None:
    lineage = await lineage_of(store)
    for name in services:
        async with open_database(database_url(folder, name)) as database:
            await adopt(database, name, lineage)


async def recounted(folder: Path, store: EventStore) -> Recount:
    """Return what `tidings verify --deep` prints."""
    service = emitting()
    async with open_database(database_url(folder, service.name)) as database:
        return await recount(store, [(service, database)])


async def test_a_log_older_than_the_services_goes_on_under_a_new_identity(tmp_path: Path) -> None:
    await run(tmp_path, emitting(), *events(0, 1, 2))
    take(tmp_path / "kept", files(tmp_path, "log"))
    await run(tmp_path, emitting(), *events(3, 4, 5))
    restore(read(tmp_path / "kept"), files(tmp_path, "log"), overwrite=True)
    with pytest.raises(LogBehind, match="tidings log renew-identity"):
        await run(tmp_path, emitting())
    async with open_log(tmp_path) as store:
        await renew(store)
    with pytest.raises(LogChanged, match="tidings log adopt"):
        await run(tmp_path, emitting())
    async with open_log(tmp_path) as store:
        await _follow(tmp_path, store, "audit")
        with pytest.raises(NothingToAdopt):
            await _follow(tmp_path, store, "audit")
        assert (await recounted(tmp_path, store)).wrong == []
    handled, emitted, _ = await run(tmp_path, emitting(), *events(6, 7, 8))
    async with open_log(tmp_path) as store:
        assert (await recounted(tmp_path, store)).ok
    assert sorted(handled) == list(range(9)), "the events that the log lost had their effects; the new ones have theirs"
    assert emitted == [0, 1, 2, 6, 7, 8]


@FILES
async def test_a_service_older_than_the_log_reads_what_it_lacks_and_emits_nothing_twice(tmp_path: Path) -> None:
    await run(tmp_path, emitting(), *events(0, 1, 2))
    take(tmp_path / "kept", files(tmp_path, "audit"))
    await run(tmp_path, emitting(), *events(3, 4, 5))
    restore(read(tmp_path / "kept"), files(tmp_path, "audit"), overwrite=True)
    handled, emitted, _ = await run(tmp_path, emitting(), *events(6))
    assert sorted(handled) == sorted(emitted) == list(range(7))


@FILES
async def test_both_from_one_backup_with_the_service_older_emit_nothing_twice_under_the_new_identity(
    tmp_path: Path,
) -> None:
    """The service was copied first, and the log went on: events that are handled again emit the same ids."""
    await run(tmp_path, emitting(), *events(0, 1, 2))
    take(tmp_path / "first", files(tmp_path, "audit"))
    await run(tmp_path, emitting(), *events(3, 4, 5))
    take(tmp_path / "second", files(tmp_path, "log"))
    await run(tmp_path, emitting(), *events(6, 7, 8))
    restore(read(tmp_path / "first"), files(tmp_path, "audit"), overwrite=True)
    restore(read(tmp_path / "second"), files(tmp_path, "log"), overwrite=True)
    await new_identity(tmp_path, "audit")
    handled, emitted, world = await run(tmp_path, emitting(), *events(9, 10, 11))
    assert sorted(handled) == sorted(emitted) == [0, 1, 2, 3, 4, 5, 9, 10, 11]
    assert world is not None


async def test_twice_restored_a_service_of_long_ago_still_follows(tmp_path: Path) -> None:
    await run(tmp_path, emitting(), *events(0, 1))
    take(tmp_path / "old", files(tmp_path, "log"))
    for n in (2, 3):
        await run(tmp_path, emitting(), *events(n))
        restore(read(tmp_path / "old"), files(tmp_path, "log"), overwrite=True)
        await new_identity(tmp_path, "audit")
        take(tmp_path / f"log{n}", files(tmp_path, "log"))
        (tmp_path / "old" / "backup.json").write_text((tmp_path / f"log{n}" / "backup.json").read_text())
        (tmp_path / f"log{n}" / "00-log.db").replace(tmp_path / "old" / "00-log.db")
    async with open_log(tmp_path) as store:
        assert len((await lineage_of(store)).former) == 2
    handled, emitted, _ = await run(tmp_path, emitting(), *events(4))
    assert Counter(handled) == Counter([0, 1, 2, 3, 4])
    assert emitted == [0, 1, 4]


async def test_another_log_is_not_adopted(tmp_path: Path) -> None:
    await run(tmp_path, auditing(), *events(0))
    (tmp_path / "log.db").unlink()
    async with open_log(tmp_path) as store:
        with pytest.raises(LogChanged):
            await _follow(tmp_path, store, "audit")


async def test_held_and_dead_events_that_the_log_lost_are_kept_as_dead_letters(tmp_path: Path) -> None:
    def failing(name: str, hold: Hold | None) -> Service:
        service = Service(name)

        @service.on(Happened, retry=Retry(attempts=1, hold=hold))
        async def fails(event: Happened) -> None:
            if event.n < 10:
                raise ValueError("no")

        service.on(Followed)(_nothing)
        return service

    later = Hold(attempts=5, delay=3600.0, maximum=3600.0)
    async with embedded(tmp_path, failing("held", later), failing("dead", None)) as world:
        await world.append(Followed(key="x"))
        await world.settled()
    take(tmp_path / "kept", files(tmp_path, "log"))
    services = failing("held", later), failing("dead", None)
    async with embedded(tmp_path, *services) as world:
        await world.append(Happened(key="k"))

        async def done() -> bool:
            return await count(services[0], held) == 1 and await count(services[1], dead) == 1

        await until(done)
    restore(read(tmp_path / "kept"), files(tmp_path, "log"), overwrite=True)
    await new_identity(tmp_path, "held", "dead")
    services = failing("held", later), failing("dead", None)
    async with embedded(tmp_path, *services) as world:
        await world.append(Happened(key="k", n=10))
        await world.settled()
        for service in services:
            (letter,) = await letters(service)
            assert (letter.kind, letter.position, letter.holds_key) == ("message", None, False)
            assert letter.reason.startswith("lost: its event was above position")
            assert letter.reason.endswith("ValueError: no")


async def _nothing(event: Followed) -> None:
    """Nothing to do."""


# ---- the files ----------------------------------------------------------------------------


@FILES
async def test_a_backup_is_taken_amid_traffic_and_is_of_one_moment_each(tmp_path: Path) -> None:
    service = emitting()
    async with embedded(tmp_path, service) as world:
        for start in range(0, 60, 20):
            await world.append(*events(*range(start, start + 20)))
            take(tmp_path / f"kept{start}", files(tmp_path, "audit", "log"))
        await world.settled()
    other = tmp_path / "other"
    other.mkdir()
    restore(read(tmp_path / "kept20"), files(other, "audit", "log"))
    await new_identity(other, "audit")
    handled, emitted, _ = await run(other, emitting(), *events(100))
    assert sorted(handled) == sorted(emitted) == [*range(40), 100]


HOLD = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("SELECT * FROM log").fetchone()
print(1, flush=True)
input()
"""


@FILES
async def test_a_running_database_is_never_replaced(tmp_path: Path) -> None:
    await run(tmp_path, auditing(), *events(0))
    take(tmp_path / "kept", files(tmp_path, "log"))
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-c", HOLD, str(tmp_path / "log.db"))
    other = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
    assert other.stdout is not None
    await other.stdout.readline()
    with pytest.raises(BackupRefused, match=f"is open in process {other.pid}: stop it"):
        restore(read(tmp_path / "kept"), files(tmp_path, "log"), overwrite=True)
    await other.communicate(b"\n")
    with pytest.raises(BackupRefused, match="say --overwrite"):
        restore(read(tmp_path / "kept"), files(tmp_path, "log"))
    restore(read(tmp_path / "kept"), files(tmp_path, "log"), overwrite=True)
    assert (tmp_path / "log.db.before-restore-1").exists()


@FILES
@pytest.mark.parametrize("harm", ["list", "bytes", "missing", "unfinished"])
async def test_a_damaged_backup_is_refused_before_anything_is_changed(tmp_path: Path, harm: str) -> None:
    await run(tmp_path, auditing(), *events(0))
    kept = take(tmp_path / "kept", files(tmp_path, "audit", "log"))
    path = kept.folder / kept.kept[1].file
    if harm == "list":
        (kept.folder / "backup.json").write_text("{")
    elif harm == "unfinished":
        (kept.folder / "backup.json").unlink()
    elif harm == "missing":
        path.unlink()
    else:
        content = bytearray(path.read_bytes())
        content[5000] ^= 1
        path.write_bytes(content)
    with pytest.raises(BackupRefused):
        read(tmp_path / "kept")
    with pytest.raises(BackupRefused, match="not empty"):
        take(tmp_path / "kept", files(tmp_path, "log"))
    with closing(sqlite3.connect(tmp_path / "log.db")) as connection:
        assert connection.execute("SELECT count(*) FROM log").fetchone()[0] > 0
