"""Events as the rows of a service's database keep them, held and dead ones alike. It runs no statement."""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa

from tidings.protocol.position import partition_key
from tidings.stores import RecordedEvent

__all__ = ["columns_of", "key_of", "recorded"]

KEY_BYTES: Final = 1000
"""Bytes of a partition key that a row keeps as they are: longer ones fit into no index of PostgreSQL."""


def key_of(event: RecordedEvent, own: Mapping[str, Any] | None = None) -> str:
    """Return the event's partition key as rows have it; `own` is as for `partition_key`.

    A key that is too long, or that no database can hold, ends with a digest of the whole, so that no other key has the
    same text by chance.
    """
    name = partition_key(event, own)
    if len(name) <= KEY_BYTES // 4 and name.isascii() and "\0" not in name:  # nearly always
        return name
    key: str = _plain(name)
    if key == name and (len(key) <= KEY_BYTES // 4 or len(key.encode()) <= KEY_BYTES):
        return key
    digest = sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
    return f"{key.encode()[:KEY_BYTES].decode(errors='ignore')}...{digest}"


def _plain(value: Any) -> Any:
    """Return a text without NUL and lone surrogates, in the form that keys in older databases have."""
    if not isinstance(value, str) or (value.isascii() and "\0" not in value):
        return value
    return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def columns_of(event: RecordedEvent) -> dict[str, Any]:
    """Return the columns from which `recorded` makes the event again."""
    return {
        "position": event.position,
        "version": event.version,
        "ticks": event.ticks,
        "event_id": str(event.id),
        "stream": event.stream,
        "type": event.type,
        "data": event.data,
        "metadata": event.metadata,
        "is_json": event.is_json,
    }


def recorded(row: sa.Row[Any]) -> RecordedEvent:
    """Return the event that a held or dead row keeps."""
    return RecordedEvent(
        row.position,
        row.stream,
        row.version,
        row.type,
        row.data,
        row.metadata,
        row.is_json,
        UUID(row.event_id).bytes,
        row.ticks,
    )
