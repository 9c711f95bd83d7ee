"""EventStoreDB's generated messages and client, from whichever of esdbclient and kurrentdbclient is installed.

It never defines a message itself. Both register the same message names with protobuf, so that only one of them can be
imported in a process; esdbclient is taken where both could be found.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Final

__all__ = ["CLIENT", "PROTOS", "AsyncClient", "StreamState", "shared_pb2", "streams_pb2"]

CLIENT: Final = "kurrentdbclient" if importlib.util.find_spec("esdbclient") is None else "esdbclient"
"""The package that the messages come from."""
PROTOS: Final = "esdbclient.protos.Grpc" if CLIENT == "esdbclient" else "kurrentdbclient.protos.v1"
"""Where in it they are."""

if TYPE_CHECKING:
    # The two differ in names alone, so one stands for both.
    from esdbclient import AsyncEventStoreDBClient as AsyncClient
    from esdbclient import StreamState
    from esdbclient.protos.Grpc import shared_pb2, streams_pb2
else:
    try:
        _client = importlib.import_module(CLIENT)
    except ModuleNotFoundError as error:
        if error.name != CLIENT:
            raise
        # Either will do: the scheme of the URL decides which extra is named.
        either = "kurrentdbclient or esdbclient"
        raise ModuleNotFoundError(f"There is no module {either}", name=either) from None
    AsyncClient = _client.AsyncEventStoreDBClient if CLIENT == "esdbclient" else _client.AsyncKurrentDBClient
    StreamState = _client.StreamState
    shared_pb2 = importlib.import_module(f"{PROTOS}.shared_pb2")
    streams_pb2 = importlib.import_module(f"{PROTOS}.streams_pb2")
