"""Random worlds: what a seed does, how a failure is told and replayed, and the options of pytest."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from tests.unit.test_world_harm import Pair, tell
from tidings import Event, Service
from tidings.errors import ConfigurationError
from tidings.testing import World, world_seeds
from tidings.testing.world.place import WHERE
from tidings.testing.world.seeds import Story


class Said(Event, key="key"):
    key: str
    n: int


def forgetful() -> tuple[Service, list[int]]:
    """A service that remembers in memory what it was told, and emits it: a crash in between makes it say it again."""
    service, said = Service("forgetful"), list[int]()

    @service.on(Said)
    async def say(event: Said) -> None:
        said.append(event.n)
        await asyncio.sleep(0.5)

    return service, said


@world_seeds(8)
async def test_the_promises_hold_in_random_worlds() -> None:
    pair = Pair(rest=0.01)
    async with World(pair.counting, pair.noting) as world:
        await tell(world, 0, 6)
        await pair.proves(world, 6)
        await tell(world, 6, 4)
        await pair.proves(world, 10)


async def runs(count: int) -> AssertionError | None:
    """Run a test in random worlds that is wrong about effects outside the database: they may happen twice."""

    @world_seeds(count)
    async def each_is_said_once() -> None:
        service, said = forgetful()
        async with World(service) as world:
            for n in range(8):
                await world.append("said", Said(key="1", n=n))
                await asyncio.sleep(0.2)  # so that some harm comes while the handler is at work
            await world.settled()
            assert said == list(range(8))

    try:
        await each_is_said_once()
    except AssertionError as error:
        return error
    return None


async def test_a_failure_names_its_seed_and_a_story_that_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    failed = await runs(60)
    assert failed is not None, "a crash between effect and commit must be found"
    (note,) = (note for note in failed.__notes__ if "--tidings-seed" in note)
    assert "service forgetful is killed" in note
    assert len(note.splitlines()) == 2, note
    seed = int(note.partition("--tidings-seed=")[2].partition(")")[0])
    monkeypatch.setattr(WHERE, "seed", seed)
    again = await runs(1)
    assert again is not None
    assert [line for line in again.__notes__ if "--tidings-seed" in line] == [note], "the same seed, the same story"
    monkeypatch.setattr(
        WHERE, "seed", next(n for n in range(100) if not any(s.what == "crash" for s in Story(n).steps))
    )
    assert await runs(1) is None


async def test_what_pytest_fail_raises_names_its_seed_too() -> None:
    @world_seeds(1)
    async def fails() -> None:
        pytest.fail("not so")

    with pytest.raises(pytest.fail.Exception, match="not so") as failed:
        await fails()
    assert "--tidings-seed=0" in failed.value.__notes__[0]


async def test_a_warning_is_not_shrunk() -> None:
    """No harm brings one about, and a world in which there are too many timers takes its time."""
    runs = 0

    @world_seeds(5)
    async def warns() -> None:
        nonlocal runs
        runs += 1
        raise UserWarning("5,000 timers")

    with pytest.raises(UserWarning, match="5,000 timers"):
        await warns()
    assert runs == 1


def test_a_story_follows_from_its_seed() -> None:
    assert Story(7).steps == Story(7).steps
    assert len({str(Story(seed).steps) for seed in range(50)}) > 40


def test_only_an_async_test_runs_in_random_worlds() -> None:
    with pytest.raises(ConfigurationError, match="needs an async test"):
        world_seeds(3)(lambda: None)  # type: ignore[arg-type, return-value]


PYTEST = [sys.executable, "-m", "pytest", "-q"]
if not entry_points(group="pytest11", name="tidings"):  # Tidings was installed before it had a plugin
    PYTEST += ["-p", "tidings.testing.plugin"]

PROGRAM = """
import pytest
from tidings import Event, Service
from tidings.testing import World, world_seeds
from tidings.testing.world.place import WHERE

class Said(Event, key="key"):
    key: str

service, seeds = Service("one"), []

@service.on(Said)
async def hear(event: Said) -> None: ...

@world_seeds(5)
async def test_seeds() -> None:
    async with World(service) as world:
        seeds.append(world._story.seed)
        await world.append("said", Said(key="1"))
        await world.settled()

def test_which() -> None:
    print("seeds:", *seeds)
"""


@pytest.mark.parametrize(("options", "expected"), [([], "seeds: 0 1 2 3 4"), (["--tidings-seed=41"], "seeds: 41")])
def test_an_option_chooses_the_seed(options: list[str], expected: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(PROGRAM)
    loop = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"]
    command = [*PYTEST, "-s", *loop, *options, "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert expected in done.stdout


def test_an_unknown_place_is_refused(tmp_path: Path) -> None:
    command = [*PYTEST, "--tidings=carrier-pigeon"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "invalid choice: 'carrier-pigeon' (choose from" in done.stderr
