"""What would end the process of an EventStoreDB server is refused before anything of it is sent."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from tests.integration.eventstoredb import opened
from tidings.errors import InvalidMetadata, InvalidStreamName, StreamDeleted
from tidings.server import EventStoreServer
from tidings.stores import EventData
from tidings.stores.eventstoredb.store import EventStoreDB
from tidings.testing.store_conformance import events

HARM: dict[str, tuple[type[Exception], Callable[[EventStoreDB], Awaitable[object]]]] = {
    "append to $$": (InvalidStreamName, lambda store: store.append("$$", events(1))),
    "metadata of nothing": (InvalidStreamName, lambda store: store.set_metadata("", {"k": 1})),
    "metadata of $$": (InvalidStreamName, lambda store: store.append("$$$$", [EventData("$metadata", b"{}")])),
    "max age": (InvalidMetadata, lambda store: store.set_metadata("s", {"$maxAge": 60_000_000_001})),
    "max age, appended": (
        InvalidMetadata,
        lambda store: store.append("$$s", [EventData("$metadata", b'{"$maxAge":99999999999}')]),
    ),
    "metadata of a tombstoned stream": (StreamDeleted, lambda store: store.set_metadata("gone", {"k": 1})),
    "the same, appended": (
        StreamDeleted,
        lambda store: store.append("$$gone", [EventData("$metadata", b"{}")]),
    ),
    "delete a metadata stream": (InvalidStreamName, lambda store: store.delete("$$s")),
    "tombstone a metadata stream": (InvalidStreamName, lambda store: store.tombstone("$$s")),
    "delete that of a tombstoned stream": (InvalidStreamName, lambda store: store.delete("$$gone")),
}


@pytest.mark.parametrize("harm", HARM)
async def test_it_is_refused_before_it_is_sent(harm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with EventStoreServer() as server, opened(server.port) as store:
        await store.append("s", events(0))
        await store.append("gone", events(0))
        await store.tombstone("gone")

        def sent(*_: object, **__: object) -> None:
            raise AssertionError(f"{harm} was sent")

        monkeypatch.setattr(store._appends, "submit", sent)
        for operation in ("delete_stream", "tombstone_stream"):
            monkeypatch.setattr(store._leader.client, operation, sent)
        error, use = HARM[harm]
        with pytest.raises(error):
            await use(store)
