"""The verdicts: what came of an event. Done, again in its lane, held, dead, or left as it was.

It writes nothing itself: what is to become durable waits in the batch of the next commit.
"""

from __future__ import annotations

import time
from typing import Any

import structlog

from tidings.delivery.batch import Batch, Pending
from tidings.delivery.breaker import Breakers
from tidings.delivery.due import HELD_SECONDS, Due
from tidings.delivery.failure import Failure
from tidings.delivery.guard import Survivors
from tidings.delivery.inflight import DONE, TRIAL, InFlight, State
from tidings.delivery.keys import Keys
from tidings.delivery.lanes import EventLanes
from tidings.delivery.outcomes import fail, hold, succeed
from tidings.delivery.site import Joined
from tidings.modelling.context import Context

__all__ = ["Verdicts"]

log = structlog.get_logger("tidings.delivery")


class Verdicts:
    """The judge of all attempts of one bucket range."""

    def __init__(
        self, joined: Joined, lanes: EventLanes, pending: Pending, keys: Keys, due: Due, breakers: Breakers
    ) -> None:
        self._service = joined.site.service.name
        self._memory = joined.site.memory
        self._witness = joined.site.witness
        self._caution = joined.caution
        self._survivors = Survivors(joined, pending)
        self._lanes = lanes
        self._pending = pending
        self._keys = keys
        self._due = due
        self._breakers = breakers

    def judge(self, item: InFlight, context: Context, failure: Failure | None, into: Batch | None = None) -> None:
        """An attempt has ended. What came of it is part of the next commit, or of the batch `into`, whose transaction
        is under way."""
        if failure is not None:
            if self._witness is not None:
                self._witness.failed(item, failure)
            (self._pending if into is None else into).doubt(item)
            if item.role is TRIAL or not failure.deploy_needed:
                self._tell_breaker(item, failure)
            self.failed(item, failure, into)
            return
        if self._memory.attempts:
            self._memory.attempts.pop(item.turn, None)
        if context.emissions:
            succeed(item, context)
        if self._breakers.known and self._breakers.succeeded(item.handler.name):
            log.info("handler.resumed", service=self._service, handler=item.handler.name)
            self._due.resume()
        self._finish(item, DONE, into)

    def failed(self, item: InFlight, failure: Failure, into: Batch | None = None) -> None:
        """Again in its lane, or held, or dead."""
        turn, memory = item.turn, self._memory
        tried = memory.attempts[turn] = memory.attempts.get(turn, 0) + 1
        pause = fail(item, failure, tried, self._service, memory.tracebacks)
        if pause is not None:
            item.to(State.RESTING)
            self._pending.wake.set()
            self._lanes.rest(item, pause)
            return
        del memory.attempts[turn]
        held = item.postponed
        self._finish(item, State.DEAD if held is None else State.HELD, into)
        if held is not None:
            self._due.look_in(min(held.due - time.time(), HELD_SECONDS))

    def committed(self, batch: Batch) -> None:
        """A transaction is committed into whose batch was judged."""
        self._keys.committed(batch.notable)

    def passed_over(self, item: InFlight) -> None:
        """A replay does not run it."""
        self._finish(item, DONE)

    def hindered(self, item: InFlight, why: str) -> None:
        """It is not run now: a new event is held, and a held one is left as it is."""
        held = item.held
        if held is None:
            hold(item, why, self._memory.attempts.pop(item.turn, 0))
            self._finish(item, State.HELD, ran=False)
            return
        item.to(State.LEFT)
        self._keys.left(held)
        self._due.landed(held)
        if self._caution.alert:
            self._survivors.note(item, ran=False)
        self._end_trial(item)
        self._pending.wake.set()
        self._lanes.leave(item)

    def _finish(self, item: InFlight, state: State, into: Batch | None = None, *, ran: bool = True) -> None:
        """Its lane goes on; the item waits for the commit."""
        item.to(state)
        if self._caution.alert:
            self._survivors.note(item, ran=ran)
        if (self._pending if into is None else into).finish(item):
            self._keys.ended(item, apart=into is not None)
        if item.role is TRIAL:
            self._end_trial(item)
        self._lanes.finish(item)

    def _end_trial(self, item: InFlight) -> None:
        if item.role is TRIAL and (breaker := self._breakers.open.get(item.handler.name)) is not None:
            breaker.end_trial()

    def _tell_breaker(self, item: InFlight, failure: Failure) -> None:
        """An attempt failed: it may open the handler's breaker, or be a trial that shows that it must stay open."""
        name, trial = item.handler.name, item.role is TRIAL
        opened = self._breakers.failed(name, item.key, failure.reason, trial=trial)
        if not opened and not trial:
            return
        breaker = self._breakers.of(name)
        told: dict[str, Any] = {"service": self._service, "handler": name, "reason": failure.reason}
        told["next_trial_in"] = round(breaker.wait, 1)
        if opened:
            advice = (
                "every attempt of this handler fails, so its events are held, and one of them is tried from time to "
                "time; other handlers go on. Mend what the handler needs: it resumes by itself. Nothing is lost"
            )
            log.error("handler.paused", **told, advice=advice)
        else:
            event = item.event
            told |= {"event_id": str(event.id), "stream": event.stream, "position": event.position, "key": item.key}
            log.warning("handler.trial_failed", **told, trial=breaker.trials, next="an event of another key is tried")
        self._due.look_in(breaker.wait)
