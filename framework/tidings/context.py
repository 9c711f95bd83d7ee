"""What a handler knows about the event it handles, and how it answers: staged events and idempotent changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from uuid import UUID, uuid5

from tidings.codec import CORRELATION, Cause, encode
from tidings.errors import ConfigurationError, EventTooLarge
from tidings.events import Event
from tidings.position import RESERVED
from tidings.stores import APPEND_LIMIT, EventData, RecordedEvent, check_stream_name

if TYPE_CHECKING:
    from tidings.aggregate import Aggregate
    from tidings.repository import Changed, Repository

__all__ = ["Context", "Emission"]

A = TypeVar("A", bound="Aggregate")

_NAMESPACE: Final = UUID("6f0a3f0e-6b0d-5d7e-9d0c-7a1d1b6e5c11")


class Emission(NamedTuple):
    """An event that a handler emitted, on its way to the staged rows."""

    stream: str
    event: EventData


class Context:
    """Injected by annotation. One per event and attempt."""

    __slots__ = ("_count", "attempt", "emissions", "event", "handler", "log", "metadata", "replayed", "service")

    def __init__(
        self,
        service: str,
        handler: str,
        log: UUID,
        event: RecordedEvent,
        metadata: dict[str, Any],
        attempt: int,
        replayed: bool = False,
    ) -> None:
        self.service = service
        self.handler = handler
        self.log = log
        self.event = event
        """The event as the log holds it."""
        self.metadata = metadata
        """The event's whole metadata document, the user's keys among them."""
        self.attempt = attempt
        """1 for the first attempt; counted since the process joined."""
        self.replayed = replayed
        """The service had settled this event before a replay sent it back. False for one that had been held or dead
        until then, because it was never done."""
        self.emissions: list[Emission] = []
        self._count = 0

    @property
    def position(self) -> int:
        return self.event.position

    @property
    def stream(self) -> str:
        return self.event.stream

    @property
    def correlation_id(self) -> str:
        value = self.metadata.get(CORRELATION)
        return value if isinstance(value, str) and value else str(self.event.id)

    @property
    def causation_id(self) -> UUID:
        """Of what this handler does: the id of the event it handles."""
        return self.event.id

    @property
    def cause(self) -> Cause:
        trace = self.metadata.get("traceparent")
        return Cause(
            self.event.id,
            self.correlation_id,
            trace if isinstance(trace, str) else None,
            f"{self.service}.{self.handler}",
        )

    def idempotency_key(self, suffix: str = "") -> str:
        """The same for every attempt of this handler at this event: give it to anything outside the database."""
        return str(self._identity(f"key/{suffix}"))

    def emit(self, stream: str, event: Event, *, metadata: Mapping[str, Any] | None = None) -> UUID:
        """Append `event` to `stream` exactly once, after this handler's transaction has been committed.

        It is staged in that transaction, and leaves in order per bucket of the cause. Returns the id that the event
        will have. Raises at once what could never be appended: `InvalidStreamName`, `EventTooLarge`, `SchemaError`.
        """
        check_stream_name(stream)
        if stream.startswith(RESERVED):
            raise ConfigurationError(
                f"stream {stream!r}: names that begin with '$', 'tidings_' or 'tidings.' are reserved"
            )
        identity = self._next_identity()
        data = encode(event, id=identity, metadata=metadata, cause=self.cause)
        if data.size > APPEND_LIMIT:
            raise EventTooLarge(stream, data.size, APPEND_LIMIT)
        self.emissions.append(Emission(stream, data))
        return identity

    async def change(
        self,
        repository: Repository[A],
        id: str,
        decide: Callable[..., Any],
        *args: Any,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Changed[A]:
        """Decide on an aggregate as a consequence of this event, once however often the handler runs.

        It appends at once, not with the handler's transaction; the ids are the same at every attempt, and what is
        found in the stream since this event is not decided again. Conflicts are decided anew. Raises `StreamNotFound`.
        """
        base = self._next_identity()
        return await repository.change_for(
            self.cause, self.event.position, base, id, decide, *args, metadata=metadata, **kwargs
        )

    def _next_identity(self) -> UUID:
        count, self._count = self._count, self._count + 1
        return self._identity(str(count))

    def _identity(self, what: str) -> UUID:
        return uuid5(_NAMESPACE, f"{self.service}/{self.handler}/{self.log}/{self.event.position}/{what}")
