"""Which faults cause which others: the one model behind `/ready`, `/live` and `tidings status`.

Every fault belongs to one part of an event's path. A part that cannot work because another part does not is an effect,
and is listed under its cause, so that somebody who looks at it at night reads first what to mend. Pure; no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

__all__ = ["BECAUSE", "SHARED", "Cause", "Faulty", "Part", "causes_of"]


class Part(IntEnum):
    """One part of an event's path, in the order in which causes are told."""

    DATABASE = 1
    """A service's own database: reads, and writes."""
    STORE = 2
    """Reading the log."""
    STORE_WRITES = 3
    """Appending to the log: its disk may be full while reading still works."""
    BUS = 4
    """The broker."""
    RELAY = 5
    """From the log to the bus: one relay leads, and its checkpoint moves."""
    QUEUE = 6
    """A service's queue, its binding, and the process that is given its messages."""
    PROCESS = 7
    """A process of a service that starts, stops, stands by or has ended."""
    CONNECTION = 8
    """A service's connection to its queue."""
    HANDLER = 9
    """A handler that hangs, or runs longer than its timeout."""
    BREAKER = 10
    """A handler that is paused because it always fails."""
    HELD = 11
    """Events that are held because their handler failed."""
    MARKERS = 12
    """The relay's markers, which show a service that the path works."""
    PROGRESS = 13
    """Settling events: whether those that are pending become fewer."""
    DEAD = 14
    """Events that handlers gave up."""
    FOREIGN = 15
    """Messages on the bus that no relay of this log has published, and events of others under a service's own ids."""


SHARED: Final = frozenset({Part.STORE, Part.STORE_WRITES, Part.BUS, Part.RELAY})
"""Parts that all services share; a fault of any other part belongs to one service.

A fault of a shared part that one service reports explains that service's own faults and faults of other shared parts,
but not those of another service.
"""

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
    Part.FOREIGN: frozenset(),
}
"""By part: the parts whose faults may directly cause its own."""


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
"""By part: all parts whose faults may cause its own, directly or through others."""


class Faulty(Protocol):
    """What `causes_of` needs to know of a fault."""

    @property
    def part(self) -> Part: ...

    @property
    def scope(self) -> str:
        """The service whose part it is, or that reports it of a shared part; "" if it belongs to no single service."""
        ...

    @property
    def origin(self) -> str:
        """A text that is equal in faults with one origin, such as a server's address with its error; else ""."""
        ...


F = TypeVar("F", bound=Faulty)


class Cause(NamedTuple, Generic[F]):
    """A fault that no other fault explains, and the faults that follow from it."""

    fault: F
    effects: tuple[F, ...]


def causes_of(faults: Iterable[F]) -> list[Cause[F]]:
    """Sort faults into causes and effects: each is a cause, or an effect of the first cause that explains it.

    A cause explains what it or one of its effects may cause. If several services report a fault of one shared part, or
    faults with one origin, the first is the cause and the others are its effects.
    """
    found: list[tuple[F, list[F]]] = []
    # Parts are sorted by causation: whatever explains a fault comes before it.
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
        return cause.part in SHARED or cause.origin == effect.origin != ""
    if cause.part not in _BECAUSE[effect.part]:
        return False
    return cause.scope in ("", effect.scope) or (not effect.scope and cause.part in SHARED)
