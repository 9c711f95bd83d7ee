"""An event in flight: one event for one handler, its states, and every way from one state to another.

It decides nothing: stages move it on, and `to` refuses what the table does not name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, Final, NamedTuple, cast

from tidings.buses import Consumer
from tidings.database.dead_letters import Letter
from tidings.database.event_rows import key_of
from tidings.database.held_events import HeldEvent, Line
from tidings.database.receipts import Passed
from tidings.database.staged_events import StagedEvent
from tidings.modelling.handlers import Handler
from tidings.modelling.roster import Span
from tidings.protocol.metadata import own_metadata
from tidings.protocol.position import Ticket
from tidings.stores import RecordedEvent

__all__ = [
    "AGAIN",
    "COMMITTED",
    "DONE",
    "PLAIN",
    "RUNNING",
    "TAKEN",
    "TRANSITIONS",
    "TRIAL",
    "InFlight",
    "Role",
    "State",
    "Step",
    "Turn",
]


class Step(NamedTuple):
    """What to do when everything up to here is settled: settle a delivery, raise the floor, or both."""

    consumer: Consumer | None = None
    tag: int = 0
    floor: int = -1
    caught: int = -1
    """Handlers that are behind have been given everything up to here."""
    passed: Mapping[int, Passed] | None = None
    """What had gone by that no handler wants, when the floor was known: it is written with the floor."""


Turn = tuple[int, str]
"""An event for one handler: position, and the handler's name."""


class State(IntEnum):
    """How far an event in flight has come."""

    WAITING = 0
    """In its lane."""
    TAKEN = 1
    """Out of its lane and not begun: its note is being written, or it waits for a worker or for a transaction."""
    RUNNING = 2
    """Its handler is at work."""
    RESTING = 3
    """Its attempt failed, and its lane waits with it for the next one."""
    DONE = 4
    """Its handler succeeded, or is not to be run for it. The next commit says so."""
    HELD = 5
    """It is to be held. The next commit says so."""
    DEAD = 6
    """It is to be a dead letter. The next commit says so."""
    LEFT = 7
    """A held event that was not run and stays as it was. The end."""
    COMMITTED = 8
    """What came of it is durable. The end."""


TRANSITIONS: Final[dict[State, frozenset[State]]] = {
    State.WAITING: frozenset({State.TAKEN}),
    State.TAKEN: frozenset(
        {State.WAITING, State.RUNNING, State.RESTING, State.DONE, State.HELD, State.DEAD, State.LEFT}
    ),
    State.RUNNING: frozenset({State.WAITING, State.RESTING, State.DONE, State.HELD, State.DEAD}),
    State.RESTING: frozenset({State.WAITING}),
    State.DONE: frozenset({State.COMMITTED, State.WAITING}),
    State.HELD: frozenset({State.COMMITTED}),
    State.DEAD: frozenset({State.COMMITTED}),
    State.LEFT: frozenset(),
    State.COMMITTED: frozenset(),
}
"""From each state to those that may follow.

What was condemned, skipped or replayed ends without having run. Back in its lane goes what has rested, what has to wait
for another transaction with its bucket, and what was undone with its group.
"""

_AFTER: Final = tuple(TRANSITIONS[state] for state in State)


class Role(IntEnum):
    """What moves in the database when the event is done."""

    PLAIN = 0
    """The watermark of its bucket."""
    SHARED = 1
    """A row beside the watermark, which waits for the other handlers that have the event after this one."""
    LATE = 2
    """The span of a handler that is behind; the watermark does not."""
    END = 3
    """The end of such a span, in the order of the lane. There is no event."""
    AGAIN = 4
    """The row of the held event that it was read from. What brought the event was settled long ago."""
    TRIAL = 5
    """As `AGAIN`; it runs to find out whether its handler, whose breaker is open, still fails."""


# For what is done with each event: to look a member up in its class takes ten times as long on Python 3.11.
PLAIN: Final = Role.PLAIN
AGAIN: Final = Role.AGAIN
TRIAL: Final = Role.TRIAL
WAITING: Final = State.WAITING
TAKEN: Final = State.TAKEN
RUNNING: Final = State.RUNNING
DONE: Final = State.DONE
COMMITTED: Final = State.COMMITTED


class InFlight(Ticket[Step | None]):
    """One event for one handler, and in the end what came of it. It is its own ticket, which says what to do when it
    and everything before it are settled."""

    __slots__ = ("bucket", "event", "handler", "leaves", "metadata", "replayed", "role", "since", "source", "state")

    def __init__(
        self,
        event: RecordedEvent,
        bucket: int,
        handler: Handler,
        role: Role = Role.PLAIN,
        source: Step | HeldEvent | Span | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        """`source` is what brought it: a step to settle (`PLAIN`), the row of a held event, or a span."""
        self.value = source if role is PLAIN else None  # type: ignore[assignment]
        self.done = False
        self.event = event
        self.bucket = bucket
        self.handler = handler
        self.role = role
        self.source = source
        self.metadata = metadata
        """The event's metadata document, where it was read already."""
        self.replayed = False
        """It had been settled before a replay."""
        self.since = 0.0
        """When its handler was called last, in seconds of the site's clock."""
        self.state: State = WAITING
        self.leaves: Sequence[StagedEvent] | Letter | HeldEvent = ()
        """What it leaves behind beside the watermark: emitted events when it is done, else a letter or a held event."""

    def to(self, state: State) -> None:
        """Move on. Raises `RuntimeError` for a transition that the table does not have."""
        if state not in _AFTER[self.state]:
            raise RuntimeError(
                f"position {self.event.position}, handler {self.handler.name!r}: from {self.state.name} to "
                f"{State(state).name} is no transition of an event in flight; this is a bug in Tidings"
            )
        self.state = state

    def facts(self, now: float) -> dict[str, Any]:
        """Describe the handler at work, for a line of the log or an answer about health."""
        event = self.event
        return {
            "handler": self.handler.name,
            "event_id": str(event.id),
            "stream": event.stream,
            "position": event.position,
            "seconds": round(now - self.since, 1),
        }

    @property
    def held(self) -> HeldEvent | None:
        """The row that this event was read from; None for one that comes from the bus or from a pass."""
        return cast("HeldEvent", self.source) if self.role >= AGAIN else None

    @property
    def span(self) -> Span | None:
        """The span that moves with it; None where the watermark does."""
        return cast("Span", self.source) if self.role in (Role.LATE, Role.END) else None

    @property
    def emissions(self) -> Sequence[StagedEvent]:
        leaves = self.leaves
        return cast("Sequence[StagedEvent]", leaves) if isinstance(leaves, list) else ()

    @property
    def letter(self) -> Letter | None:
        return self.leaves if isinstance(self.leaves, Letter) else None

    @property
    def postponed(self) -> HeldEvent | None:
        return self.leaves if isinstance(self.leaves, HeldEvent) else None

    @property
    def key(self) -> str:
        """The partition key; it is read from the metadata, so ask only where it matters."""
        if self.role >= AGAIN:
            return cast("HeldEvent", self.source).key
        own = self.metadata
        if own is None:
            own = self.metadata = own_metadata(self.event.metadata)  # the attempt that comes next needs it too
        return key_of(self.event, own)

    @property
    def turn(self) -> Turn:
        return self.event.position, self.handler.name

    @property
    def line(self) -> Line:
        """What waits for what: events of one partition key in one line of handlers."""
        return self.key, self.handler.line_of(self.event.type)

    @property
    def blocks(self) -> int:
        """How many rows more than before will hold its key once this is committed."""
        before = self.role >= Role.AGAIN
        after = self.postponed is not None or ((letter := self.letter) is not None and letter.holds_key)
        return int(after) - int(before)
