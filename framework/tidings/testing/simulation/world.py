"""A world: the real relay and service classes on simulated infrastructure, with faults, and a calm end.

Everything follows from the seed and from what is muted. It judges nothing: `promises` does that.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager, suppress
from contextvars import Context
from typing import Any, Final, cast
from unittest.mock import patch
from uuid import UUID

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import IntegrityError

from tidings.buses import EventBus
from tidings.database.layout import lay_out, resize
from tidings.delivery.resources import Resources
from tidings.delivery.site import Trust
from tidings.errors import ConfigurationError, DatabaseUnavailable
from tidings.hosting.running import RunningService
from tidings.modelling.events import wire_name
from tidings.operations.dead import DeadLetters
from tidings.operations.recount import recount
from tidings.operations.skip import NotSkippable, skip
from tidings.operations.verify import verify
from tidings.protocol.identity import IdKey, IdKeys
from tidings.relay.relay import Relay
from tidings.service import Service
from tidings.stores import ANY, EventData, EventStore
from tidings.testing.simulation.bus import SimulatedBroker
from tidings.testing.simulation.databases import Databases
from tidings.testing.simulation.dice import Dice
from tidings.testing.simulation.forger import forged, suppressing
from tidings.testing.simulation.loop import PROCESS, Endless, Process, SimulatedLoop, Stuck
from tidings.testing.simulation.plan import Plan, Step, plan
from tidings.testing.simulation.service import ANSWERS, KINDS, Desk, Ignored, answers_to, audit, simulated_service
from tidings.testing.simulation.slot import Slot
from tidings.testing.simulation.store import LOG, SimulatedLog, SimulatedStore

__all__ = ["Unsettled", "World", "sealed"]

EPOCH: Final = 1_700_000_000.0
"""Unix time at which a world begins, in seconds."""
PATIENCE: Final = 300.0
"""Seconds after the last fault in which a world must settle everything."""
CLOCKS: Final = 150.0
"""Seconds; a clock is wrong by up to one and a half times as much. A clock that was put back delays held events."""

FORMER_KEY: Final = IdKey(b"the key of before")
NEW_KEY: Final = IdKey(b"the key of today")
OPEN: Final = IdKey(b"")
"""Keys of the ids of emitted events; each process makes new ids with one of the first two, and knows all of them."""

Tell = Callable[..., None]


class Unsettled(Exception):
    """The world did not come to rest."""


class World:
    """One world. Call `run`, then look at its attributes."""

    def __init__(self, dice: Dice, databases: Databases, *, telling: bool = False) -> None:
        self.dice = dice
        self.loop = SimulatedLoop()  # type: ignore[abstract]
        self.story: list[tuple[float, str, str]] = []
        """Lines of the story: seconds, who, what."""
        self._telling = telling
        self.plan: Plan = plan(dice, tuple(wire_name(kind) for kind in KINDS))
        self.log = SimulatedLog(self.loop, dice, self.tell)
        self.broker = SimulatedBroker(self.loop, dice, self.tell)
        self.databases = databases
        self.desk = Desk()
        if self.plan.slow_notes is not None:
            self.desk.slow = 2.5  # long enough for the queue to leave and come back
        self.service: Service = simulated_service(prefetch=self.plan.prefetch)
        self._former: Service = simulated_service(prefetch=self.plan.prefetch, late=False)
        self._deploys = dice.chance("deploys") < 0.5
        """A version of the service without its late handler comes first, and may come back."""
        self._forger_appends = dice.chance("forger appends") < 0.3
        """Somebody appends events under ids that the service's own events would have without a key."""
        self.slots = [Slot(self, f"relay {n + 1}", self._relay) for n in range(self.plan.relays)]
        self.slots += [Slot(self, f"audit {n + 1}", self._service) for n in range(self.plan.services)]
        self.passes = 0
        """Passes over the log that services made."""
        self.rejoins = 0
        self.lives = 1
        """Number of databases that the service has had: new or restored ones."""
        self.skipped: dict[int, frozenset[str] | None] = {}
        """Position to the handlers that were done with an event when it was skipped; None once the database in which
        that was noted is lost."""
        self.contradictions: list[str] = []
        """What the log contradicts of what the service has noted, once all is settled."""
        self._copy: bytes | None = None
        self.calm = False
        self.died: list[str] = []
        """Errors of processes that no fault of this world explains."""

    def tell(self, who: object, what: str) -> None:
        """Add a line to the story."""
        if self._telling:
            self.story.append((self.loop.time(), str(who), what))

    def logged(self, entry: Mapping[str, Any]) -> None:
        """Add a log line of the real classes to the story."""
        what = entry["event"]
        self.passes += what == "pass.started"
        self.rejoins += what == "service.rejoining"
        if self._telling:
            shown = " ".join(f"{name}={value}" for name, value in entry.items() if name in _SHOWN)
            self.tell(PROCESS.get(), f"{what} {shown}")

    def run(self) -> None:
        """Run the world. Raises `Unsettled`."""
        self.databases.renew()
        with sealed(self):
            try:
                self.loop.run_until_complete(self._live())
            except (Endless, Stuck) as error:
                with suppress(Stuck):  # tasks that wait for a spinning process cannot end either
                    self.loop.run_until_complete(self._end())
                raise Unsettled(str(error)) from error

    # ---- processes ------------------------------------------------------------------------

    async def _relay(self, slot: Slot, process: Process) -> None:
        relay = Relay(
            cast("EventStore", slot.store),
            cast("EventBus", slot.bus),
            window=self.plan.window,
            checkpoint_seconds=0.3,
            marker_seconds=1.0,
            confirm_seconds=4.0,
            clock=self.loop.time,
        )
        await relay.run()

    async def _service(self, slot: Slot, process: Process) -> None:
        slot.seat = self.databases.seat(process, slow_notes=self.plan.slow_notes)
        slot.seat.database.width = self.plan.width
        late = self.dice.chance(f"code of {slot}/{slot.starts}") * self.plan.seconds < self.loop.time()
        slot.former = self._deploys and not self.calm and not late
        if slot.former:
            self.tell(slot, "has the code without the late handler")
        running = RunningService(
            self._former if slot.former else self.service,
            cast("EventStore", slot.store),
            cast("EventBus", slot.bus),
            slot.seat.database,
            clock=self.loop.time,
            trust=Trust(ids=self._keys(slot)),
        )
        running.resources = Resources(self.service.name, self.desk)
        slot.stopping = running.stopping
        await running.serve()

    def _keys(self, slot: Slot) -> IdKeys:
        """Return the keys of a process: some still make ids with the former one."""
        former = self.dice.chance(f"key of {slot}/{slot.starts}") < 0.3
        return IdKeys([FORMER_KEY, NEW_KEY, OPEN] if former else [NEW_KEY, FORMER_KEY, OPEN])

    # ---- the faults -----------------------------------------------------------------------

    async def _live(self) -> None:
        self._seat = self.databases.seat(None)
        await lay_out(self._seat.database, self.service.name, self.plan.partitions)
        for slot in self.slots:
            self.loop.call_later(self.dice.chance(f"start {slot}") * 0.2, slot.start)
        for step in self.plan.steps:
            await asyncio.sleep(max(0.0, step.at - self.loop.time()))
            await self._take(step)
        await asyncio.sleep(max(0.0, self.plan.seconds - self.loop.time()))
        try:
            await self._rest()
        finally:
            await self._end()

    async def _take(self, step: Step) -> None:
        self.dice.thrown.append(step.name)
        slot, after = self.slots[step.slot], self.loop.call_later
        match step.what:
            case "append":
                self._append(step)
            case "forge":
                self._forge(step)
            case "kill" | "pause" if step.io is not None:
                slot.set_trap(step)
            case "zombie":
                for each in self.slots[self.plan.relays :]:  # whichever is at work
                    each.set_trap(step, unless=lambda: any(other.zombie for other in self.slots))
            case "kill":
                slot.kill()
            case "pause":
                slot.pause(step.seconds)
            case "stop":
                slot.stop()
            case "cut":
                self.tell("network", f"breaks the connections of {slot} to the broker")
                self.broker.cut(slot.process)
            case "cut all":
                self.tell("network", "breaks all connections to the broker")
                self.broker.cut(None)
            case "delete queue" | "queue refuses":
                self._harm_queue(step)
            case "forget locks":
                self.tell("broker", "forgets who leads")
                self.broker.forget_locks()
            case "resize":
                await self._resize(1 + int(step.seconds * 1000) % 2)
            case "store away":
                self.tell("network", f"hides the store from {slot} for {step.seconds:.1f} s")
                slot.hide_store()
                after(step.seconds, slot.show_store)
            case "store restarts":
                self.tell("store", "restarts, and forgets the ids of what was appended")
                self.log.restart()
            case "replica lags":
                self.tell("store", f"lags: {slot} sees nothing new for {step.seconds:.1f} s")
                slot.freeze(self.log.newest)
                after(step.seconds, slot.thaw)
            case "skip":
                await self._skip(step)
            case "retention":
                self._remove(step)
            case "database copied":
                self._copy = self.databases.copy()
            case "database lost" | "database restored":
                await self._lose_database(step)
            case "confirms swallowed":
                self.tell("broker", f"confirms nothing to {slot} for {step.seconds:.1f} s")
                self._swallow(slot)
            case "wrong clock":
                self._put_clock(slot, (step.seconds - 1.5) * CLOCKS)

    def _harm_queue(self, step: Step) -> None:
        names = sorted(self.broker.queues)
        if not names:
            return
        name = names[step.slot % len(names)]
        if step.what == "delete queue":
            self.tell("operator", f"deletes queue {name}")
            self.broker.delete(name)
        else:
            self.tell("broker", f"lets queue {name} refuse messages for {step.seconds:.1f} s")
            self.broker.refusing[name] = self.loop.time() + step.seconds

    def _put_clock(self, slot: Slot, error: float) -> None:
        self.tell(slot, f"has a clock that is wrong by {error:.0f} s")
        slot.clock_error = error
        if slot.process is not None:
            slot.process.clock_error = error

    async def _resize(self, count: int) -> None:
        self.tell("operator", f"resizes the service to {count} partitions")
        try:
            await resize(self._seat.database, self.service.name, count)
        except DatabaseUnavailable:
            self.tell("operator", "gives up: the database is locked")
        except ConfigurationError:
            self.tell("operator", "gives up: a deploy is under way")

    async def _skip(self, step: Step) -> None:
        """Skip one of the newest events, and note which of its handlers are done with it by then."""
        kinds = frozenset(map(wire_name, KINDS)) - {wire_name(Ignored)}
        newest = [event for event in self.log.events if event.type in kinds][-3:]
        if not newest:
            return
        event = newest[int(step.seconds * 1000) % len(newest)]
        try:
            found = await skip(self._seat.database, self.service, LOG, event)
        except (NotSkippable, DatabaseUnavailable) as error:
            self.tell("operator", f"cannot skip {event.position}: {error}")
            return
        self.tell("operator", f"skips {event.position}, which is {found.value}")
        query = sa.select(audit.c.handler).where(audit.c.position == event.position)
        async with self._seat.database.reading() as connection:
            self.skipped[event.position] = frozenset(await connection.scalars(query))

    async def _lose_database(self, step: Step) -> None:
        """Kill the service's processes and give them an empty database or an earlier copy. By then, the store may have
        forgotten the ids of the service's appends."""
        copy = self._copy if step.what == "database restored" else None
        self.tell("operator", "gives the service a new database" if copy is None else "restores an older database")
        self.lives += 1
        self.skipped = dict.fromkeys(self.skipped)
        for slot in self.slots[self.plan.relays :]:
            slot.kill()
        await self._seat.close()
        self.databases.renew(copy)
        self._seat = self.databases.seat(None)
        await lay_out(self._seat.database, self.service.name, self.plan.partitions if copy is None else None)
        if int(step.seconds * 1000) % 4:
            self.tell("store", "forgets the ids of what was appended")
            self.log.forget()

    def _append(self, step: Step) -> None:
        assert step.event is not None
        kind, stream, n, fails, key = step.event
        metadata = b'{"partitionKey":"%s"}' % key.encode() if key else b""
        data = b'{"n":%d,"fails":%d}' % (n, fails)
        done = self.log.append(stream, [EventData(kind, data, metadata, id=UUID(int=n + 1))], ANY)
        if kind in ANSWERS and self._forger_appends and self.dice.allows(f"foreign answer {n}"):
            self.tell("forger", f"appends an event under an id of the answer to {done.position}")
            answers = answers_to(n)
            foreign = suppressing(LOG, self.service.name, ANSWERS[kind], done.position, answers)
            self.log.append(answers, [foreign], ANY)

    def _forge(self, step: Step) -> None:
        message = forged(LOG, self.log.newest + int(step.seconds), step.event)
        self.tell("forger", f"publishes a {message.type} that claims position {self.log.newest + int(step.seconds)}")
        self.broker.publish(message)

    def _remove(self, step: Step) -> None:
        own = [e.position for e in self.log.events if not e.stream.startswith(("tidings_", "$", "answers-"))]
        left = [position for position in own if position not in self.log.removed]
        if left:
            position = left[int(step.seconds * 1000) % len(left)]
            self.tell("store", f"removes {position}: retention")
            self.log.remove(position)

    def _swallow(self, slot: Slot) -> None:
        for connection in self.broker.connections:
            if connection.process is slot.process and hasattr(connection, "swallows"):
                connection.swallows = True

    # ---- the end --------------------------------------------------------------------------

    async def _rest(self) -> None:
        """Wait until everything is settled, without further faults. An operator retries dead letters."""
        self.calm = self.broker.calm = self.desk.mended = True
        self.tell("world", "no more faults from here on")
        for slot in self.slots:
            slot.recover()
            if slot.former:
                slot.stop()  # the last deploy
        database = self._seat.database
        letters = DeadLetters(database, self.service.name, LOG)
        watcher = Process("watcher", self.loop, "", hasty=True)
        store = cast("EventStore", SimulatedStore(self.log, watcher))
        began, pause = self.loop.time(), 1.0
        while True:
            await asyncio.sleep(pause)
            found = [letter for letter in await letters.list() if letter.kind == "handler"]
            dead = [letter for letter in found if self.skipped.get(letter.position or 0) is None]
            if dead:
                self.tell("operator", f"retries {', '.join(str(letter.position) for letter in dead)}")
                try:
                    await letters.retry([letter.id for letter in dead])
                except IntegrityError as error:
                    raise Unsettled(f"an event is dead twice, or dead and held: {error.orig}") from error
                continue
            report = await verify(store, [(self.service, database)])
            if report.ok:
                self.contradictions = (await recount(store, [(self.service, database)])).wrong
                return
            if self.loop.time() - began > PATIENCE:
                raise Unsettled(f"not settled {PATIENCE:g} s after the last fault:\n{report}")
            pause = min(pause * 1.5, 10.0)

    def later(self, seconds: float, call: Callable[..., object], *args: object) -> None:
        """Schedule a call of the world itself, not of the process that runs now."""
        self.loop.call_later(seconds, call, *args, context=Context())

    async def _end(self) -> None:
        """End everything that still runs, without any effect."""
        self.calm = True
        tasks = []
        for slot in self.slots:
            tasks += slot.bury()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._seat.close()
        for slot in self.slots:
            for seat in slot.seats:
                await seat.close()


_SHOWN: Final = frozenset(
    {"after", "upto", "reached", "error", "reason", "position", "floor", "head", "found", "pause"}
)


@contextmanager
def sealed(world: World) -> Iterator[None]:
    """Take time and randomness from the world, and send log lines to its story, within the block."""
    loop = world.loop

    def wall() -> float:
        process = PROCESS.get()
        return EPOCH + loop.time() + (process.clock_error if process is not None else 0.0)

    def keep(logger: object, method: str, entry: MutableMapping[str, Any]) -> Any:
        world.logged(entry)
        raise structlog.DropEvent

    configured, before = structlog.is_configured(), structlog.get_config()
    state, real, entropy = random.getstate(), time.time, os.urandom
    collecting = gc.isenabled()
    random.seed(world.dice.seed)
    structlog.configure(processors=[keep], cache_logger_on_first_use=False)
    setattr(time, "time", wall)  # noqa: B010
    setattr(os, "urandom", random.Random(world.dice.seed).randbytes)  # noqa: B010 - ids
    gc.disable()  # when garbage is collected depends on earlier worlds
    try:
        # Worlds are small: breakers open after few failures.
        with patch.multiple("tidings.delivery.breaker", FAILURES=3, KEYS=2):
            yield
    finally:
        setattr(time, "time", real)  # noqa: B010
        setattr(os, "urandom", entropy)  # noqa: B010
        random.setstate(state)
        if configured:
            structlog.configure(**before)
        else:
            structlog.reset_defaults()
        if collecting:
            gc.enable()
