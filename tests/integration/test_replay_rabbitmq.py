"""A replay asked for by the command line, while the service runs in a process of its own on a real RabbitMQ."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.commands import Commands
from tests.integration.processes import until

MORE = """

class Mailed(Event):
    number: int

@shop.on(Mailed, replay=False)
async def mail(event: Mailed) -> None:
    note(f"mailed {event.number}")
"""


@pytest.fixture
def commands(tmp_path: Path, amqp_url: str) -> Iterator[Commands]:
    settings = {
        "TIDINGS_BUS": amqp_url,
        "TIDINGS_DATABASE": "sqlite:///{service}.db",
        "TIDINGS_SERVICES": "shop:shop",
    }
    with Commands(tmp_path, settings) as opened:
        with (tmp_path / "shop.py").open("a") as module:
            module.write(MORE)
        yield opened


async def test_a_running_service_that_is_idle_runs_again_what_it_may_and_nothing_else(commands: Commands) -> None:
    relay, service = commands.start("relay"), commands.start("run", "shop")
    for number in (1, 2):
        await commands.append("Placed", f'{{"number": {number}}}')
        await commands.append("Mailed", f'{{"number": {number}}}')
    once = Counter(["placed 1 by version 1", "placed 2 by version 1", "mailed 1", "mailed 2"])
    await until(lambda: Counter(commands.handled) == once, "all of it is handled")
    await _settled(commands)

    said = await commands.run("replay", "shop", "--from", "0", "--dry-run")
    assert said.process.returncode == 0, said.err
    assert [line.split()[2:5] for line in said.out.splitlines() if line.startswith(("take", "mail"))] == [
        ["2", "0", "0"],
        ["0", "2", "0"],
    ]
    assert Counter(commands.handled) == once
    done = await commands.run("replay", "shop", "--from", "0", "--yes")
    assert done.process.returncode == 0, done.err
    again = once + Counter(["placed 1 by version 1", "placed 2 by version 1"])
    await until(lambda: Counter(commands.handled) == again, "it runs again, without any new event")
    await _settled(commands)
    assert Counter(commands.handled) == again
    for command in (service, relay):
        command.signal(signal.SIGTERM)
        assert await command.ended() == 0


async def _settled(commands: Commands) -> None:
    async with asyncio.timeout(60):
        while (await commands.run("verify")).process.returncode != 0:
            await asyncio.sleep(0.1)
