"""A RabbitMQ of the demo's own, through `deploy/local/rabbitmq`, the script that users run. It touches no other."""

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
    """What the script said when it could not do it."""


class Broker:
    """Obtain one with `broker`."""

    def __init__(self, folder: Path) -> None:
        self._env = os.environ | {"TIDINGS_LOCAL": str(folder)}
        self.url = ""
        """For TIDINGS_BUS; stays the same over a restart."""

    async def up(self) -> None:
        """Start it, or start it again with its data; returns when it accepts connections."""
        port = [] if self.url else ["--port=0"]
        self.url = (await self.run("up", "--nodes=1", *port)).splitlines()[-1]

    async def down(self) -> None:
        """Stop it in good order."""
        await self.run("down")

    async def delete(self, queue: str) -> int:
        """Delete a queue with everything in it; how many messages were."""
        said = await self.run("ctl", "delete_queue", queue)
        found = _DELETED.search(said)
        return int(found[1]) if found else 0

    async def run(self, *arguments: str) -> str:
        """What the script says to these arguments: `pause`, `eval CODE`, ... Raises `BrokerRefused`."""
        # In a session of its own, because Ctrl-C is for the demo, which then ends what the script has begun.
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
        """A process that ends the broker when its standard input ends: when this process does, at the latest."""
        return subprocess.Popen(
            [sys.executable, str(SCRIPT), "guard"], env=self._env, stdin=subprocess.PIPE, start_new_session=True
        )


@asynccontextmanager
async def broker(folder: Path) -> AsyncIterator[Broker]:
    """A running broker that keeps everything in `folder`; leaving ends it. Raises `BrokerRefused`."""
    found = Broker(folder)
    guard = found.guard()
    try:
        await found.up()
        yield found
    finally:
        await asyncio.to_thread(guard.communicate)
