"""Access lists where somebody might go around them: through links, `$all`, Tidings' own streams, a disabled user."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from esdbclient import EventStoreDBClient, NewEvent, StreamState
from esdbclient.exceptions import AccessDeniedError, GrpcError

from tests.integration.server import ServerProcess, in_thread
from tidings.errors import ConfigurationError
from tidings.server import EventStoreServer, Limits
from tidings.stores import EventData
from tidings.stores.eventstoredb.store import open_eventstoredb
from tidings.stores.sqlite.store import open_sqlite

USERS = {"admin": "Adm1n-long", "bob": "B0b-long", "relay": "R3lay-long"}
DENIED, UNKNOWN, EXHAUSTED = "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED"


@pytest.fixture
async def server() -> AsyncIterator[EventStoreServer]:
    async with EventStoreServer(tls=True, users=USERS, services=["relay"]) as server:
        yield server


def as_user(server: EventStoreServer, user: str, password: str = "") -> EventStoreDBClient:
    assert server.certificate is not None
    uri = f"esdb://{user}:{password or USERS[user]}@localhost:{server.port}"
    return EventStoreDBClient(uri, root_certificates=Path(server.certificate).read_text())


async def asked(
    server: EventStoreServer, user: str, action: Callable[[EventStoreDBClient], Any], password: str = ""
) -> Any:
    """Return the answer to a user, or the status of the refusal."""

    def ask() -> Any:
        client = as_user(server, user, password)
        try:
            return action(client)
        except AccessDeniedError:
            return DENIED
        except GrpcError as error:
            return str(error).partition("StatusCode.")[2].partition("\n")[0]
        finally:
            client.close()

    return await in_thread(ask)


def append(stream: str, *events: NewEvent) -> Callable[[EventStoreDBClient], Any]:
    return lambda client: bool(
        client.append_to_stream(
            stream, current_version=StreamState.ANY, events=list(events) or [NewEvent("T", b"{}")], timeout=20
        )
    )


def link(target: str) -> NewEvent:
    return NewEvent("$>", target.encode(), content_type="application/octet-stream")


def only(*users: str) -> Callable[[EventStoreDBClient], Any]:
    names = list(users)
    access = {"$acl": dict.fromkeys(("$r", "$w", "$d", "$mr", "$mw"), names)}
    return lambda client: client.set_stream_metadata("secret-1", metadata=access, current_version=StreamState.ANY)


async def with_a_secret(server: EventStoreServer) -> None:
    assert await asked(server, "admin", append("secret-1", NewEvent("T", b'{"salary": 1}')))
    assert await asked(server, "admin", only("admin")) is None
    assert await asked(server, "admin", append("public-1", NewEvent("T", b'{"public": 1}')))
    links = [link(target) for target in ("0@secret-1", "0@$user-admin", "0@$$secret-1", "0@public-1")]
    assert await asked(server, "bob", append("bob-links", *links))


async def test_a_link_shows_nobody_what_he_may_not_read(server: EventStoreServer) -> None:
    await with_a_secret(server)

    def read(client: EventStoreDBClient) -> list[str]:
        return [event.stream_name for event in client.get_stream("bob-links", resolve_links=True, timeout=20)]

    assert await asked(server, "bob", read) == ["public-1"]
    assert await asked(server, "admin", read) == ["secret-1", "$user-admin", "$$secret-1", "public-1"]

    def follow(client: EventStoreDBClient) -> list[str]:
        with client.subscribe_to_stream("bob-links", resolve_links=True, timeout=20) as subscription:
            seen = []
            for event in subscription:
                seen.append(event.stream_name)
                if event.stream_name == "public-1":
                    return seen
        return seen

    assert await asked(server, "bob", follow) == ["public-1"]
    assert await asked(server, "admin", only("admin", "bob")) is None
    assert await asked(server, "bob", read) == ["secret-1", "public-1"]


async def test_a_category_shows_nobody_what_he_may_not_read(server: EventStoreServer) -> None:
    await with_a_secret(server)

    def read(client: EventStoreDBClient) -> list[str]:
        names = []
        for category in ("$ce-secret", "$ce-public"):
            names += [event.stream_name for event in client.get_stream(category, resolve_links=True, timeout=20)]
        return names

    def open_categories(client: EventStoreDBClient) -> None:
        read(client)
        for category in ("$ce-secret", "$ce-public"):
            client.set_stream_metadata(category, metadata={"$acl": {"$r": "$all"}}, current_version=StreamState.ANY)

    assert await asked(server, "bob", read) == DENIED
    assert await asked(server, "admin", open_categories) is None
    assert await asked(server, "bob", read) == ["public-1"]
    assert await asked(server, "admin", read) == ["secret-1", "public-1"]


async def test_a_persistent_subscription_shows_each_consumer_what_he_may_read(server: EventStoreServer) -> None:
    await with_a_secret(server)

    def create(client: EventStoreDBClient) -> None:
        client.create_subscription_to_stream("g", "bob-links", from_end=False, resolve_links=True, timeout=20)

    def consume(client: EventStoreDBClient) -> list[bytes]:
        with client.read_subscription_to_stream("g", "bob-links", timeout=20) as subscription:
            seen: list[bytes] = []
            for event in subscription:
                seen.append(event.data)
                subscription.ack(event)
                if len(seen) == 4 or b"public" in event.data:
                    return seen
        return seen

    assert await asked(server, "admin", create) is None
    data = await asked(server, "bob", consume)
    assert b'{"public": 1}' in data
    assert not [each for each in data if b"salary" in each or b"hash" in each]


async def test_a_service_reads_all_without_being_an_administrator(server: EventStoreServer) -> None:
    def read(client: EventStoreDBClient) -> list[str]:
        return [event.stream_name for event in client.read_all(filter_exclude=(), timeout=20)]

    assert await asked(server, "bob", append("s"))
    assert await asked(server, "bob", read) == DENIED
    seen = await asked(server, "relay", read)
    assert "s" in seen
    assert not [name for name in seen if name.startswith(("$user", "$$$user"))]
    assert "$user-admin" in await asked(server, "admin", read)
    assert await asked(server, "relay", append("$s")) == DENIED
    assert await asked(server, "relay", lambda client: list(client.get_stream("$user-admin"))) == DENIED


async def test_a_relay_and_a_service_work_as_a_user_that_reads_all(server: EventStoreServer) -> None:
    uri = f"esdb://relay:{USERS['relay']}@localhost:{server.port}?tlsCaFile={server.certificate}"
    store = await open_eventstoredb(uri)
    try:
        assert await store.log_id()
        await store.append("s", [EventData("T", b"{}")])
        assert "s" in [event.stream async for event in store.read_all()]
        await store.append("tidings_relay-main", [EventData("tidings_Checkpoint", b'{"position": 1}')])
        await store.set_metadata("tidings_relay-main", {"$maxCount": 2})
        values = (await store.get_metadata("tidings_relay-main")).values
        assert values["$maxCount"] == 2
        assert values["$acl"]["$w"] == ["relay", "$admins"]
    finally:
        await store.close()
    assert await asked(server, "bob", append("tidings_relay-main")) == DENIED
    assert (
        await asked(
            server, "relay", lambda client: client.delete_stream("tidings_relay-main", current_version=StreamState.ANY)
        )
        == DENIED
    )


async def test_nobody_but_administrators_touches_the_identity_of_the_log(server: EventStoreServer) -> None:
    for user in ("bob", "relay"):
        for action in (
            append("tidings_log"),
            append("$$tidings_log", NewEvent("$metadata", b"{}")),
            lambda client: client.tombstone_stream("tidings_log", current_version=StreamState.ANY, timeout=20),
            lambda client: client.delete_stream("tidings_log", current_version=StreamState.ANY, timeout=20),
        ):
            assert await asked(server, user, action) == DENIED
        assert len(await asked(server, user, lambda client: client.get_stream("tidings_log", timeout=20))) == 1
    access = (await asked(server, "admin", lambda client: client.get_stream_metadata("tidings_log")))[0]["$acl"]
    assert (access["$w"], access["$d"], access["$mw"]) == (["$admins"], ["$admins"], ["$admins"])
    assert await asked(server, "bob", append("tidings_relay-main")) == DENIED


async def test_not_even_a_server_without_users_lets_the_identity_of_the_log_be_deleted() -> None:
    async with EventStoreServer() as server:

        def end(client: EventStoreDBClient) -> None:
            for close in (client.tombstone_stream, client.delete_stream):
                with pytest.raises(GrpcError, match="PERMISSION_DENIED"):
                    close("tidings_log", current_version=StreamState.ANY, timeout=20)

        def with_client() -> None:
            with EventStoreDBClient(server.uri) as client:
                end(client)

        await in_thread(with_client)
        store = await open_eventstoredb(server.uri)
        assert await store.log_id()
        await store.close()


async def test_a_user_who_is_disabled_is_out_at_once_and_after_a_restart(tmp_path: Path) -> None:
    db = tmp_path / "log.db"

    def disable(client: EventStoreDBClient) -> None:
        document = json.loads(client.get_stream("$user-bob", timeout=20)[-1].data) | {"disabled": True}
        append("$user-bob", NewEvent("$UserUpdated", json.dumps(document).encode()))(client)

    async with EventStoreServer(db, tls=True, users=USERS) as server:
        assert await asked(server, "bob", append("s"))
        assert await asked(server, "admin", disable) is None
        while (said := await asked(server, "bob", append("s"))) is True:
            pass  # a user who was looked up a moment ago is not looked up again
        assert said == UNKNOWN
    async with EventStoreServer(db, tls=True, users={"bob": "another"}) as server:
        assert await asked(server, "bob", append("s")) == UNKNOWN
        assert await asked(server, "bob", append("s"), "another") == UNKNOWN
        assert await asked(server, "admin", append("s"))


async def test_a_user_who_is_deleted_or_whose_password_changes_is_out(tmp_path: Path) -> None:
    db = tmp_path / "log.db"
    async with EventStoreServer(db, tls=True, users=USERS) as server:
        assert await asked(server, "bob", append("s"))
        store = await open_sqlite(f"sqlite:///{db}")
        await store.tombstone("$user-bob")
        await store.close()
        while (said := await asked(server, "bob", append("s"))) is True:
            pass
        assert said == UNKNOWN


async def test_statistics_ask_for_a_user(server: EventStoreServer) -> None:
    import ssl

    from tests.integration.server import raw
    from tidings.server.protocol import projections, shared
    from tidings.stores.eventstoredb.grpc import Address, Connection
    from tidings.stores.eventstoredb.grpc_call import CallFailed, Status

    context = ssl.create_default_context(cafile=server.certificate)
    context.set_alpn_protocols(["h2"])
    connection = await Connection.open(Address("localhost", server.port, context))
    options = projections.StatisticsReq.Options(all=shared.Empty())
    requests: dict[str, Any] = {
        "projections.Projections/Statistics": projections.StatisticsReq(options=options),
        "projections.Projections/State": projections.StateReq(),
        "projections.Projections/Result": projections.ResultReq(),
        "monitoring.Monitoring/Stats": shared.Empty(),
    }
    for path, request in requests.items():
        with pytest.raises(CallFailed) as caught:
            await raw(connection, f"/event_store.client.{path}", request.SerializeToString())
        assert caught.value.status is Status.PERMISSION_DENIED, path
    assert await raw(connection, "/event_store.client.gossip.Gossip/Read", b"")
    await connection.close()
    statistics = await asked(
        server, "bob", lambda client: client.get_projection_statistics(name="$by_category", timeout=20)
    )
    assert statistics.name == "$by_category"


async def test_wrong_passwords_end_the_connection_and_then_the_user_waits() -> None:
    limits = Limits(failed_logins=3, user_failed_logins=4)
    async with EventStoreServer(tls=True, users=USERS, limits=limits) as server:
        assert await asked(server, "admin", append("s"))
        said = [await asked(server, "bob", append("s"), f"guess-{n}") for n in range(8)]
        assert said[:2] == [UNKNOWN, UNKNOWN]
        assert EXHAUSTED in said
        assert await asked(server, "admin", append("s")), "whose password was right before is let in"
        assert server.treasury.refused["user_failed_logins"]


async def test_a_service_must_be_a_user_and_users_need_tls() -> None:
    with pytest.raises(ConfigurationError, match="no such user"):
        async with EventStoreServer(tls=True, users={"admin": "x"}, services=["relay"]):
            pass
    with pytest.raises(ConfigurationError, match="add tls"):
        EventStoreServer(services=["relay"])


def test_the_process_takes_services_and_limits(tmp_path: Path) -> None:
    db = tmp_path / "log.db"
    users = "admin:Adm1n-long,relay:R3lay-long"
    with ServerProcess(db, "--tls", "--service", "relay", "--limit", "streams=7", users=users) as server:
        assert server.port
        for path in tmp_path.rglob("*"):
            assert path.suffix == ".crt" or path.stat().st_mode & 0o077 == 0, path
    for wrong in ("streams", "streams=x", "nonsense=1", "streams=0", "stalled_seconds=nan", "stalled_seconds=inf"):
        assert "--limit" in ServerProcess(None, "--limit", wrong).start().end()
