"""What is particular to the embedded store: its files, its one writer, what a full disk or a lock does to it."""

# ruff: noqa: ASYNC240 - small files beside the store, in tests

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import closing as closing_now
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from tidings.adapters import open_store
from tidings.errors import ConfigurationError, InvalidStreamName, StoreUnavailable, StreamNotFound, WrongExpectedVersion
from tidings.stores import ANY, NO_STREAM, CaughtUp, EventData, EventStore, Filter
from tidings.stores.sqlite.store import SqliteStore, open_sqlite
from tidings.testing.store_conformance import caught_up, closing, event, events, many, numbers, read, take

pytestmark = pytest.mark.lower_bounds


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def url(path: Path) -> str:
    return f"sqlite:///{path}"


@pytest.fixture
async def store(url: str) -> AsyncIterator[EventStore]:
    store = await open_sqlite(url, busy_timeout=0.2)
    yield store
    await store.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Keep a transaction of another process open."""
    with closing_now(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def writer_of(store: EventStore) -> sqlite3.Connection:
    assert isinstance(store, SqliteStore)
    with store._log.database.writing() as connection:
        return connection


# ---- opening


async def test_three_slashes_are_relative_four_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    async with open_store("sqlite:///here.db") as relative:
        identity = await relative.log_id()
    async with open_store(f"sqlite:///{tmp_path}/here.db") as absolute:
        assert await absolute.log_id() == identity


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite:///log.db?mode=ro", "nothing follows"),
        ("sqlite:///log.db#x", "nothing follows"),
        ("sqlite://log.db", "sqlite:///log.db"),
        ("sqlite:///", "names no file"),
        ("sqlite:///folder/", "names no file"),
        ("sqlite:///:memory:", "memory://name"),
        ("sqlite:log.db", "sqlite:///path"),
        ("memory://a/b", "one plain word"),
        ("postgres:///x", "sqlite:///path"),
    ],
)
async def test_a_url_that_cannot_be_meant_is_refused_with_the_reason(url: str, says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        await open_sqlite(url)


async def test_a_missing_folder_and_a_folder_instead_of_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="no folder"):
        await open_sqlite(f"sqlite:///{tmp_path}/missing/log.db")
    with pytest.raises(StoreUnavailable, match="check that it is a file"):
        await open_sqlite(f"sqlite:///{tmp_path}")


async def test_a_file_that_is_no_database_is_refused_and_left_alone(url: str, path: Path) -> None:
    path.write_bytes(b"certainly not a database\n" * 100)
    with pytest.raises(ConfigurationError, match="not a SQLite database"):
        await open_sqlite(url)
    assert path.read_bytes() == b"certainly not a database\n" * 100


async def test_a_database_of_another_application_is_refused_and_left_alone(url: str, path: Path) -> None:
    with closing_now(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(ConfigurationError, match="another application") as refusal:
        await open_sqlite(url)
    assert str(path) in str(refusal.value)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_a_newer_schema_is_refused(url: str, path: Path) -> None:
    async with open_store(url):
        pass
    with closing_now(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigurationError, match="schema version 99"):
        await open_sqlite(url)


READ_ONLY = """
import asyncio, os, sys
from tidings.errors import StoreUnavailable
from tidings.stores.sqlite.store import open_sqlite

if os.getuid() == 0:  # permissions do not bind root
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
try:
    asyncio.run(open_sqlite(sys.argv[1]))
except StoreUnavailable as error:
    print(error)
"""


@pytest.mark.parametrize("what", ["file", "folder", "new file"])
async def test_what_cannot_be_written_is_found_out_when_opening(what: str) -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        folder, path = Path(name), Path(name) / "log.db"
        if what != "new file":
            async with open_store(f"sqlite:///{path}"):
                pass
            path.chmod(0o444 if what == "file" else 0o666)
        folder.chmod(0o777 if what == "file" else 0o555)
        told = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-c", READ_ONLY, f"sqlite:///{path}"],
            capture_output=True,
            text=True,
            check=True,
        )
        folder.chmod(0o700)
    assert str(path) in told.stdout, told.stderr
    assert "permissions" in told.stdout


async def test_the_identity_is_made_with_the_file_and_kept(url: str, path: Path) -> None:
    async with open_store(url) as store:
        identity = await store.log_id()
        [first] = [found async for found in store.read_all()]
        assert (first.position, first.stream, first.type) == (1, "tidings_log", "tidings_LogCreated")
        assert first.id == identity
        assert await store.head() == 1
    async with open_store(url) as again:
        assert await again.log_id() == identity
    path.unlink()
    async with open_store(url) as other:
        assert await other.log_id() != identity


async def test_opened_many_times_at_once_a_new_file_gets_one_identity(url: str) -> None:
    stores = await asyncio.gather(*(open_sqlite(url) for _ in range(8)))
    identities = {await store.log_id() for store in stores}
    assert len(identities) == 1
    assert isinstance(identities.pop(), UUID)
    for store in stores:
        await store.close()


async def test_a_store_in_memory_is_shared_by_name_and_forgotten_with_its_last_user() -> None:
    name = f"memory://{uuid4().hex}"
    one, two, other = await open_sqlite(name), await open_sqlite(name), await open_sqlite(f"{name}x")
    await one.append("a", events(0), expected=NO_STREAM)
    assert await read(two, "a") == [(0, 0)]
    assert await one.log_id() == await two.log_id() != await other.log_id()
    with pytest.raises(StreamNotFound):
        await read(other, "a")
    async with closing(two.subscribe_stream("a")) as subscription:
        await take(subscription, caught_up)
        await one.append("a", events(1))
        assert numbers(await take(subscription, many(1))) == [1]
    identity = await one.log_id()
    await one.close()
    assert await read(two, "a") == [(0, 0), (1, 1)]
    await two.close()
    again = await open_sqlite(name)
    assert await again.log_id() != identity
    await again.close()
    await other.close()


async def test_opening_may_be_cancelled(url: str) -> None:
    opening = asyncio.ensure_future(open_sqlite(url))
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.gather(opening, return_exceptions=True)
    async with open_store(url) as store:
        assert await store.head() == 1


# ---- durability


async def test_a_commit_is_synchronous_and_goes_to_a_write_ahead_log(store: EventStore) -> None:
    """A test cannot cut the power. SQLite promises durability with these two settings."""
    connection = writer_of(store)
    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


async def test_an_acknowledged_append_is_in_the_file_for_everybody(store: EventStore, path: Path) -> None:
    with closing_now(sqlite3.connect(path)) as other:
        for n in range(10):
            appended = await store.append("a", [event(n)])
            assert other.execute("SELECT max(position) FROM log").fetchone() == (appended.position,)


async def test_appends_that_are_under_way_together_share_commits(store: EventStore) -> None:
    commits: list[str] = []
    writer_of(store).set_trace_callback(lambda statement: commits.append(statement) if statement == "COMMIT" else None)
    await asyncio.gather(*(store.append(f"s-{n}", [event(n)]) for n in range(200)))
    assert len(commits) <= 5


async def test_closing_moves_everything_into_the_file(url: str, path: Path) -> None:
    async with open_store(url) as store:
        await store.append("a", events(0, 1))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


async def test_a_position_is_not_used_again_even_if_its_row_was_removed(url: str, path: Path) -> None:
    async with open_store(url) as store:
        used = (await store.append("a", events(0))).position
    with closing_now(sqlite3.connect(path)) as other:
        other.execute("DELETE FROM log WHERE position = ?", (used,))
        other.commit()
    async with open_store(url) as store:
        assert (await store.append("a", events(1))).position > used


# ---- one writer, many appends


async def test_a_refused_append_does_not_disturb_its_neighbours(store: EventStore) -> None:
    await store.append("a", events(0))
    outcomes = await asyncio.gather(
        *(store.append("a" if n % 2 else f"b-{n}", [event(n)], expected=NO_STREAM) for n in range(20)),
        store.append("", events(1)),
        store.append("c", [EventData("", b"")]),
        store.append("d", [EventData("Big", b"x" * 2_000_000)]),
        store.append("e", [EventData("Happened", "text")]),  # type: ignore[arg-type]
        return_exceptions=True,
    )
    assert [type(outcome).__name__ for outcome in outcomes[:4]] == ["Appended", "WrongExpectedVersion"] * 2
    assert sum(isinstance(outcome, WrongExpectedVersion) for outcome in outcomes) == 10
    assert [type(outcome).__name__ for outcome in outcomes[20:]] == [
        "InvalidStreamName",
        "InvalidStreamName",
        "EventTooLarge",
        "TypeError",
    ]
    assert await read(store, "b-18") == [(0, 18)]


async def test_a_cancelled_append_harms_nobody(store: EventStore) -> None:
    appends = [asyncio.ensure_future(store.append("a", [event(n)])) for n in range(50)]
    await asyncio.sleep(0)
    for append in appends[::2]:
        append.cancel()
    outcomes = await asyncio.gather(*appends, return_exceptions=True)
    assert sum(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes) == 25
    there = numbers([found async for found in store.read_stream("a")])
    assert set(range(1, 50, 2)) <= set(there)
    assert there == sorted(there)
    assert (await store.append("a", [event(99)])).version == len(there)


async def test_another_process_s_lock_is_waited_for_then_named(store: EventStore, path: Path) -> None:
    with locked(path):
        refusals = await asyncio.gather(*(store.append("a", [event(n)]) for n in range(3)), return_exceptions=True)
        for refusal in refusals:
            assert isinstance(refusal, StoreUnavailable)
            assert "Another process holds" in str(refusal)
            assert "waited 0.2 s" in str(refusal)
            assert isinstance(refusal.__cause__, sqlite3.OperationalError)
        assert await store.head() == 1  # reading goes on
        with pytest.raises(StoreUnavailable, match="Another process holds"):
            await open_sqlite(f"sqlite:///{path}", busy_timeout=0.1)
    assert (await store.append("a", events(0))).version == 0


async def test_a_lock_that_is_given_back_in_time_is_not_noticed(url: str, path: Path) -> None:
    async with open_store(url) as store:
        with locked(path):
            append = asyncio.ensure_future(store.append("a", events(0)))
            await store.head()
        assert (await append).version == 0


async def test_a_full_disk_fails_what_does_not_fit_and_is_forgotten_when_there_is_room(store: EventStore) -> None:
    connection = writer_of(store)
    (pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {pages + 20}")
    small = [store.append(f"s-{n}", [event(n)]) for n in range(5)]
    large = store.append("large", [EventData("Big", b"x" * 1_000_000)])
    more = [store.append(f"t-{n}", [event(n)], expected=NO_STREAM) for n in range(5)]
    *fitted, refusal = await asyncio.gather(*small, *more, large, return_exceptions=True)
    assert all(answer.version == 0 for answer in fitted)  # type: ignore[union-attr]
    assert isinstance(refusal, StoreUnavailable)
    assert "full" in str(refusal)
    with pytest.raises(StreamNotFound):
        await read(store, "large")
    connection.execute("PRAGMA max_page_count = 1073741823")
    await store.append("large", [EventData("Big", b"x" * 1_000_000)], expected=NO_STREAM)
    positions = [found.position async for found in store.read_all()]
    assert positions == list(range(1, len(positions) + 1))


async def test_a_stream_s_state_is_learnt_again_after_a_failed_commit(store: EventStore, path: Path) -> None:
    await store.append("a", events(0))
    with locked(path):
        for expected in (ANY, 0):
            with pytest.raises(StoreUnavailable):
                await store.append("a", events(1), expected=expected)
    assert (await store.append("a", events(1), expected=0)).version == 1


async def test_a_corrupt_file_is_reported_as_such(url: str, path: Path) -> None:
    async with open_store(url) as store:
        for n in range(200):
            await store.append(f"s-{n}", [EventData("Happened", b"x" * 500)])
    with path.open("r+b") as file:
        file.seek(4096 * 3)
        file.write(b"\xff" * (path.stat().st_size - 4096 * 3))
    with pytest.raises(StoreUnavailable, match="damaged"):
        await open_sqlite(url)


async def test_damage_that_is_met_while_reading_is_reported_as_such(url: str, path: Path) -> None:
    async with open_store(url) as store:
        for n in range(200):
            await store.append(f"s-{n}", [EventData("Happened", b"x" * 20_000)])
    with path.open("r+b") as file:  # the middle of the file is full of data
        file.seek(path.stat().st_size // 8192 * 4096)
        file.write(b"\xff" * 4096 * 20)
    async with open_store(url) as store:
        with pytest.raises(StoreUnavailable, match="damaged"):
            _ = [found async for found in store.read_all()]
        assert (await store.append("t", events(0))).version == 0


@pytest.mark.parametrize(
    "name", ["nul\0in the middle", "\U0010ffff\U0010ffff", "'; DROP TABLE log; --", "x\ud7ff", "é" * 5_000]
)
async def test_odd_names_are_names(store: EventStore, name: str) -> None:
    for n in range(3):
        await store.append(name, [event(n, name)], expected=n - 1)
    await store.append(name[:-1] + "\ue000", events(9))
    found = [found async for found in store.read_all(filter=Filter(stream_prefixes=(name,), types=(name,)))]
    assert [(e.stream, e.type) for e in found] == [(name, name)] * 3
    assert len(await read(store, name)) == 3
    await store.delete(name)
    with pytest.raises(StreamNotFound):
        await read(store, name)


async def test_what_utf8_cannot_express_is_refused(store: EventStore) -> None:
    for use in (
        store.append("lone \ud800", events(0)),
        store.append("a", [event(0, "\udfff")]),
        read(store, "\ud800"),
        store.get_metadata("\ud800"),
        store.delete("\ud800"),
        take(store.read_all(filter=Filter(types=("\ud800",))), many(1)),
    ):
        with pytest.raises(InvalidStreamName):
            await use


async def test_numbers_beyond_64_bits_are_numbers(store: EventStore) -> None:
    await store.append("a", events(0, 1))
    assert await read(store, "a", start=2**70, backwards=True) == [(1, 1), (0, 0)]
    assert await read(store, "a", start=2**70) == []
    assert await read(store, "a", start=-(2**70)) == [(0, 0), (1, 1)]
    assert await read(store, "a", limit=2**70) == [(0, 0), (1, 1)]
    assert [found async for found in store.read_all(after=2**70)] == []
    assert numbers([e async for e in store.read_all(after=1, limit=2**70)]) == [0, 1]
    with pytest.raises(WrongExpectedVersion):
        await store.append("a", events(0), expected=2**70)
    await store.set_metadata("a", {"$maxCount": 2**70, "$maxAge": 60_000_000_000, "$tb": -5})
    assert await read(store, "a") == [(0, 0), (1, 1)]
    async with closing(store.subscribe_stream("a", after_version=2**70)) as subscription:
        assert await take(subscription, caught_up) == [CaughtUp(await store.head())]


@pytest.mark.parametrize("document", [b"[1]", b"nonsense", b'{"$maxCount": "2", "$tb": true, "$maxAge": 0.5}', b"\xff"])
async def test_metadata_that_makes_no_sense_hides_nothing(store: EventStore, document: bytes) -> None:
    await store.append("a", events(0, 1))
    await store.append("$$a", [EventData("$metadata", document)])
    assert await read(store, "a") == [(0, 0), (1, 1)]


# ---- reading


async def test_a_page_holds_a_bounded_amount_of_memory(store: EventStore) -> None:
    for n in range(60):
        await store.append(f"s-{n % 3}", [EventData("Big", b"x" * 1_000_000)])
    sources: list[AsyncIterator[object]] = [
        store.read_all(),
        store.read_all(backwards=True),
        store.read_stream("s-1", backwards=True),
        store.subscribe_all(),
        store.subscribe_stream("s-2"),
    ]
    for source in sources:
        count = 0
        tracemalloc.start()
        async with closing(source) as reading:
            async for item in reading:
                if isinstance(item, CaughtUp):
                    break
                count += 1
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert count >= 20
        assert peak < 24_000_000


async def test_a_slow_subscriber_misses_nothing_and_holds_nothing(url: str, path: Path) -> None:
    store = await open_sqlite(url)
    async with closing(store.subscribe_all(after=1)) as slow:
        await store.append("a", events(0))
        assert numbers(await take(slow, many(1))) == [0]
        tracemalloc.start()
        for begin in range(1, 5_001, 500):
            await store.append("a", events(*range(begin, begin + 500)))
        held, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert held < 1_000_000
        # Nor does it keep the write-ahead log from being moved into the file.
        connection = writer_of(store)
        assert connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        assert Path(f"{path}-wal").stat().st_size == 0
        assert numbers(await take(slow, many(5_000))) == list(range(1, 5_001))
    await store.close()


async def test_a_busy_event_loop_does_not_starve_a_reader(store: EventStore) -> None:
    """A thread that fetches row by row gives up the interpreter at each row and waits 5 ms to get it back."""
    await store.append("a", events(*range(2_000)))
    reading = asyncio.ensure_future(read(store, "a"))
    turns = 0
    while not reading.done():
        sum(range(500_000))  # some 10 ms
        await asyncio.sleep(0)
        turns += 1
    assert turns < 800, "turns, not seconds: a machine may stand still meanwhile"
    assert len(reading.result()) == 2_000


async def test_a_read_that_is_given_up_leaves_nothing_behind(store: EventStore) -> None:
    await store.append("a", events(*range(1_500)))
    for _ in range(20):
        async for found in store.read_stream("a"):
            if found.version == 3:
                break
        reading = asyncio.ensure_future(read(store, "a"))
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
    assert len(await read(store, "a")) == 1_500


async def test_a_sparse_filter_over_a_long_log_is_read_to_its_end(store: EventStore) -> None:
    for n in range(40):
        await store.append("noise", [EventData("Noise", b"") for _ in range(1_000)])
        if n in (0, 39):
            await store.append("rare", [event(n)])
    rare = Filter(stream_prefixes=("rare",))
    assert numbers([found async for found in store.read_all(filter=rare)]) == [0, 39]
    assert numbers([found async for found in store.read_all(filter=rare, backwards=True)]) == [39, 0]
    assert numbers([found async for found in store.read_all(filter=rare, backwards=True, limit=1)]) == [39]
    async with closing(store.subscribe_all(filter=rare)) as subscription:
        got = await take(subscription, caught_up)
    assert numbers(got) == [0, 39]
    assert len([item for item in got if not hasattr(item, "data")]) > 2  # checkpoints on the way


# ---- closing


async def test_closing_finishes_appends_that_began_and_leaves_no_threads(url: str) -> None:
    before = set(threading.enumerate())
    store = await open_sqlite(url)
    appends = [asyncio.ensure_future(store.append("a", [event(n)])) for n in range(300)]
    await asyncio.sleep(0)
    await asyncio.gather(*(store.close() for _ in range(3)))
    assert [answer.version for answer in await asyncio.gather(*appends)] == list(range(300))
    assert {thread for thread in threading.enumerate() if thread not in before and "sqlite" in thread.name} == set()
    async with open_store(url) as again:
        assert len(await read(again, "a")) == 300


async def test_closing_during_a_read_ends_it_with_an_error(url: str) -> None:
    store = await open_sqlite(url)
    for begin in range(0, 3_000, 1_000):
        await store.append("a", events(*range(begin, begin + 1_000)))
    source = store.read_stream("a")
    await anext(source)
    await store.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        _ = [found async for found in source]


async def test_a_store_belongs_to_its_event_loop(store: EventStore) -> None:
    async def append() -> None:
        await store.append("a", events(0))

    def other_loop() -> None:
        asyncio.run(append())

    with pytest.raises(StoreUnavailable, match="another event loop"):
        await asyncio.to_thread(other_loop)


def test_a_store_in_memory_may_be_used_from_two_event_loops() -> None:
    name = f"memory://{uuid4().hex}"

    async def outer() -> None:
        mine = await open_sqlite(name)

        async def inner() -> int:
            theirs = await open_sqlite(name)
            appended = await theirs.append("a", events(7))
            await theirs.close()
            return appended.version

        async with closing(mine.subscribe_stream("a")) as subscription:
            await take(subscription, caught_up)
            assert await asyncio.to_thread(lambda: asyncio.run(inner())) == 0
            assert numbers(await take(subscription, many(1))) == [7]
        await mine.close()

    asyncio.run(outer())


async def test_a_process_that_forgets_to_close_ends_anyway(url: str) -> None:
    code = (
        "import asyncio, sys\nfrom tidings.stores.sqlite.store import open_sqlite\n"
        "from tidings.stores import EventData\n"
        "async def main():\n    store = await open_sqlite(sys.argv[1])\n"
        "    await store.append('a', [EventData('Happened', b'{\"n\": 1}')])\n"
        "asyncio.run(main())\n"
    )
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", code, url, env=dict(os.environ))
    assert await asyncio.wait_for(child.wait(), 20) == 0
    async with open_store(url) as store:
        assert await read(store, "a") == [(0, 1)]
