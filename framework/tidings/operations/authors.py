"""Finds emitted events whose handler no longer exists under the name that the log has. It only reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final
from uuid import UUID

from tidings.modelling.codec import CAUSATION, read_metadata
from tidings.modelling.handlers import Handler, Inject
from tidings.protocol.position import CARRIED, carried
from tidings.stores import EventStore, RecordedEvent

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["UnknownAuthor", "may_emit", "unknown_authors"]

_HANDLER: Final = b'"tidingsHandler"'


@dataclass(slots=True)
class UnknownAuthor:
    """A handler name in the log, and a handler of today that runs for the same events but does not have that name."""

    name: str
    """The name under which events in the log were emitted."""
    handler: str
    """The handler of today, which a replay runs for the events that caused them."""
    events: tuple[str, ...]
    """Class names of the events that `handler` handles."""
    was: tuple[str, ...]
    """Former names that `handler` already declares."""
    is_there: bool
    """Whether a handler of today has this name, but handles other events."""
    count: int = 0
    """Events in the log that were emitted under `name`."""
    causes: list[str] = field(default_factory=list)
    """Types of the events that caused them."""
    emitted: list[str] = field(default_factory=list)
    """Types of the emitted events."""
    first: int = 0
    """Position of the first emitted event."""

    @property
    def line(self) -> str:
        """The declaration to write if `handler` is the one called `name` under a new name; empty if it cannot be."""
        if self.is_there:
            return ""
        was = ", ".join(f'"{name}"' for name in (*self.was, self.name))
        return f"@service.on({', '.join(self.events)}, ..., was=({was},))"

    @property
    def remedy(self) -> str:
        """What to do so that nothing is appended twice: a sentence without its full stop."""
        if self.is_there:
            return f"have handler {self.name!r}, which is still there, handle {', '.join(self.causes)} again"
        return f"if {self.handler!r} is {self.name!r} under another name, write {self.line} and deploy that"


def may_emit(handler: Handler) -> bool:
    """Return whether the handler takes a `Context`."""
    return any(wanted is Inject.CONTEXT for _, wanted in handler.parameters)


async def unknown_authors(store: EventStore, service: Declaration, after: int) -> list[UnknownAuthor]:
    """Find events that the service emitted under handler names that it no longer has, the oldest first.

    Looks at what was emitted for events above position `after`. If today's handlers emit the same, a replay of those
    events would append it again. Reads the log backwards, and remembers each emitted event until it reads its cause.
    Raises `StoreUnavailable`.
    """
    prefix = f"{service.name}."
    found: dict[tuple[str, str], UnknownAuthor] = {}
    waiting: defaultdict[bytes, list[tuple[str, RecordedEvent]]] = defaultdict(list)
    async for event in store.read_all(after=after, backwards=True, filter=CARRIED):
        if carried(event) is None:
            continue
        if _HANDLER in event.metadata:
            own = read_metadata(event)
            author, cause = own.get("tidingsHandler"), _bytes(own.get(CAUSATION))
            if isinstance(author, str) and author.startswith(prefix) and cause is not None:
                waiting[cause].append((author.removeprefix(prefix), event))
        if waiting:
            _attribute(service, event.type, waiting.pop(event.id_bytes, ()), found)
    return sorted(found.values(), key=lambda author: author.first)


def _attribute(
    service: Declaration,
    cause: str,
    emitted: Iterable[tuple[str, RecordedEvent]],
    found: dict[tuple[str, str], UnknownAuthor],
) -> None:
    handlers = service.handlers_of(cause)
    for name, event in emitted:
        if any(name in handler.names for handler in handlers):
            continue
        for handler in handlers:
            if not (handler.replay and may_emit(handler)):
                continue
            author = found.get((name, handler.name))
            if author is None:
                names = tuple(kind.__name__ for kind in handler.events)
                author = found[name, handler.name] = UnknownAuthor(
                    name, handler.name, names, handler.was, name in service.named
                )
            author.count += 1
            author.first = event.position
            for kind, kinds in ((cause, author.causes), (event.type, author.emitted)):
                if kind not in kinds:
                    kinds.append(kind)


def _bytes(value: object) -> bytes | None:
    try:
        return UUID(value).bytes if isinstance(value, str) else None
    except ValueError:
        return None
