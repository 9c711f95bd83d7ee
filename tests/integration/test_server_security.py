"""TLS, users and access: who gets in, who gets what, and that passwords are nowhere to be read."""

from __future__ import annotations

import asyncio
import json
import ssl
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from esdbclient import EventStoreDBClient, NewEvent, StreamState
from esdbclient.exceptions import AccessDeniedError, GrpcError

from tests.integration.server import ServerProcess, in_thread
from tidings.errors import ConfigurationError
from tidings.server import EventStoreServer
from tidings.server.budgets import Allowance, Limits, Treasury
from tidings.server.logins import Logins, hashed
from tidings.server.refusals import Refusal
from tidings.server.security import Access
from tidings.stores import EventData
from tidings.stores.eventstoredb.store import open_eventstoredb
from tidings.stores.sqlite.store import open_sqlite


def event() -> NewEvent:
    return NewEvent("T", b"{}")


def attempt(server: EventStoreServer, user: str, action: Callable[[EventStoreDBClient], object]) -> str:
    """Return the outcome of a call: `ok`, or the status."""
    assert server.certificate is not None
    uri = f"esdb://{user}@localhost:{server.port}"
    client = EventStoreDBClient(uri, root_certificates=Path(server.certificate).read_text())
    try:
        action(client)
    except GrpcError as error:
        return str(error).partition("StatusCode.")[2].partition("\n")[0]
    finally:
        client.close()
    return "ok"


def files_of(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def append_to(stream: str) -> Callable[[EventStoreDBClient], object]:
    return lambda client: client.append_to_stream(stream, current_version=StreamState.ANY, events=event(), timeout=10)


def append_many_to(stream: str) -> Callable[[EventStoreDBClient], object]:
    return lambda client: client.append_to_stream(
        stream, current_version=StreamState.ANY, events=[event(), event()], timeout=10
    )


def read_all(client: EventStoreDBClient) -> object:
    return list(client.read_all(timeout=10))


async def test_the_default_users_are_eventstoredbs_own() -> None:
    async with EventStoreServer(tls=True) as server:
        seen = [
            await in_thread(attempt, server, user, action)
            for user, action in (
                ("admin:changeit", append_to("s")),
                ("admin:changeit", append_to("$s")),
                ("admin:changeit", read_all),
                ("ops:changeit", append_to("s")),
                ("ops:changeit", append_to("$s")),
                ("ops:changeit", read_all),
                ("ops:changeit", lambda client: client.create_subscription_to_stream("g", "s")),
                ("admin:wrong", append_to("s")),
                ("nobody:changeit", append_to("s")),
            )
        ]
    denied, unknown = "PERMISSION_DENIED", "UNAUTHENTICATED"
    assert seen == ["ok", "ok", "ok", "ok", denied, denied, "ok", unknown, unknown]


async def test_who_gives_no_credentials_gets_nothing() -> None:
    from tests.integration.server import STREAMS, appends, raw
    from tidings.stores.eventstoredb.grpc import Address, Connection
    from tidings.stores.eventstoredb.grpc_call import CallFailed, Status

    async with EventStoreServer(tls=True) as server:
        context = ssl.create_default_context(cafile=server.certificate)
        context.set_alpn_protocols(["h2"])
        connection = await Connection.open(Address("localhost", server.port, context))
        with pytest.raises(CallFailed) as caught:
            await raw(connection, f"{STREAMS}/Append", *appends("s", b"x"))
        assert caught.value.status is Status.PERMISSION_DENIED
        assert caught.value.trailers["exception"] == "access-denied"
        await connection.close()


async def test_an_access_list_lets_in_and_keeps_out() -> None:
    users = {"admin": "one", "relay": "two"}
    async with EventStoreServer(tls=True, users=users) as server:

        def grant(stream: str, **lists: object) -> Callable[[EventStoreDBClient], object]:
            access = {f"${name}": value for name, value in lists.items()}
            return lambda client: client.set_stream_metadata(
                stream, metadata={"$acl": access}, current_version=StreamState.ANY
            )

        assert await in_thread(attempt, server, "relay:two", read_all) == "PERMISSION_DENIED"
        assert await in_thread(attempt, server, "admin:one", grant("$all", r=["relay"])) == "ok"
        assert await in_thread(attempt, server, "relay:two", read_all) == "ok"
        assert await in_thread(attempt, server, "relay:two", append_many_to("s")) == "ok"
        assert await in_thread(attempt, server, "admin:one", grant("s", w="$admins")) == "ok"
        assert await in_thread(attempt, server, "relay:two", append_to("s")) == "PERMISSION_DENIED"

        def refused_in_a_batch(client: EventStoreDBClient) -> None:
            with pytest.raises(AccessDeniedError):
                append_many_to("s")(client)

        assert await in_thread(attempt, server, "relay:two", refused_in_a_batch) == "ok"


async def test_users_outlive_the_server_and_their_passwords_are_not_in_the_database(tmp_path: Path) -> None:
    db = tmp_path / "log.db"
    secret = "a-very-particular-secret"
    async with EventStoreServer(db, tls=True, users={"admin": secret, "clerk": secret}) as server:
        certificate = server.certificate
        assert await in_thread(attempt, server, f"clerk:{secret}", append_to("s")) == "ok"
    assert not [file for file in files_of(tmp_path) if secret.encode() in file.read_bytes()]
    async with EventStoreServer(db, tls=True, users={"admin": "another"}) as server:
        assert server.certificate == certificate
        assert await in_thread(attempt, server, f"clerk:{secret}", append_to("s")) == "ok"
        assert await in_thread(attempt, server, "admin:another", append_to("s")) == "ok"
        assert await in_thread(attempt, server, f"admin:{secret}", append_to("s")) == "UNAUTHENTICATED"


async def test_beyond_this_machine_default_passwords_are_refused(tmp_path: Path) -> None:
    db = tmp_path / "log.db"
    with pytest.raises(ConfigurationError, match="needs users"):
        async with EventStoreServer(db, host="0.0.0.0", tls=True):
            pass
    async with EventStoreServer(db, tls=True):
        pass
    with pytest.raises(ConfigurationError, match="default password"):
        async with EventStoreServer(db, host="0.0.0.0", tls=True):
            pass
    async with EventStoreServer(db, host="0.0.0.0", tls=True, users={"admin": "one", "ops": "two"}) as server:
        assert await in_thread(attempt, server, "admin:one", append_to("s")) == "ok"


@pytest.mark.parametrize("password", ["changeit", "p@ss:/w?rd#%"])
async def test_the_adapter_connects_with_tls(password: str) -> None:
    async with EventStoreServer(tls=True, users={"admin": password}) as server:
        store = await open_eventstoredb(f"{server.uri}?tlsCaFile={server.certificate}")
        await store.append("s", [EventData("T", b"{}")])
        assert [found.type async for found in store.read_stream("s")] == ["T"]
        await store.close()


async def test_a_certificate_is_for_its_owner_alone(tmp_path: Path) -> None:
    async with EventStoreServer(tmp_path / "log.db", tls=True):
        key = tmp_path / "log.db-tls" / "server.key"
        assert key.stat().st_mode & 0o077 == 0


async def test_files_that_are_no_certificate_are_named(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("nonsense")
    with pytest.raises(ConfigurationError, match=r"wrong\.pem"):
        async with EventStoreServer(certificate=str(wrong), key=str(wrong)):
            pass


def test_the_process_takes_users_from_the_environment_and_shows_no_password() -> None:
    for secret in ("one-secret", "one@with-signs:/in?it"):
        with ServerProcess(None, "--tls", users=f"admin:{secret}") as server:
            assert secret.rpartition("@")[2] not in server.said
            assert "server.crt" in server.said
    for users in ("admin", ":x", "admin:"):
        assert "TIDINGS_SERVER_USERS" in ServerProcess(None, "--tls", users=users).start().end()


def test_the_process_listens_elsewhere_only_when_told_so() -> None:
    assert "say insecure" in ServerProcess(None, "--host", "0.0.0.0").start().end()
    with ServerProcess(None, "--host", "0.0.0.0", "--insecure") as server:
        assert server.port


async def test_a_user_that_is_disabled_while_its_login_waits_does_not_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    goes_on, turn = asyncio.Event(), Logins._turn

    async def late(self: Logins, *args: Any) -> None:
        await goes_on.wait()
        await turn(self, *args)

    def written(disabled: bool) -> EventData:
        salt = b"s" * 16
        document = {
            "loginName": "bob",
            "groups": [],
            "salt": b64encode(salt).decode(),
            "hash": b64encode(hashed("secret", salt)).decode(),
            "disabled": disabled,
        }
        return EventData("$UserUpdated", json.dumps(document).encode())

    monkeypatch.setattr(Logins, "_turn", late)
    store = await open_sqlite("memory://")
    try:
        access, treasury = Access(store, open=False), Treasury(Limits(), users=True)
        await store.append("$users", [EventData("$User", b"bob", content_type="application/octet-stream")])
        await store.append("$user-bob", [written(False)])
        await access.load({}, default=False)
        header = {"authorization": f"Basic {b64encode(b'bob:secret').decode()}"}
        waits = asyncio.create_task(access.authenticate(header, Allowance(treasury), False))
        await asyncio.sleep(0)
        await store.append("$user-bob", [written(True)])
        async with asyncio.timeout(30):
            while await access._current("bob") is not None:
                await asyncio.sleep(0.01)
        goes_on.set()
        with pytest.raises(Refusal, match="Unauthenticated"):
            await waits
    finally:
        await store.close()
