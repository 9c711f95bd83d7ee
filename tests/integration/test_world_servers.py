"""The same test in memory and on real servers: pytest's option `--tidings`."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from tests.unit.test_world_seeds import PYTEST

PROGRAM = """
import pytest
from tidings import Context, Event, Service
from tidings.testing import Unsettled, World, world_seeds

class Ordered(Event, key="order"):
    order: str

class Packed(Event, key="order"):
    order: str

packing, shipping = Service("packing"), Service("shipping")
shipped = []

@packing.on(Ordered)
async def pack(event: Ordered, context: Context) -> None:
    if event.order == "0":
        raise ValueError("there is no order 0")
    context.emit(f"parcel-{event.order}", Packed(order=event.order))

@shipping.on(Packed)
async def ship(event: Packed) -> None:
    shipped.append(event.order)

@world_seeds(2)
async def test_a_cascade() -> None:
    async with World(packing, shipping) as world:
        await world.append("order-1", Ordered(order="1"))
        await world.settled()
        assert world.events(of=Packed) == [Packed(order="1")]
        assert set(shipped) == {"1"}

async def test_a_failure_is_raised() -> None:
    async with World(packing) as world:
        await world.append("order-0", Ordered(order="0"))
        with pytest.raises(ValueError, match="there is no order 0"):
            await world.settled()

async def test_a_crash() -> None:
    async with World(packing, shipping) as world:
        world.crash(shipping)
        await world.append("order-2", Ordered(order="2"))
        await world.settled()
        assert shipped[-1] == "2"

async def test_time() -> None:
    async with World(packing) as world:
        await world.advance(days=3)

async def test_lost_messages() -> None:
    async with World(packing) as world:
        world.lose_next()
        await world.append("order-3", Ordered(order="3"))
        await world.settled()
"""


async def run(folder: Path, *options: str, **environment: str) -> str:
    (folder / "test_it.py").write_text(PROGRAM)
    loop = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"]
    command = [*PYTEST, "-rs", *loop, *options, "test_it.py"]
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


async def test_in_memory_everything_can_be_done(tmp_path: Path) -> None:
    assert "5 passed" in await run(tmp_path)


@pytest.mark.parametrize(
    "place",
    ["rabbitmq", pytest.param("rabbitmq+esdb", marks=pytest.mark.slow("`rabbitmq` differs from it in the log alone"))],
)
async def test_on_real_servers_what_cannot_be_done_is_skipped_with_its_reason(
    place: str, amqp_url: str, tmp_path: Path
) -> None:
    told = await run(tmp_path, f"--tidings={place}", TIDINGS_TEST_AMQP=amqp_url)
    assert "3 passed, 2 skipped" in told
    assert f"advance() needs a World in memory and virtual time; this one is on real servers ({place})" in told
    assert "losing, repeating and reordering messages needs a World in memory" in told


async def test_an_option_for_a_server_that_is_not_there_fails_clearly(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(PROGRAM)
    nobody = {"TIDINGS_TEST_AMQP": "amqp://127.0.0.1:1/nobody"}
    loop = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"]
    done = await asyncio.to_thread(
        subprocess.run,
        [*PYTEST, *loop, "--tidings=rabbitmq", "-k", "cascade", "test_it.py"],
        cwd=tmp_path,
        env=os.environ | nobody,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no World on RabbitMQ: amqp://127.0.0.1:1/nobody does not let tests in" in done.stdout
