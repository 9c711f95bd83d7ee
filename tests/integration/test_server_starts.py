"""The server starts whatever lies in its log: what it cannot read is named, and the rest works."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from esdbclient import EventStoreDBClient, NewEvent, StreamState
from structlog.testing import capture_logs

from tests.integration.server import in_thread
from tidings.server import EventStoreServer
from tidings.stores import EventData
from tidings.stores.sqlite.store import open_sqlite

SOUND = {"stream": "s", "group": "sound", "start": 0, "began": -1}
GARBAGE: list[bytes] = [
    b"",
    b"\xff\xfe",
    b"[]",
    b"{}",
    b"[" * 100_000,
    b'{"salt": "\xc3\xa9", "hash": "YWI="}',
    b'{"salt": "YWI=", "hash": "not base64!"}',
    b'{"salt": 7, "hash": null, "groups": 9}',
    b'{"salt": "YWI=", "hash": "YWI=", "groups": [["$admins"]], "disabled": "no"}',
    b'{"entries": 7, "projections": 7}',
    b'{"entries": [7, null, {}, {"stream": 7}], "projections": [7, null, {}, {"name": 7}, {"nonsense": 1}]}',
    json.dumps(
        {"entries": [SOUND | {"strategy": "?"}, SOUND | {"prefixes": "x"}, SOUND | {"pattern": "(a+)+\\1"}]}
    ).encode(),
    b'{"$acl": 7, "$maxAge": -1, "$tb": "x"}',
]
STREAMS = [
    "$users",
    "$user-odd",
    "$user-admin",
    "$persistentSubscriptionConfig",
    "$projections-$all",
    "$projections-$links-checkpoint",
    "$$$scavenges",
    "$$tidings_log",
    "$$$all",
]


async def works(db: Path, users: dict[str, str]) -> list[str]:
    """Start the server, let an administrator append, and return what was logged."""
    with capture_logs() as logs:
        async with EventStoreServer(db, tls=True, users=users, projections=True) as server:
            uri = f"esdb://root:{users['root']}@localhost:{server.port}"

            def append() -> None:
                assert server.certificate is not None
                certificate = Path(server.certificate).read_text()
                with EventStoreDBClient(uri, root_certificates=certificate) as client:
                    client.append_to_stream("s", current_version=StreamState.ANY, events=NewEvent("T", b"{}"))

            await in_thread(append)
    return [str(entry["event"]) for entry in logs]


@pytest.mark.parametrize("garbage", range(len(GARBAGE)))
async def test_the_server_starts_whatever_lies_in_its_streams(tmp_path: Path, garbage: int) -> None:
    db = tmp_path / "log.db"
    store = await open_sqlite(f"sqlite:///{db}")
    for stream in STREAMS:
        await store.append(stream, [EventData("T", GARBAGE[garbage])])
    await store.append("$users", [EventData("$User", name) for name in (b"odd", b"root", b"\xff", b"x" * 5000)])
    await store.close()
    assert "user.unreadable" in await works(db, {"root": "R00t-long", "odd": "Odd-long"}) or garbage == 8


async def test_the_server_starts_when_its_streams_are_closed_for_ever(tmp_path: Path) -> None:
    db = tmp_path / "log.db"
    store = await open_sqlite(f"sqlite:///{db}")
    for stream in ("$users", "$user-odd", "$scavenges", "$persistentSubscriptionConfig", "$projections-$all", "$all"):
        await store.append(stream, [EventData("T", b"{}")])
        await store.tombstone(stream)
    await store.close()
    assert "user.closed" in await works(db, {"root": "R00t-long", "odd": "Odd-long"})


async def test_who_cannot_be_read_cannot_log_in_and_is_named(tmp_path: Path) -> None:
    db = tmp_path / "log.db"
    async with EventStoreServer(db, tls=True, users={"root": "R00t-long", "odd": "Odd-long"}):
        pass
    store = await open_sqlite(f"sqlite:///{db}")
    await store.append("$user-odd", [EventData("$UserUpdated", '{"salt": "é", "hash": "YWI="}'.encode())])
    await store.close()
    with capture_logs() as logs:
        async with EventStoreServer(db, tls=True, users={"root": "R00t-long"}) as server:
            assert server.certificate is not None
    (named,) = [entry for entry in logs if entry["event"] == "user.unreadable"]
    assert named["user"] == "odd"
    assert "TIDINGS_SERVER_USERS" in named["advice"]


async def test_a_group_beside_one_that_cannot_be_read_works(tmp_path: Path) -> None:
    db = tmp_path / "log.db"
    store = await open_sqlite(f"sqlite:///{db}")
    document = {"entries": [SOUND | {"group": "odd", "start": "x"}, SOUND]}
    await store.append("$persistentSubscriptionConfig", [EventData("$PersistentConfig", json.dumps(document).encode())])
    await store.append("s", [EventData("T", b"{}")])
    await store.close()

    def consume(uri: str) -> list[str]:
        with EventStoreDBClient(uri) as client:
            with client.read_subscription_to_stream("sound", "s", timeout=30) as subscription:
                next(subscription)
            return [group.group_name for group in client.list_subscriptions()]

    with capture_logs() as logs:
        async with EventStoreServer(db) as server:
            assert await in_thread(consume, server.uri) == ["sound"]
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["group.unreadable"]
