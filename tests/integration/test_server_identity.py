"""The log's identity: no way into the server takes it away or writes another one."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from tests.integration.server import STREAMS, appends, batch, connected, message, named, raw
from tidings.server import EventStoreServer
from tidings.server.permissions import closed
from tidings.server.protocol import shared, streams
from tidings.stores.eventstoredb.grpc_call import CallFailed, Status
from tidings.stores.eventstoredb.store import open_eventstoredb

IDENTITY = "tidings_log"


def append(stream: str, type: str, data: bytes) -> tuple[str, list[bytes]]:
    options = streams.AppendReq.Options(stream_identifier=named(stream), any=shared.Empty())
    event = message(streams.AppendReq.ProposedMessage, data, type)
    requests = [streams.AppendReq(options=options), streams.AppendReq(proposed_message=event)]
    return f"{STREAMS}/Append", [request.SerializeToString() for request in requests]


def close(method: str) -> tuple[str, list[bytes]]:
    kind: Any = getattr(streams, f"{method}Req")
    options = kind.Options(stream_identifier=named(IDENTITY), any=shared.Empty())
    return f"{STREAMS}/{method}", [kind(options=options).SerializeToString()]


WAYS = {
    "another identity": append(IDENTITY, "tidings_LogRenewed", b'{"log": "00000000-0000-0000-0000-000000000001"}'),
    "any event": append(IDENTITY, "T", b"{}"),
    "truncated": append(f"$${IDENTITY}", "$metadata", b'{"$tb": 1000}'),
    "kept shortly": append(f"$${IDENTITY}", "$metadata", b'{"$maxAge": 1}'),
    "its metadata truncated": append(f"$$$${IDENTITY}", "$metadata", b'{"$tb": 1000}'),
    "deleted": close("Delete"),
    "tombstoned": close("Tombstone"),
}


@pytest.mark.parametrize("way", WAYS)
async def test_a_server_without_users_lets_nobody_take_the_identity_of_the_log_away(way: str) -> None:
    path, requests = WAYS[way]
    async with EventStoreServer() as server:
        store = await open_eventstoredb(server.uri)
        before = await store.log_id()
        async with connected(server.port) as connection:
            with pytest.raises(CallFailed) as caught:
                await raw(connection, path, *requests)
            assert caught.value.status is Status.PERMISSION_DENIED
        await store.close()
        store = await open_eventstoredb(server.uri)
        assert await store.log_id() == before
        await store.close()


@pytest.mark.parametrize("stream", [IDENTITY, f"$${IDENTITY}", f"$$$${IDENTITY}"])
async def test_neither_does_a_batch_of_appends(stream: str) -> None:
    async with EventStoreServer() as server, connected(server.port) as connection:
        (answer,) = await raw(connection, f"{STREAMS}/BatchAppend", batch(stream))
        assert streams.BatchAppendResp.FromString(answer).error.code == Status.PERMISSION_DENIED
        (answer,) = await raw(connection, f"{STREAMS}/Append", *appends("tidings_logs", b"x"))
        assert streams.AppendResp.FromString(answer).HasField("success")


def test_not_even_administrators_delete_it_and_everybody_may_read_it() -> None:
    for stream in (IDENTITY, f"$${IDENTITY}", f"$$$${IDENTITY}"):
        assert closed("$d", stream)
        assert not closed("$r", stream)
        assert closed("$w", stream) is (stream != IDENTITY)
    assert not closed("$d", "tidings_logs")
