"""What follows from what when something is wrong: the one model behind `/ready`, `/live` and `tidings status`.

Every fault is of one part of an event's path. A part that cannot work because another one does not is an effect, and
is folded under its cause, so that who looks at it at night reads what to mend first and nothing else. Pure; no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

__all__ = ["BECAUSE", "SHARED", "Cause", "Faulty", "Part", "explain"]


class Part(IntEnum):
    """One part of an event's path, in the order in which causes are told."""

    DATABASE = 1
    """A service's own database: reads, and writes."""
    STORE = 2
    """Reading the log."""
    STORE_WRITES = 3
    """Appending to the log: its disk may be full while it is read as ever."""
    BUS = 4
    """The broker."""
    RELAY = 5
    """From the log to the bus: one that leads, and moves."""
    QUEUE = 6
    """A service's queue, its binding, and who is given its messages."""
    PROCESS = 7
    """A process of a service that starts, stops, stands by or has ended."""
    CONNECTION = 8
    """A service's connection to its queue."""
    HANDLER = 9
    """A handler that hangs, or is over its time."""
    BREAKER = 10
    """A handler that is paused because it always fails."""
    HELD = 11
    """Events that are held because their handler failed."""
    MARKERS = 12
    """The pulse of the path: what a service hears of the relay."""
    PROGRESS = 13
    """Events become settled."""
    DEAD = 14
    """Events that handlers gave up."""


SHARED: Final = frozenset({Part.STORE, Part.STORE_WRITES, Part.BUS, Part.RELAY})
"""Parts that all services have in common; a fault of any other part is one service's. What one service says of a
shared part explains its own faults and those of other shared parts, and nothing of another service."""

BECAUSE: Final[Mapping[Part, frozenset[Part]]] = {
    Part.DATABASE: frozenset(),
    Part.STORE: frozenset(),
    Part.STORE_WRITES: frozenset({Part.STORE}),
    Part.BUS: frozenset(),
    Part.RELAY: frozenset({Part.STORE, Part.STORE_WRITES, Part.BUS}),
    Part.QUEUE: frozenset({Part.BUS}),
    Part.PROCESS: frozenset({Part.DATABASE, Part.STORE, Part.BUS, Part.QUEUE}),
    Part.CONNECTION: frozenset({Part.PROCESS, Part.DATABASE, Part.STORE, Part.BUS, Part.QUEUE}),
    Part.HANDLER: frozenset({Part.DATABASE, Part.STORE, Part.STORE_WRITES}),
    Part.BREAKER: frozenset(),
    Part.HELD: frozenset({Part.BREAKER}),
    Part.MARKERS: frozenset({Part.RELAY, Part.CONNECTION, Part.HANDLER}),
    Part.PROGRESS: frozenset({Part.MARKERS, Part.HANDLER, Part.STORE_WRITES}),
    Part.DEAD: frozenset(),
}
"""Part to what may directly bring its fault about."""


def _all() -> dict[Part, frozenset[Part]]:
    found: dict[Part, frozenset[Part]] = {}

    def of(part: Part) -> frozenset[Part]:
        if part not in found:
            direct = BECAUSE[part]
            found[part] = direct.union(*(of(each) for each in direct))
        return found[part]

    for part in Part:
        of(part)
    return found


_BECAUSE: Final = _all()
"""Part to everything that may bring its fault about, however far away."""


class Faulty(Protocol):
    """What `explain` needs to know of a fault."""

    @property
    def part(self) -> Part: ...

    @property
    def scope(self) -> str:
        """The service whose part it is, or that says it of a shared one; "" for what is nobody's alone."""
        ...


F = TypeVar("F", bound=Faulty)


class Cause(NamedTuple, Generic[F]):
    """A fault that no other one explains, and those that follow from it."""

    fault: F
    effects: tuple[F, ...]


def explain(faults: Iterable[F]) -> list[Cause[F]]:
    """Every fault once: as a cause, or among the effects of the first cause that explains it, itself or by one of its
    effects. Of a shared part, what several say is one cause; the others are its effects."""
    found: list[tuple[F, list[F]]] = []
    # Parts are in the order of causation: whatever explains a fault was met before it.
    for fault in sorted(faults, key=lambda fault: (fault.part, fault.scope)):
        effects = next(
            (effects for cause, effects in found if any(_explains(each, fault) for each in (cause, *effects))), None
        )
        if effects is None:
            found.append((fault, []))
        else:
            effects.append(fault)
    return [Cause(cause, tuple(effects)) for cause, effects in found]


def _explains(cause: Faulty, effect: Faulty) -> bool:
    if cause.part == effect.part:
        return cause.part in SHARED
    if cause.part not in _BECAUSE[effect.part]:
        return False
    return cause.scope in ("", effect.scope) or (not effect.scope and cause.part in SHARED)
