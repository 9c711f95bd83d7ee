"""Dead letters: what a service gave up, whole, with the reason. Nothing here begins or commits a transaction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.scope import Scope
from tidings.database.staged_events import StagedEvent
from tidings.protocol.message import Message
from tidings.stores import JSON, RecordedEvent

__all__ = ["DeadLetters", "Letter"]

_ADD: Final = tables.dead.insert()


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter: what was given up, whole, and why."""

    kind: str
    reason: str
    attempts: int = 0
    detail: str | None = None
    handler: str | None = None
    position: int | None = None
    bucket: int | None = None
    version: int | None = None
    ticks: int | None = None
    event_id: str | None = None
    stream: str | None = None
    type: str | None = None
    data: bytes | None = None
    metadata: bytes | None = None
    is_json: bool | None = None
    key: str | None = None
    holds_key: bool = False
    """Later events of the same partition key are held until this letter is retried or dropped."""
    line: str = ""
    """The handler's."""
    replayed: bool = False
    """It failed when a replay ran it again."""

    @classmethod
    def of_event(
        cls,
        event: RecordedEvent,
        bucket: int,
        *,
        key: str,
        holds_key: bool,
        handler: str,
        line: str = "",
        attempts: int,
        reason: str,
        detail: str | None,
        replayed: bool = False,
    ) -> Letter:
        return cls(
            "handler",
            reason,
            attempts,
            detail,
            handler,
            event.position,
            bucket,
            event.version,
            event.ticks,
            str(event.id),
            event.stream,
            event.type,
            event.data,
            event.metadata,
            event.is_json,
            key,
            holds_key,
            line,
            replayed,
        )

    @classmethod
    def of_message(cls, message: Message, reason: str) -> Letter:
        """A message that is not ours or cannot be read: its headers go into the detail, its body into the data."""
        headers = {str(name): repr(value)[:1000] for name, value in list(message.headers.items())[:64]}
        return cls(
            "message",
            reason,
            detail=f"message id {message.message_id!r}, headers {headers}",
            type=message.type[:1000] or None,
            data=message.body,
            is_json=message.content_type == JSON,
        )

    @classmethod
    def of_staged(cls, row: StagedEvent, attempts: int, reason: str) -> Letter:
        return cls(
            "staged",
            reason,
            attempts,
            position=row.cause,
            bucket=row.bucket,
            event_id=str(row.event.id),
            stream=row.stream,
            type=row.event.type,
            data=row.event.data,
            metadata=row.event.metadata,
            is_json=row.event.content_type == JSON,
        )


class DeadLetters:
    """The dead letters of a service, about one log."""

    def __init__(self, scope: Scope) -> None:
        self._own = scope.own

    async def add(self, connection: AsyncConnection, letters: Iterable[Letter]) -> None:
        """Keep what was given up."""
        now = datetime.now(UTC)
        rows: list[dict[str, Any]] = [
            self._own | {name: getattr(letter, name) for name in Letter.__slots__} | {"died_at": now}
            for letter in letters
        ]
        if rows:
            await connection.execute(_ADD, rows)
