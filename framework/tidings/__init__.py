"""Tidings: event-driven microservices. Nothing is lost, each effect happens once and in order, and that can be proved.

Importing it is cheap: each name is imported when it is used, and so are adapters, SQLAlchemy and web frameworks.

The public names are those in this module and in `tidings.errors`, `.settings`, `.stores`, `.buses`, `.logs`, `.server`,
`.alembic` and `.testing`. Everything else is internal and may change with any version.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tidings._support.lazy import lazily

if TYPE_CHECKING:
    from tidings.adapters import open_bus, open_store
    from tidings.hosting.probes import health_routes
    from tidings.hosting.runtime import Runtime
    from tidings.modelling.aggregate import Aggregate, evolves, stream_version
    from tidings.modelling.context import Context
    from tidings.modelling.events import Event, partition_key, schema_version, upcaster, wire_name
    from tidings.modelling.handlers import Hold, Retry
    from tidings.modelling.repository import Changed, HistoryEntry, Repository
    from tidings.operations.checking import verify
    from tidings.operations.report import Report, ServiceReport
    from tidings.producing.connection import BlockingLog, Log, connect
    from tidings.relay.relay import Relay
    from tidings.service import Service
    from tidings.settings import Settings
    from tidings.stores import ANY, NO_STREAM, STREAM_EXISTS, EventData, EventStore, RecordedEvent, StreamAppend

__all__ = [
    "ANY",
    "NO_STREAM",
    "STREAM_EXISTS",
    "Aggregate",
    "BlockingLog",
    "Changed",
    "Context",
    "Event",
    "EventData",
    "EventStore",
    "HistoryEntry",
    "Hold",
    "Log",
    "RecordedEvent",
    "Relay",
    "Report",
    "Repository",
    "Retry",
    "Runtime",
    "Service",
    "ServiceReport",
    "Settings",
    "StreamAppend",
    "connect",
    "evolves",
    "health_routes",
    "open_bus",
    "open_store",
    "partition_key",
    "schema_version",
    "stream_version",
    "upcaster",
    "verify",
    "wire_name",
]

__version__ = "0.2.0"

__getattr__, __dir__ = lazily(
    globals(),
    {
        "modelling.aggregate": ("Aggregate", "evolves", "stream_version"),
        "producing.connection": ("BlockingLog", "Log", "connect"),
        "modelling.context": ("Context",),
        "modelling.events": ("Event", "partition_key", "schema_version", "upcaster", "wire_name"),
        "modelling.handlers": ("Hold", "Retry"),
        "relay.relay": ("Relay",),
        "modelling.repository": ("Changed", "HistoryEntry", "Repository"),
        "hosting.probes": ("health_routes",),
        "hosting.runtime": ("Runtime",),
        "operations.checking": ("verify",),
        "operations.report": ("Report", "ServiceReport"),
        "service": ("Service",),
        "adapters": ("open_bus", "open_store"),
        "settings": ("Settings",),
        "stores": ("ANY", "NO_STREAM", "STREAM_EXISTS", "EventData", "EventStore", "RecordedEvent", "StreamAppend"),
    },
)
