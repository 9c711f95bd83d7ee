"""A `Context` for a test that calls a handler itself: it keeps what the handler emits, as events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from tidings.modelling.codec import read_metadata
from tidings.modelling.context import Context
from tidings.modelling.events import Event
from tidings.stores import RecordedEvent
from tidings.testing.scenario.stating import Emitted, data_of, home_of

__all__ = ["RecordingContext", "recorded"]

LOG: Final = UUID("7e57ab1e-0000-4000-8000-000000000001")
"""Id of the log that a context belongs to, if a test calls a handler itself."""
TICKS: Final = 12_912_480_000_000_000
"""When an event was recorded, if nothing says otherwise: 2010-12-02 in units of 100 ns since 1970."""


def recorded(
    event: Event | RecordedEvent,
    *,
    stream: str | None = None,
    version: int = 0,
    position: int = 1,
    metadata: Mapping[str, Any] | None = None,
) -> RecordedEvent:
    """Return an event as a log would hold it, without a log."""
    if isinstance(event, RecordedEvent):
        return event
    data = data_of(event, metadata)
    home = stream or home_of(event)
    return RecordedEvent(position, home, version, data.type, data.data, data.metadata, True, data.id.bytes, TICKS)


class RecordingContext(Context):
    """A `Context` for calling a handler directly: `await reserve(event, RecordingContext(event), session)`.

    It checks what `emit` is given as in production, and keeps it in `emitted`. Nothing is appended anywhere.
    """

    __slots__ = ("emitted",)

    def __init__(
        self,
        event: Event | RecordedEvent,
        *,
        stream: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        service: str = "service",
        handler: str = "handler",
        log: UUID = LOG,
        attempt: int = 1,
        replayed: bool = False,
        was: tuple[str, ...] = (),
    ) -> None:
        """Begin an attempt at `event`. `metadata` are the producer's own keys."""
        found = recorded(event, stream=stream, metadata=metadata)
        super().__init__(service, handler, log, found, read_metadata(found), attempt, replayed, was)
        self.emitted: list[Emitted] = []
        """What the handler has emitted, oldest first."""

    @property
    def events(self) -> list[Event]:
        """The emitted events without their streams, oldest first."""
        return [each.event for each in self.emitted if isinstance(each.event, Event)]

    def emit(self, stream: str, event: Event, *, metadata: Mapping[str, Any] | None = None) -> UUID:
        """Do what `Context.emit` does, and keep the event in `emitted`."""
        identity = super().emit(stream, event, metadata=metadata)
        self.emitted.append(Emitted(stream, event, dict(metadata or {})))
        return identity
