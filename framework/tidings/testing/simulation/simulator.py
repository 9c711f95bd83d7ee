"""Many worlds, one after the other. Each follows from its seed, and a broken one is shrunk until it can be read."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Collection, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Final, Self

from tidings.testing.simulation.databases import Databases
from tidings.testing.simulation.dice import Dice
from tidings.testing.simulation.loop import SimulatedLoop
from tidings.testing.simulation.promises import broken
from tidings.testing.simulation.rules import without
from tidings.testing.simulation.service import tables
from tidings.testing.simulation.world import Unsettled, World

__all__ = ["Outcome", "Simulator", "simulate", "soak"]

CHUNK: Final = 10
"""Worlds that a worker gets at once."""
SHRINKING: Final = 400
"""Worlds, at most, that are run to shrink one."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one world."""

    seed: int
    broken: tuple[str, ...]
    """The promises that were broken, in words; empty if all hold."""
    happened: tuple[str, ...]
    """Names of the events and faults in the world; each can be muted."""
    muted: frozenset[str]
    events: int
    """Events that were appended, including those that handlers emitted."""
    published: int
    """Messages that relays sent, without markers."""
    passes: int
    """Passes over the log that services made."""
    rejoins: int
    seconds: float
    """Virtual seconds that the world lasted."""
    steps: int
    story: tuple[str, ...] = ()
    """The story line by line, if it was recorded."""

    @property
    def kind(self) -> str:
        """The first broken promise without its numbers; empty if all hold."""
        return self.broken[0].partition(":")[0].rstrip("0123456789") if self.broken else ""


class Simulator:
    """Runs worlds; a context manager. The worlds of one simulator share nothing but compiled SQL."""

    def __init__(self) -> None:
        self._databases = Databases(tables)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._databases.close()

    def run(self, seed: int, *, muted: Collection[str] = (), telling: bool = False) -> Outcome:
        """Run the world of this seed without the events and faults that are muted."""
        dice = Dice(seed, muted)
        world = World(dice, self._databases, telling=telling)
        try:
            world.run()
            found = SimulatedLoop().run_until_complete(broken(world))  # type: ignore[abstract]
        except Unsettled as error:
            found = [f"unsettled: {error}"]
        return Outcome(
            seed,
            tuple(found),
            tuple(dict.fromkeys(dice.thrown)),
            dice.muted,
            events=sum(not event.stream.startswith(("tidings_", "$")) for event in world.log.events),
            published=world.broker.published.total(),
            passes=world.passes,
            rejoins=world.rejoins,
            seconds=world.loop.time(),
            steps=world.loop.steps,
            story=tuple(f"{when:8.3f} s  {who:<10} {what}" for when, who, what in world.story),
        )

    def shrink(self, outcome: Outcome, *, tries: int = SHRINKING) -> Outcome:
        """Find a smaller world of the same seed that breaks the same promise, with its story.

        It leaves out halves, then quarters, and so on, until nothing more can be left out or the tries are used up.
        """
        best, size, before = outcome, max(1, len(outcome.happened) // 2), outcome.happened
        while tries > 0:
            at = 0
            while at < len(best.happened) and tries > 0:
                tries -= 1
                tried = self.run(best.seed, muted=best.muted | set(best.happened[at : at + size]))
                if tried.kind == outcome.kind:
                    best = tried
                else:
                    at += size
            if size == 1 and best.happened == before:
                break
            size, before = max(1, size // 2), best.happened
        return self.run(best.seed, muted=best.muted, telling=True)


def simulate(
    seeds: range, *, workers: int = 1, rule: str | None = None, minutes: float | None = None
) -> Iterator[Outcome]:
    """Run one world per seed until the minutes are over, without `rule` in the real classes. Yields outcomes, in any
    order if there are several `workers` (processes)."""
    ends = None if minutes is None else time.monotonic() + 60 * minutes
    if workers == 1:
        with Simulator() as simulator, without(rule):
            for seed in seeds:
                if ends is not None and time.monotonic() > ends:
                    return
                yield simulator.run(seed)
        return
    chunks = (seeds[at : at + CHUNK] for at in range(0, len(seeds), CHUNK))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        under_way = {pool.submit(_worlds, chunk, rule) for chunk in islice(chunks, 2 * workers)}
        while under_way:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            if ends is None or time.monotonic() < ends:
                under_way |= {pool.submit(_worlds, chunk, rule) for chunk in islice(chunks, len(done))}
            for chunk_of in done:
                yield from chunk_of.result()


def _worlds(seeds: range, rule: str | None) -> list[Outcome]:
    return list(simulate(seeds, rule=rule))


def soak(minutes: float, *, seed: int = 0, workers: int = 1) -> tuple[int, list[Outcome]]:
    """Run worlds from `seed` on until the minutes are over. Return their number, and those that broke a promise."""
    runs, failed = 0, []
    for outcome in simulate(range(seed, sys.maxsize), workers=workers, minutes=minutes):
        runs += 1
        if outcome.broken:
            failed.append(outcome)
    return runs, failed
