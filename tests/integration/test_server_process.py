"""The server as a process: what it keeps when it is killed, how it ends, and whom it lets have its database."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from esdbclient import EventStoreDBClient, NewEvent, StreamState

from tests.integration.server import STREAMS, ServerProcess, appends, batch, connected, raw
from tidings.server import EventStoreServer
from tidings.server.protocol import projections, shared, streams
from tidings.stores import ANY, EventData
from tidings.stores.eventstoredb.grpc_call import Call, CallFailed, Status
from tidings.stores.eventstoredb.store import open_eventstoredb
from tidings.stores.sqlite.store import open_sqlite

ANYTHING = StreamState.ANY


@pytest.fixture
def db(tmp_path: Path) -> Path:
    return tmp_path / "log.db"


@pytest.fixture
def clients() -> Iterator[list[EventStoreDBClient]]:
    made: list[EventStoreDBClient] = []
    yield made
    for client in made:
        client.close()


async def test_what_was_acknowledged_survives_kill_9(db: Path) -> None:
    acknowledged: list[tuple[str, int]] = []
    with ServerProcess(db) as server:
        store = await open_eventstoredb(server.uri)
        enough = asyncio.Event()

        async def write(stream: str) -> None:
            while True:
                appended = await store.append(stream, [EventData("T", b"{}")], expected=ANY)
                acknowledged.append((stream, appended.version))
                if len(acknowledged) == 500:
                    enough.set()

        writers = [asyncio.create_task(write(f"s-{n}")) for n in range(20)]
        async with asyncio.timeout(60):
            await enough.wait()
        os.kill(server.process.pid if server.process else 0, signal.SIGKILL)
        for writer in writers:
            writer.cancel()
        await asyncio.gather(*writers, return_exceptions=True)
        await store.close()
    with ServerProcess(db) as server:
        store = await open_eventstoredb(server.uri)
        there = {(event.stream, event.version) async for event in store.read_all()}
        await store.close()
    assert set(acknowledged) <= there


def test_ids_of_any_appends_are_forgotten_at_a_restart_unless_they_are_kept(
    db: Path, clients: list[EventStoreDBClient]
) -> None:
    events = {state: NewEvent("T", b"{}") for state in (StreamState.NO_STREAM, StreamState.ANY, StreamState.EXISTS)}
    counts = []
    for options in ((), (), ("--remember-ids",)):
        with ServerProcess(db, *options) as server:
            client = EventStoreDBClient(server.uri)
            clients.append(client)
            client.append_to_stream("e", current_version=ANYTHING, events=NewEvent("First", b"{}"))
            for state, event in events.items():
                stream = {StreamState.NO_STREAM: "n", StreamState.ANY: "a", StreamState.EXISTS: "e"}[state]
                client.append_to_stream(stream, current_version=state, events=event)
            counts.append([[e.type for e in client.get_stream(s)].count("T") for s in ("n", "a", "e")])
    assert counts == [[1, 1, 1], [1, 2, 2], [1, 2, 2]]


def test_a_second_server_on_the_database_says_so_and_ends(db: Path) -> None:
    with ServerProcess(db) as first:
        second = ServerProcess(db).start()
        says = second.end()
        assert first.process is not None
        assert second.process is not None
        assert second.process.returncode == 3
        assert f"process {first.process.pid}" in says
        assert "Traceback" not in says
    with ServerProcess(db) as third:
        assert third.uri


async def test_the_embedded_store_may_use_the_database_of_a_running_server(db: Path) -> None:
    async with EventStoreServer(db) as server:
        there = await open_eventstoredb(server.uri)
        here = await open_sqlite(f"sqlite:///{db}")
        await here.append("s", [EventData("Here", b"{}")])
        appended = await there.append("s", [EventData("There", b"{}")])
        assert [(event.type, event.position) async for event in there.read_stream("s")] == [
            (event.type, event.position) async for event in here.read_stream("s")
        ]
        assert appended.version == 1
        assert await here.log_id() == await there.log_id()
        await here.close()
        await there.close()


async def test_sigterm_answers_appends_and_ends_subscriptions(db: Path) -> None:
    with ServerProcess(db) as server:
        async with connected(server.port) as connection:
            following = streams.ReadReq.Options(
                all=streams.ReadReq.Options.AllOptions(start=shared.Empty()),
                subscription=streams.ReadReq.Options.SubscriptionOptions(),
                no_filter=shared.Empty(),
                uuid_option=streams.ReadReq.Options.UUIDOption(string=shared.Empty()),
            )
            subscription = await connection.call(f"{STREAMS}/Read")
            subscription.send(streams.ReadReq(options=following).SerializeToString(), end=True)
            assert await subscription.receive()
            with await connection.call(f"{STREAMS}/BatchAppend") as call:
                for n in range(200):
                    call.send(batch(f"s-{n}"))
                first = await call.receive()
                stopping = asyncio.create_task(asyncio.to_thread(server.stop))
                answers = len(first)
                answers += await until_unavailable(call)
                await until_unavailable(subscription)
            assert await stopping == 0
    with closing(sqlite3.connect(db)) as connection_:
        (written,) = connection_.execute("SELECT count(*) FROM log WHERE stream LIKE 's-%'").fetchone()
    assert answers == written


async def until_unavailable(call: Call) -> int:
    """Return how many answers came before the stopping server ended the call."""
    answers = 0
    status = Status.OK
    try:
        while got := await call.receive():
            answers += len(got)
    except CallFailed as error:
        status = error.status
    assert status is Status.UNAVAILABLE
    return answers


async def test_appends_to_a_full_disk_fail_and_the_server_lives_on(db: Path) -> None:
    with ServerProcess(db, size_limit=2048) as server:  # of 512 bytes
        async with connected(server.port) as connection:
            failed = None
            written = 0
            for n in range(200):
                try:
                    await raw(connection, f"{STREAMS}/Append", *appends(f"s-{n}", b"x" * 100_000))
                    written += 1
                except CallFailed as error:
                    failed = error
                    break
            assert failed is not None
            assert failed.status is Status.UNAVAILABLE
            assert "full" in failed.details or "failed" in failed.details
            store = await open_eventstoredb(server.uri)
            assert len([event async for event in store.read_all() if event.stream.startswith("s-")]) == written
            await store.close()


def test_a_database_that_cannot_be_written_is_refused_in_one_line(tmp_path: Path) -> None:
    server = ServerProcess(tmp_path / "nowhere" / "log.db").start()
    says = server.end()
    assert server.process is not None
    assert server.process.returncode == 2
    assert str(tmp_path / "nowhere") in says
    assert "Traceback" not in says


def test_a_database_of_another_application_is_refused(db: Path) -> None:
    with closing(sqlite3.connect(db)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
        connection.commit()
    says = ServerProcess(db).start().end()
    assert "another application" in says


async def test_a_taken_port_is_named(db: Path) -> None:
    second = ServerProcess(db)
    async with EventStoreServer() as server:
        second = ServerProcess(db, port=server.port)
        says = await asyncio.to_thread(lambda: second.start().end())
    assert second.process is not None
    assert second.process.returncode == 3
    assert says.startswith(f"tidings: the server cannot listen at 127.0.0.1:{server.port}: Address already in use")
    assert str(db.name) not in await asyncio.to_thread(os.listdir, db.parent)


def test_without_a_database_nothing_is_served() -> None:
    server = ServerProcess(None, "--db", "also.db").start()
    assert "not both" in server.end()
    assert server.process is not None
    assert server.process.returncode == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_ends_the_server_with_0(db: Path, number: signal.Signals) -> None:
    with ServerProcess(db) as server:
        assert server.process is not None
        server.process.send_signal(number)
        server.end()
        assert server.process.returncode == 0


async def test_a_second_ctrl_c_ends_a_draining_server_at_once_with_130(db: Path) -> None:
    with ServerProcess(db) as server:
        async with connected(server.port) as connection:
            assert server.process is not None
            assert server.process.stderr is not None
            state = await connection.call("/event_store.client.projections.Projections/State")
            create = projections.CreateReq.Options(continuous=projections.CreateReq.Options.Continuous(name="never"))
            path = "/event_store.client.projections.Projections/Create"
            await raw(connection, path, projections.CreateReq(options=create).SerializeToString())
            # EventStoreDB never answers this, so that the drain takes all the time that it may.
            asked = projections.StateReq(options=projections.StateReq.Options(name="never"))
            state.send(asked.SerializeToString(), end=True)
            await raw(connection, f"{STREAMS}/Append", *appends("s", b"{}"))
            server.process.send_signal(signal.SIGINT)
            said = ""
            while "process.stopping" not in said:
                said = await asyncio.to_thread(server.process.stderr.readline)
                assert said
            server.process.send_signal(signal.SIGINT)
            await asyncio.to_thread(server.end)
            assert server.process.returncode == 130


async def test_an_append_of_which_only_a_part_has_come_is_not_written_by_the_drain(db: Path) -> None:
    with ServerProcess(db) as server:
        async with connected(server.port) as connection:
            with await connection.call(f"{STREAMS}/Append") as call:
                call.send(*appends("half", b"1", b"2")[:2])
                await raw(connection, f"{STREAMS}/Append", *appends("whole", b"{}"))  # the part has come before this
                stopping = asyncio.create_task(asyncio.to_thread(server.stop))
                assert await until_unavailable(call) == 0
            assert await stopping == 0
    with closing(sqlite3.connect(db)) as connection_:
        written = connection_.execute("SELECT stream FROM log WHERE stream IN ('half', 'whole')").fetchall()
    assert written == [("whole",)]


async def test_group_checkpoints_survive_kill_9(db: Path, clients: list[EventStoreDBClient]) -> None:
    events = [NewEvent("T", b"%d" % n, content_type="application/octet-stream") for n in range(25)]

    def consumed(uri: str, count: int) -> list[bytes]:
        client = EventStoreDBClient(uri)
        clients.append(client)
        got = []
        with client.read_subscription_to_stream("g", "s") as subscription:
            for event in subscription:
                got.append(event.data)
                subscription.ack(event)
                if len(got) == count:
                    break
        return got

    with ServerProcess(db) as server:
        client = EventStoreDBClient(server.uri)
        clients.append(client)
        client.append_to_stream("s", current_version=ANYTHING, events=events)
        client.create_subscription_to_stream("g", "s", min_checkpoint_count=1, max_checkpoint_count=1)
        first = await asyncio.to_thread(consumed, server.uri, 10)
        async with asyncio.timeout(30):
            while (
                await asyncio.to_thread(client.get_subscription_info, "g", "s")
            ).last_checkpointed_event_position != "9":
                await asyncio.sleep(0.05)
        checkpoints = "$persistentsubscription-s::g-checkpoint"
        async with asyncio.timeout(30):
            while (await asyncio.to_thread(client.get_stream, checkpoints))[-1].data != b'"9"':
                await asyncio.sleep(0.05)
        server.kill()
    with ServerProcess(db) as server:
        second = await asyncio.to_thread(consumed, server.uri, 15)
    assert first + second == [event.data for event in events]
