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


async def ended(folder: Path, *options: str, conftest: str = "", **environment: str) -> tuple[int, str]:
    """Run the program with these options. Return its exit code and what it prints."""
    (folder / "test_it.py").write_text(PROGRAM)
    (folder / "conftest.py").write_text(conftest)
    loop = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"]
    command = [*PYTEST, "-rs", *loop, *options, "test_it.py"]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=folder, env=inherited | environment, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


async def run(folder: Path, *options: str, **environment: str) -> str:
    code, told = await ended(folder, *options, **environment)
    assert code == 0, told
    return told


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


async def test_an_option_for_a_broker_that_does_not_answer_fails_clearly(tmp_path: Path) -> None:
    nobody = "amqp://127.0.0.1:1/nobody"
    code, told = await ended(tmp_path, "--tidings=rabbitmq", "-k", "cascade", TIDINGS_TEST_AMQP=nobody)
    assert code == 1
    assert f"no World on RabbitMQ: {nobody} does not let tests in" in told


async def test_an_option_for_a_broker_that_cannot_be_had_fails_and_does_not_skip(tmp_path: Path) -> None:
    without = """
from tidings.testing import brokers
brokers._installed = lambda: False
brokers._container = lambda: None
"""
    code, told = await ended(tmp_path, "--tidings=rabbitmq", "-k", "cascade", conftest=without, CI="")
    assert code == 1
    assert "--tidings=rabbitmq cannot be done here: no RabbitMQ for tests" in told


async def test_an_event_store_that_does_not_answer_is_waited_for_once(amqp_url: str, tmp_path: Path) -> None:
    impatient = """
from tidings.testing import event_stores
event_stores.READY_SECONDS = 0.2
"""
    nobody = "esdb://127.0.0.1:1"
    code, told = await ended(
        tmp_path,
        "--tidings=rabbitmq+esdb",
        "-k",
        "cascade or failure",
        conftest=impatient,
        TIDINGS_TEST_AMQP=amqp_url,
        TIDINGS_TEST_ESDB=f"{nobody}?tls=false",
    )
    assert code == 1
    assert "2 failed" in told
    assert f"no World with its log in EventStoreDB's protocol: {nobody} does not let tests in: StoreUnavailable" in told
