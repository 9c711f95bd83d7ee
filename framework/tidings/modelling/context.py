"""What a handler knows about its event, and how it answers: staged events and idempotent changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, Concatenate, Final, NamedTuple, TypeVar
from uuid import UUID, uuid5
from weakref import ref

from tidings.errors import AttemptEnded, ConfigurationError, EventTooLarge
from tidings.modelling.codec import CORRELATION, Cause, encode
from tidings.modelling.events import Event
from tidings.protocol.identity import UNKEYED, IdKeys, digest
from tidings.protocol.position import RESERVED
from tidings.stores import APPEND_LIMIT, EventData, RecordedEvent, check_stream_name, check_text

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

    from tidings.modelling.aggregate import Aggregate
    from tidings.modelling.repository import Changed, Repository

__all__ = ["ATTEMPT", "Context", "Emission"]

A = TypeVar("A", bound="Aggregate")

_NAMESPACE: Final = UUID("6f0a3f0e-6b0d-5d7e-9d0c-7a1d1b6e5c11")
_NO_ID: Final = UUID(int=0)
"""Id of an event whose number among those of its kind is not known yet."""


_ENDING: Final = Lock()
"""Lock for adding an emission and for ending an attempt: an event from a thread is part of the attempt, or refused."""


class Emission(NamedTuple):
    """An event that a handler emitted, on its way to the staged rows."""

    stream: str
    event: EventData


class Context:
    """The event and the attempt of a handler, injected by annotation.

    It ends with the attempt: then `emit` and `change` raise `AttemptEnded`, but the facts about the event can be read.
    """

    __slots__ = (
        "_counts",
        "_ended",
        "_keys",
        "_mortal",
        "_open",
        "_waited",
        "_waits_since",
        "_was",
        "_works_on",
        "aliases",
        "attempt",
        "emissions",
        "event",
        "handler",
        "log",
        "metadata",
        "replayed",
        "service",
    )

    def __init__(
        self,
        service: str,
        handler: str,
        log: UUID,
        event: RecordedEvent,
        metadata: dict[str, Any],
        attempt: int,
        replayed: bool = False,
        was: tuple[str, ...] = (),
        keys: IdKeys = UNKEYED,
    ) -> None:
        """Begin an attempt. `was` are former names of the handler, oldest first; `keys` make ids."""
        self.service = service
        self.handler = handler
        self.log = log
        self.event = event
        """The event as the log holds it."""
        self.metadata = metadata
        """The event's metadata, including the producer's own keys."""
        self.attempt = attempt
        """Number of this attempt, from 1; starts again when the process rejoins."""
        self.replayed = replayed
        """Whether the event was settled before and a replay runs it again. False for one that was held or dead until
        then, because it was never handled."""
        self.emissions: list[Emission] = []
        self.aliases: dict[UUID, tuple[UUID, ...]] = {}
        """Id of an emitted event to the ids that it would have under the handler's other names and with other keys, if
        there are any."""
        self._was = was
        self._keys = keys
        self._counts: dict[tuple[str, ...], int] | None = None  # most attempts need none
        self._ended = ""
        """How the attempt ended; empty while it is under way."""
        self._mortal: tuple[Callable[[], object], ...] = ()
        self._works_on: ref[object] | None = None
        self._open: Callable[[Context], AbstractAsyncContextManager[AsyncSession]] | None = None
        self._waited = 0.0
        """Seconds that the attempt has waited for its transaction."""
        self._waits_since: float | None = None

    def end(self, how: str) -> None:
        """End the attempt and what was injected for it. `how` continues "the handler ...". Later calls do nothing."""
        with _ENDING:
            if self._ended:
                return
            self._ended = how
            # What was injected knows the context: left to each other, they would wait for the garbage collector.
            mortal, self._mortal, self._open = self._mortal, (), None
        for end in mortal:
            end()

    def ends_with(self, end: Callable[[], object]) -> None:
        """Call this when the attempt ends."""
        self._mortal = (*self._mortal, end)

    def works_on(self, connection: object) -> None:
        """Note the connection through which the attempt writes, and which it shares with the rest of its group."""
        self._works_on = ref(connection)

    @property
    def works(self) -> bool:
        """Whether the attempt has a transaction."""
        return self._works_on is not None

    def opens(self, open: Callable[[Context], AbstractAsyncContextManager[AsyncSession]]) -> None:
        """Have `session` answered by this, which is given the attempt."""
        self._open = open

    def waits(self, now: float, waits: bool) -> None:
        """Note that the attempt waits for its transaction from now on, or no longer."""
        if self._waits_since is not None:
            self._waited += now - self._waits_since
        self._waits_since = now if waits else None

    def waited(self, now: float) -> float:
        """Return the seconds for which the attempt has waited for its transaction: they do not count as its own."""
        return self._waited if self._waits_since is None else self._waited + now - self._waits_since

    def session(self) -> AbstractAsyncContextManager[AsyncSession]:
        """Enter the service's database late: `async with context.session() as session`.

        The handler may wait for other systems before, side by side with others, and without a connection. From here to
        its end it is part of a transaction, as with an injected session, and what it writes happens exactly once. So
        enter it last. What is pending is flushed at the end of the block. Raises `AttemptEnded` as `emit` does, and
        `ConfigurationError` outside a service.
        """
        opening = self._open
        self.check_alive("context.session()")
        if opening is None:
            raise ConfigurationError("context.session() works while a service runs the handler; here, nobody does")
        return opening(self)

    def check_statement(self, connection: object) -> None:
        """Raise `AttemptEnded` for a statement on the group's connection after the end, however the handler got hold of
        it."""
        if self._ended and self._works_on is not None and self._works_on() is connection:
            self.check_alive("a connection of its group")

    def check_alive(self, used: str) -> None:
        """Raise `AttemptEnded` if the attempt is over; `used` names what was used."""
        if self._ended:
            raise AttemptEnded(used, self.handler, self.event.position, self.event.id, self._ended)

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
        """The causation id of everything that this handler does: the id of its event."""
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

    @property
    def _names(self) -> tuple[str, ...]:
        """The handler's names. The first one makes new ids; events emitted under any of them are not emitted again."""
        return (*self._was, self.handler)

    def idempotency_key(self, suffix: str = "") -> str:
        """Return a key that is the same for every attempt of this handler at this event, also after a rename with
        `was`.

        Pass it to systems outside the database. `suffix` distinguishes several calls of one handler. No secret is part
        of it, because another system could not recognise the key that it was given before the secret changed.
        """
        name = self._names[0]
        return str(uuid5(_NAMESPACE, f"{self.service}/{name}/{self.log}/{self.event.position}/key/{suffix}"))

    def emit(self, stream: str, event: Event, *, metadata: Mapping[str, Any] | None = None) -> UUID:
        """Append `event` to `stream` exactly once, after this handler's transaction has been committed.

        It is staged in that transaction, and events leave in order per bucket of their cause. Returns the event's id:
        the n-th event of a type that the handler emits to a stream has the same id at every attempt and in every
        replay, whatever else is emitted, in whatever order. Raises `InvalidStreamName`, `EventTooLarge`, `SchemaError`
        or `ConfigurationError` at once for an event that could never be appended, and `AttemptEnded` after the handler
        has ended, as in a task that it left behind.
        """
        self.check_alive("context.emit()")
        check_stream_name(stream)
        check_text(stream)
        if stream.startswith(RESERVED):
            raise ConfigurationError(
                f"stream {stream!r}: names that begin with '$', 'tidings_' or 'tidings.' are reserved"
            )
        data = encode(event, id=_NO_ID, metadata=metadata, cause=self.cause)
        if data.size > APPEND_LIMIT:
            raise EventTooLarge(stream, data.size, APPEND_LIMIT)
        with _ENDING:
            self.check_alive("context.emit()")
            identity, *others = self._next("emit", stream, data.type)
            self.emissions.append(Emission(stream, replace(data, id=identity)))
        if others:
            self.aliases[identity] = tuple(others)
        return identity

    async def change(
        self,
        repository: Repository[A],
        id: str,
        decide: Callable[[A], Any] | Callable[Concatenate[A, ...], Any],
        *args: Any,
        metadata: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Changed[A]:
        """Change an aggregate as a consequence of this event, once, however often the handler runs.

        The events are appended immediately, not with the handler's transaction. Their ids are the same at every
        attempt, and a decision whose events are in the stream already is not made again. After a conflict the decision
        runs again. Several changes of one aggregate by one decision are told apart by their order alone: make them in
        the same order each time. Raises `StreamNotFound`, `Contention`, and `AttemptEnded` as `emit` does.
        """
        self.check_alive("context.change()")
        bases = self._next("change", repository.stream_of(id), name_of(decide))
        return await repository.change_for(
            self.cause, self.event.position, bases, id, decide, *args, metadata=metadata, **kwargs
        )

    def _next(self, *what: str) -> tuple[UUID, ...]:
        """Return the ids of the next event or change of a kind: for each of the handler's names, with each key."""
        counts = self._counts
        if counts is None:
            counts = self._counts = {}
        nth = counts.get(what, 0)
        counts[what] = nth + 1
        cause = (str(self.log), str(self.event.position), *what, str(nth))
        secrets = self._keys.secrets(self.event.position)
        return tuple(digest(self.service, name, *cause, secret=secret) for secret in secrets for name in self._names)


def name_of(decide: Callable[..., Any]) -> str:
    """Return the name by which a decision is recognised: its function's own, without its class."""
    while isinstance(decide, partial):
        decide = decide.func
    return str(getattr(decide, "__name__", type(decide).__name__))


ATTEMPT: Final[ContextVar[Context | None]] = ContextVar("attempt of a handler", default=None)
"""The attempt to which the running code belongs, also in tasks and threads that the handler started."""
