"""A request that comes again with its idempotency key: is it the same request? It only reads.

An event's id is made from the key, so an event with the same id and other data would be lost without a word.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import sqlalchemy as sa
from pydantic_core import to_json
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings._support.json_limits import parse
from tidings.database.staged_events import StagedEvent
from tidings.database.tables import staged
from tidings.delivery.claims import Sought
from tidings.errors import RepetitionDiffers, StoreError
from tidings.modelling.codec import read_metadata
from tidings.stores import EventStore

__all__ = ["check_repetition"]

LOOK_SECONDS: Final = 0.5
"""Seconds that a transaction looks for its events in the log, before it leaves that to the append."""


async def check_repetition(
    connection: AsyncConnection, store: EventStore, service: str, log: str, key: str, rows: Sequence[StagedEvent]
) -> None:
    """Raises `RepetitionDiffers` when an event with one of these ids, but with other data, is staged or in the log.

    The log is read for `LOOK_SECONDS` at most, and not when the store is away.
    """
    ids = [str(identity) for row in rows for identity in row.ids]
    mine = (staged.c.service == service, staged.c.log == log, staged.c.event_id.in_(ids))
    found = await connection.execute(sa.select(staged.c.event_id, staged.c.data, staged.c.metadata).where(*mine))
    waiting = {row.event_id: row for row in found}
    streams = set[str]()
    for row in rows:
        other = next((waiting[str(identity)] for identity in row.ids if str(identity) in waiting), None)
        if other is None:
            streams.add(row.stream)
        else:
            _compare(key, row, other.data, parse(other.metadata).get("schemaVersion"))
    with suppress(StoreError, TimeoutError):
        async with asyncio.timeout(LOOK_SECONDS):
            for stream in sorted(streams):
                missing = [Sought(row) for row in rows if row.stream == stream]
                async for event in store.read_stream(stream, backwards=True):
                    it = next((each for each in missing if each.is_it(event)), None)
                    if it is not None:
                        missing.remove(it)
                        _compare(key, it.row, event.data, read_metadata(event).get("schemaVersion"))
                        if not missing:
                            break


def _compare(key: str, row: StagedEvent, data: bytes, version: object) -> None:
    if data == row.event.data or version != parse(row.event.metadata).get("schemaVersion"):
        return  # what another schema version wrote cannot be compared
    mine, other = parse(row.event.data), parse(data)
    if _canonical(mine) != _canonical(other):
        raise RepetitionDiffers(key, row.stream, row.event.type, str(row.event.id), _differing(mine, other))


def _differing(mine: Any, other: Any) -> list[str]:
    """Return the names of the fields that differ; their values may be secret."""
    if not isinstance(mine, dict) or not isinstance(other, dict):
        return []
    absent = object()
    return sorted(
        name
        for name in mine.keys() | other.keys()
        if _canonical(mine.get(name, absent)) != _canonical(other.get(name, absent))
    )


def _canonical(value: Any) -> Any:
    """Return the value without the order of lists: a set is written in another order each time."""
    if isinstance(value, dict):
        return {name: _canonical(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return sorted((_canonical(inner) for inner in value), key=lambda inner: to_json(_in_order(inner)))
    return value


def _in_order(value: Any) -> Any:
    if isinstance(value, dict):
        return [[name, _in_order(value[name])] for name in sorted(value)]
    return [_in_order(inner) for inner in value] if isinstance(value, list) else value
