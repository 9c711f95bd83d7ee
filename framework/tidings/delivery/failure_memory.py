"""Attempts that failed, and events that are not to be run again, remembered when the process joins again.

One for each service and process, so that an event cannot be retried for ever because the process joins again. No I/O.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from sqlalchemy.exc import DBAPIError

from tidings._support.tracebacks import Tracebacks
from tidings.delivery.allowance import Allowance
from tidings.delivery.crashes import Caution
from tidings.delivery.failure import Failure
from tidings.delivery.inflight import InFlight, Role, Turn
from tidings.errors import DatabaseUnavailable, Fenced
from tidings.modelling.taken_ids import TakenIds

__all__ = ["LOSSES", "SKIPPED", "FailureMemory"]

SKIPPED: Final = "skipped by operator"
"""The reason of a dead letter that an operator wanted."""
LOSSES: Final = 5
"""Lost connections in a row, each while the same event is at work, that count as a failure of the event."""


class FailureMemory:
    """Attempts that failed, by turn: an event for one handler."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.tracebacks: Final = Tracebacks(clock)
        self.taken: Final = TakenIds(clock)
        self.unreadable: Final = Allowance(clock)
        self.attempts: dict[Turn, int] = {}
        self.cautions: Final[dict[range, Caution]] = {}
        """Events under suspicion of ending the process, by bucket range."""
        self.condemned: dict[Turn, Failure] = {}
        """Dead without being run again: the handler ended the transaction that it was part of, or made its commit
        fail."""
        self.crashed: dict[int, tuple[Failure, int]] = {}
        """By position: dead without being run again by any handler, because the process crashed so many times while
        one of them ran (which one, nobody can say), or because an operator wants it."""
        self.buried: set[Turn] = set()
        """Turns of `crashed` that are settled, while others may still come. Retried from the dead letters, they run."""
        self.losses: dict[Turn, int] = {}
        """How often in a row the connection to the database was lost while the event's handler was at work."""
        self.suspected: set[Turn] = set()
        """Each gets a transaction of its own: the commit of a group that it was part of failed."""
        self.undone: set[Turn] = set()
        """Each gets a savepoint of its own: it was undone with a group in which something failed."""

    def skip(self, positions: Iterable[int]) -> None:
        """An operator wants the events at these positions dead without being run."""
        failure = Failure(SKIPPED, "", permanent=True, skipped=True)
        self.bury(dict.fromkeys(positions, (failure, 1)))

    def bury(self, crashed: Mapping[int, tuple[Failure, int]]) -> None:
        """The events at these positions are dead for each handler that comes to them next."""
        self.crashed |= crashed
        self.buried = {turn for turn in self.buried if turn[0] not in crashed}

    def crash(self, item: InFlight) -> tuple[Failure, int] | None:
        """Why the item is dead without being run, and after how many crashes; None where it is not."""
        return None if item.turn in self.buried else self.crashed.get(item.event.position)

    def condemn(self, item: InFlight, failure: Failure, what: str) -> Fenced:
        """What to raise for a handler that did what only joining again can undo."""
        self.condemned[item.turn] = Failure(failure.reason, failure.detail, permanent=True)
        return Fenced(
            f"handler {item.handler.name!r} {what} ({failure.reason}); the group is undone, and the event at position "
            f"{item.event.position} dead"
        )

    def lose(
        self, item: InFlight, database: str, failure: Failure | None, cause: BaseException | None
    ) -> DatabaseUnavailable:
        """Return what to raise when the connection was lost while the handler was at work. Usually that is not the
        handler's doing. If it happens again and again, the event counts as failed, so that others go on."""
        turn = position, name = item.turn
        losses = self.losses[turn] = self.losses.get(turn, 0) + 1
        why = failure.reason if failure is not None else f"{type(cause).__name__}: {cause}" if cause else "no error"
        said = (
            f"the connection was lost while handler {name!r} was at the event at position {position} ({why}). If it is "
            f"always this handler: its statements take longer than its timeout ({item.handler.timeout:g} s), or it "
            "keeps its session idle for longer than the server allows (idle_in_transaction_session_timeout)"
        )
        if losses >= LOSSES:
            del self.losses[turn]
            self.attempts[turn] = item.handler.retry.attempts
            detail = failure.detail if failure is not None else ""
            self.condemned[turn] = Failure(f"ConnectionLost: {losses} times {said}", detail, permanent=False)
        return DatabaseUnavailable(f"database {database}: {said}. Nothing is lost: its group is undone, and done again")

    def suspect(self, ran: Sequence[InFlight], error: DBAPIError) -> Fenced:
        """The database refused a commit for what these wrote (a deferred constraint): find out whose doing it was."""
        reason = f"{type(error).__name__}: at the commit: {error.orig}"
        if len(ran) == 1:
            detail = "".join(traceback.format_exception(error))
            return self.condemn(ran[0], Failure(reason, detail, permanent=True), "wrote what cannot be committed")
        self.suspected.update(item.turn for item in ran)
        return Fenced(
            f"the database refused to commit what {len(ran)} events wrote ({reason}); they are undone, and each of "
            "them gets a transaction of its own"
        )

    def forget(self, items: Iterable[InFlight]) -> None:
        """They are settled."""
        if self.condemned or self.suspected or self.losses or self.crashed or self.undone:
            for item in items:
                self.condemned.pop(item.turn, None)
                self.losses.pop(item.turn, None)
                self.suspected.discard(item.turn)
                self.undone.discard(item.turn)
                if item.role is Role.PLAIN:
                    self.crashed.pop(item.event.position, None)
                elif item.event.position in self.crashed:
                    self.buried.add(item.turn)
