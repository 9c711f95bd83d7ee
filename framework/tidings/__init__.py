"""Tidings: event-driven microservices in which nothing is lost, each effect happens once, in order, and provably.

Importing this is light: adapters, SQLAlchemy and web frameworks are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tidings.aggregate import Aggregate, evolves, stream_version
from tidings.context import Context
from tidings.events import Event, partition_key, schema_version, upcaster, wire_name
from tidings.handlers import Hold, Retry
from tidings.repository import Changed, HistoryEntry, Repository
from tidings.service import Service
from tidings.stores import ANY, NO_STREAM, STREAM_EXISTS, EventData, EventStore, RecordedEvent

if TYPE_CHECKING:
    from tidings.connection import connect
    from tidings.relay import Relay
    from tidings.runtime import Runtime
    from tidings.settings import Settings, open_bus, open_store

__all__ = [
    "ANY",
    "NO_STREAM",
    "STREAM_EXISTS",
    "Aggregate",
    "Changed",
    "Context",
    "Event",
    "EventData",
    "EventStore",
    "HistoryEntry",
    "RecordedEvent",
    "Relay",
    "Repository",
    "Hold",
    "Retry",
    "Runtime",
    "Service",
    "Settings",
    "connect",
    "evolves",
    "open_bus",
    "open_store",
    "partition_key",
    "schema_version",
    "stream_version",
    "upcaster",
    "wire_name",
]

__version__ = "0.1.0"

_LATER = {
    "connect": "tidings.connection",
    "Relay": "tidings.relay",
    "Runtime": "tidings.runtime",
    "Settings": "tidings.settings",
    "open_bus": "tidings.settings",
    "open_store": "tidings.settings",
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
