"""Random worlds: a test runs in many, each with harm that follows from one seed; a failure is shrunk to its causes."""

from __future__ import annotations

import asyncio
import functools
import inspect
import random
import sys
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, ParamSpec

from tidings.errors import ConfigurationError
from tidings.testing.world import place

if TYPE_CHECKING:
    from tidings.service import Service
    from tidings.testing.world.harm import Harm

__all__ = ["STORY", "Chaos", "Story", "world_seeds"]

P = ParamSpec("P")

KINDS: Final = (
    *("lose",) * 3,
    *("duplicate",) * 2,
    *("reorder",) * 2,
    *("crash",) * 2,
    *("pause",) * 2,
    *("cut off",) * 2,
    "crash relay",
)
STEPS: Final = 6
"""Steps of harm in one world, at most."""
SPREAD: Final = 8.0
"""Messages, on average, before which a step happens."""
LATENCY: Final = 0.004
"""Virtual seconds that the log takes to answer, at most."""


@dataclass(frozen=True, slots=True)
class Step:
    """Harm that is done when so many events were published."""

    number: int
    at: int
    what: str
    which: int
    seconds: float


class Story:
    """What is to happen in a world, and what has happened."""

    def __init__(self, seed: int, muted: frozenset[int] = frozenset()) -> None:
        self.seed = seed
        self.muted = muted
        """Numbers of steps that are left out."""
        dice = random.Random(seed)
        self.steps = [
            Step(
                number,
                1 + int(dice.expovariate(1 / SPREAD)),
                dice.choice(KINDS),
                dice.randrange(1000),
                round(dice.expovariate(1 / 10), 1),
            )
            for number in range(1 + dice.randrange(STEPS))
        ]
        self.latency = random.Random(seed + 1)
        self.told: list[str] = []

    def delay(self) -> float:
        """Return the virtual seconds that the next answer of the log takes."""
        return LATENCY * self.latency.random()


STORY: Final[ContextVar[Story | None]] = ContextVar("story of a random world", default=None)


class Chaos:
    """Does to a world what a story says."""

    def __init__(self, world: Harm, story: Story, services: tuple[Service, ...]) -> None:
        self._world = world
        self._story = story
        self._services = services
        self._crashed: set[str] = set()
        self._context = copy_context()
        self._left = [step for step in story.steps if step.number not in story.muted]

    def published(self, count: int, position: int) -> None:
        """Hear that an event was published, the `count`-th."""
        due = [step for step in self._left if step.at <= count]
        self._left = [step for step in self._left if step.at > count]
        for step in due:
            asyncio.get_running_loop().call_soon(self._do, step, count, position, context=self._context)

    def stop(self) -> None:
        """Do nothing more."""
        self._left = []
        self._services = ()

    def _do(self, step: Step, count: int, position: int) -> None:
        if not self._services:
            return
        world, service = self._world, self._services[step.which % len(self._services)]
        what = ""
        match step.what:
            case "lose":
                number = 1 + step.which % 3
                world.lose_next(number)
                what = f"the next {number} messages are lost"
            case "duplicate":
                world.duplicate(position)
                what = "this message comes twice"
            case "reorder":
                world.reorder()
                what = "the next two messages change places"
            case "crash" if service.name not in self._crashed:  # twice at one event would look as if that were to blame
                self._crashed.add(service.name)
                world.crash(service)
                what = f"service {service.name} is killed"
            case "crash relay":
                world.crash_relay()
                what = "the relay is killed"
            case "pause" if world.is_well(service):
                world.pause(service, seconds=step.seconds)
                what = f"service {service.name} is paused for {step.seconds} s"
            case "cut off" if world.is_well(service):
                world.cut_off(service, seconds=step.seconds)
                what = f"service {service.name} is cut off for {step.seconds} s"
        if what:
            self._story.told.append(f"when event {count} is published, at position {position}: {what}")


def world_seeds(
    count: int,
) -> Callable[[Callable[P, Awaitable[None]]], Callable[P, Awaitable[None]]]:
    """Decorate an async test that opens a `World`: it runs in `count` random worlds, each from one seed.

    In these, messages are lost, repeated and reordered, processes are killed, paused and cut off, and the log answers
    late. A failure names its seed, with a story that has been shrunk to what makes the test fail;
    `pytest --tidings-seed=N` runs that seed alone. On real servers the test runs once, without harm.
    """

    def decorate(test: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
        if not inspect.iscoroutinefunction(test):
            raise ConfigurationError(f"@world_seeds needs an async test, and {test!r} is none")

        @functools.wraps(test)
        async def run(*args: P.args, **kwargs: P.kwargs) -> None:
            if place.WHERE.name != place.MEMORY:
                await test(*args, **kwargs)
                return
            for seed in range(count) if place.WHERE.seed is None else (place.WHERE.seed,):
                story = Story(seed)
                failed = await _fails(story, functools.partial(test, *args, **kwargs))
                if failed is not None:
                    raise await _shrunk(story, failed, functools.partial(test, *args, **kwargs))

        return run

    return decorate


def _failures() -> tuple[type[BaseException], ...]:
    """What a failing test raises: exceptions, and what `pytest.fail` raises."""
    pytest: Any = sys.modules.get("pytest")
    return (Exception,) if pytest is None else (Exception, pytest.fail.Exception)


async def _fails(story: Story, test: Callable[[], Awaitable[None]]) -> BaseException | None:
    """Run a test in a random world. Return what it raises."""
    token = STORY.set(story)
    try:
        await test()
    except _failures() as error:
        return error
    finally:
        STORY.reset(token)
    return None


async def _shrunk(story: Story, failed: BaseException, test: Callable[[], Awaitable[None]]) -> BaseException:
    """Leave out one step after the other while the test fails in the same way. Return the error of the last failure."""
    for step in () if isinstance(failed, Warning) else story.steps:  # no harm brings about a warning
        shorter = Story(story.seed, story.muted | {step.number})
        error = await _fails(shorter, test)
        if type(error) is type(failed) and error is not None:
            story, failed = shorter, error
    lines = story.told or ["nothing was done to it: the order in which the log answers is enough"]
    failed.add_note(
        f"In the random world with seed {story.seed} (pytest --tidings-seed={story.seed}):\n  " + "\n  ".join(lines)
    )
    return failed
