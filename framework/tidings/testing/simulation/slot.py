"""A place for one simulated process: started, killed, paused, cut off, and started again when it ends.

It knows nothing of what the process does: `World` hands it the function that runs in it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from tidings.errors import LogBehind
from tidings.testing.simulation.bus import SimulatedBroker, SimulatedBus
from tidings.testing.simulation.databases import Seat
from tidings.testing.simulation.dice import Dice
from tidings.testing.simulation.loop import Process, SimulatedLoop
from tidings.testing.simulation.plan import Step
from tidings.testing.simulation.store import SimulatedLog, SimulatedStore

__all__ = ["Slot"]

HEARTBEAT: Final = 6.0
"""Seconds after which the broker closes a silent connection."""
RESTART: Final = 0.5
"""Seconds until a process that ended is started again."""


class Around(Protocol):
    """What a slot needs of its world."""

    dice: Dice
    loop: SimulatedLoop
    log: SimulatedLog
    broker: SimulatedBroker
    calm: bool
    died: list[str]

    def tell(self, who: object, what: str) -> None: ...

    def later(self, seconds: float, call: Callable[..., object], *args: object) -> None: ...


class Slot:
    """One place, and the process in it, if there is one."""

    def __init__(self, world: Around, name: str, main: Callable[[Slot, Process], Any]) -> None:
        self.world = world
        self.name = name
        self._main = main
        self.starts = 0
        self.former = False
        """Whether its process runs the code without the late handler."""
        self.process: Process | None = None
        self.store: SimulatedStore | None = None
        self.bus: SimulatedBus | None = None
        self.seat: Seat | None = None
        self.stopping: asyncio.Event | None = None
        self.clock_error = 0.0
        self.zombie = False
        """Whether a process here was made a zombie; a world has one."""
        self._hidden = False
        self._frozen: int | None = None
        self._former: list[tuple[Process, asyncio.Task[None], Seat | None]] = []
        self.task: asyncio.Task[None] | None = None
        self.seats: list[Seat] = []

    def __repr__(self) -> str:
        return self.name

    def start(self) -> None:
        """Start a process, unless one runs."""
        world = self.world
        if self.process is not None:
            return
        self.starts += 1
        seed = f"{world.dice.seed}/{self.name}/{self.starts}"
        haste = f"speed of {self.name}"
        hasty = haste in world.dice.muted
        if self.starts == 1 and not hasty:
            world.dice.thrown.append(haste)
        self.process = process = Process(self.name, world.loop, seed, hasty=hasty)
        process.clock_error = self.clock_error
        self.store = SimulatedStore(world.log, process)
        self.store.away, self.store.frozen = self._hidden, self._frozen
        self.bus = SimulatedBus(world.broker, process)
        self.seat = self.stopping = None
        world.tell(self, "starts")
        self.task = process.run(self._live(process))

    async def _live(self, process: Process) -> None:
        error: BaseException | None = None
        try:
            await self._main(self, process)
        except LogBehind as behind:
            error = behind
        except Exception as died:
            error = died
            if not process.gone:
                self.world.died.append(f"{self.name} died of {type(died).__name__}: {died}")
        if process is self.process and not process.gone:
            self.world.tell(self, "ends" if error is None else f"refuses: {error}")
            self._left()
            self.world.later(RESTART, self.start)

    def _left(self) -> None:
        assert self.process is not None
        assert self.task is not None
        if self.seat is not None:
            self.seats.append(self.seat)
        self._former.append((self.process, self.task, self.seat))
        self.process = None

    def set_trap(self, step: Step, *, unless: Callable[[], bool] = lambda: False) -> None:
        """Kill or pause the process in the middle of an I/O, or make a zombie of it: it goes on when another process
        has taken over, and dies before its first append."""
        if self.process is None or step.io is None:
            return
        kind, nth = step.io
        process = self.process

        def snap() -> None:
            if process is self.process and not self.world.calm and not unless():
                self.world.tell(self, f"at its I/O {kind!r}:")
                if step.what == "kill":
                    self.kill()
                    return
                self.pause(step.seconds)
                if step.what == "zombie":
                    self.zombie = True
                    process.trap("append", 1, partial(self._die_again, process))

        process.trap(kind, nth, snap)

    def _die_again(self, process: Process) -> None:
        """Kill a zombie before its first append."""
        if process is self.process and not self.world.calm:
            self.world.tell(self, "is about to append:")
            self.kill()

    def kill(self) -> None:
        """Kill the process; another one starts after `RESTART` seconds."""
        process, world = self.process, self.world
        if process is None:
            return
        world.tell(self, "is killed")
        process.kill()
        if self.seat is not None:
            self.seat.die()
        self._left()
        # Usually the broker notices at once that the connection is gone, sometimes only after a missed heartbeat.
        late = HEARTBEAT if world.dice.chance(f"death of {self.name}/{self.starts}") < 0.3 else 0.0
        world.later(late, world.broker.cut, process)
        world.later(RESTART, self.start)

    def pause(self, seconds: float) -> None:
        """Pause the process for some seconds."""
        process, world = self.process, self.world
        if process is None or process.paused:
            return
        world.tell(self, f"is paused for {seconds:.1f} s")
        process.pause()
        if seconds > HEARTBEAT:
            world.later(HEARTBEAT, self._silent, process)
        world.later(seconds, self._resume, process)

    def _silent(self, process: Process) -> None:
        if process.paused and not process.dead:
            self.world.tell("broker", f"gives up the silent connections of {process}")
            self.world.broker.cut(process)

    def _resume(self, process: Process) -> None:
        if process.paused and not process.dead:
            self.world.tell(self, "goes on")
            process.resume()

    def stop(self) -> None:
        """Ask the process to stop; kill it if it is not ready for that."""
        if self.process is None or self.process.paused:
            return
        if self.stopping is None:
            self.kill()
        else:
            self.world.tell(self, "is asked to stop")
            self.stopping.set()

    def hide_store(self) -> None:
        """Cut the process off from the store."""
        self._hidden = True
        if self.store is not None:
            self.store.away = True
            self.world.log.wake()

    def show_store(self) -> None:
        """Undo `hide_store`."""
        self._hidden = False
        if self.store is not None:
            self.store.away = False

    def freeze(self, position: int | None) -> None:
        """Let its reads see nothing after a position; None undoes that."""
        self._frozen = position
        if self.store is not None:
            self.store.frozen = position

    def thaw(self) -> None:
        """Undo `freeze`."""
        self.freeze(None)
        self.world.log.wake()

    def recover(self) -> None:
        """Undo every fault of this slot."""
        self.show_store()
        self.thaw()
        if self.process is None:
            self.start()
        else:
            self._resume(self.process)

    def bury(self) -> list[asyncio.Task[None]]:
        """End everything that still runs here. Return the tasks to wait for."""
        if self.process is not None:
            self._left()
        tasks = []
        for process, task, seat in self._former:
            if seat is not None:
                seat.die()
            process.bury()
            task.cancel()
            tasks += [task, *process.tasks]
        return tasks
