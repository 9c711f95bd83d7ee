"""The demo's own RabbitMQ, run by `deploy/local/rabbitmq`, the script that users run. It touches no other."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from services.demo.fleet.processes import ROOT

__all__ = ["Broker", "BrokerRefused", "broker"]

SCRIPT: Final = ROOT / "deploy" / "local" / "rabbitmq"
_DELETED: Final = re.compile(r"with (\d+) ready messages?")


class BrokerRefused(Exception):
    """The script failed; the text is what it printed."""


class Broker:
    """A RabbitMQ for the demo. Get one from `broker`."""

    def __init__(self, folder: Path) -> None:
        self._env = os.environ | {"TIDINGS_LOCAL": str(folder)}
        self.url = ""
        """The value of TIDINGS_BUS. A restart does not change it."""

    async def up(self) -> None:
        """Start it, or start it again with its data. Returns when it accepts connections."""
        port = [] if self.url else ["--port=0"]
        self.url = (await self.run("up", "--nodes=1", *port)).splitlines()[-1]

    async def down(self) -> None:
        """Stop it cleanly."""
        await self.run("down")

    async def delete(self, queue: str) -> int:
        """Delete a queue. Return the number of messages that were in it."""
        said = await self.run("ctl", "delete_queue", queue)
        found = _DELETED.search(said)
        return int(found[1]) if found else 0

    async def run(self, *arguments: str) -> str:
        """Run the script with these arguments (`pause`, `eval CODE`, ...). Return its output. Raises
        `BrokerRefused`."""
        # In a session of its own, because Ctrl-C is for the demo, which then stops what the script has started.
        script = await asyncio.create_subprocess_exec(
            *(sys.executable, str(SCRIPT), *arguments),
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        out, err = await script.communicate()
        if script.returncode != 0:
            said = (err or out).decode(errors="replace").strip()
            raise BrokerRefused(f"{SCRIPT.relative_to(ROOT)} {arguments[0]}: {said}")
        return out.decode(errors="replace")

    def guard(self) -> subprocess.Popen[bytes]:
        """Start a process that stops the broker when its standard input ends, at the latest when this process ends."""
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), "guard"], env=self._env, stdin=subprocess.PIPE, start_new_session=True
        )


@asynccontextmanager
async def broker(folder: Path) -> AsyncIterator[Broker]:
    """Run a broker with its files in `folder` for the duration of the block. Raises `BrokerRefused`."""
    found = Broker(folder)
    guard = found.guard()
    try:
        await found.up()
        yield found
    finally:
        await asyncio.to_thread(guard.communicate)
