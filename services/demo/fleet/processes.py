"""`tidings` commands as processes: started, killed, asked whether they are ready. None of them outlives the demo.

All of them are in the process group of a small guard, whose standard input is a pipe from this process. When the pipe
closes, however this process ended, the guard kills the group. Ctrl-C in the terminal reaches none of them: the demo
stops them itself.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

import httpx

from services.demo.beside import tasks

__all__ = ["READY_WITHIN", "Child", "Died", "Fleet", "NotReady", "fleet", "free_ports"]

ROOT: Final = Path(__file__).parents[3]
GUARD: Final = "import os, signal, sys; sys.stdin.buffer.read(); os.killpg(0, signal.SIGKILL)"
READY_WITHIN: Final = 60.0
"""Seconds for which `ready` waits."""
STOPPED_WITHIN: Final = 15.0
"""Seconds for which `stop` waits. On an idle machine, a process drains within 5 seconds."""
TAIL: Final = 12
"""Lines of a log that are shown when its process dies."""


class Died(Exception):
    """A process ended by itself."""

    def __init__(self, child: Child, status: int) -> None:
        how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with exit status {status}"
        super().__init__(f"{child} {how}. The end of {child.log}:\n{child.tail()}")


class NotReady(Exception):
    """A process runs but says that it cannot do its work."""


class Child:
    """One command, of which one process runs at a time. Get one from `Fleet.start`."""

    def __init__(self, fleet: Fleet, name: str, arguments: Sequence[str], port: int, probed: bool) -> None:
        self.name, self.arguments, self.port = name, tuple(arguments), port
        self._probed = probed
        self.log = fleet.folder / f"{name}.log"
        self._fleet = fleet
        self._process: asyncio.subprocess.Process | None = None
        self._told = False
        """Whether the latest process was told to end."""

    def __str__(self) -> str:
        return f"{self.name} (process {self.pid})"

    @property
    def pid(self) -> int:
        """The process id of the latest process."""
        return self._process.pid if self._process else 0

    @property
    def alive(self) -> bool:
        """Whether its process runs."""
        return self._process is not None and self._process.returncode is None

    def tail(self) -> str:
        """Return the last lines of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-TAIL:])

    async def start(self) -> None:
        """Start it, or start it again. Wait for `ready` before you rely on it."""
        with self.log.open("ab") as log:
            self._process = process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "tidings", *self.arguments),
                cwd=ROOT,
                env=self._fleet.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=self._fleet.group,
            )
        self._told = False
        self._fleet.tasks.create_task(self._watch(process))

    async def ready(self, within: float = READY_WITHIN) -> None:
        """Wait until /ready says that events get through, or, for the event store without that page, until it listens.
        Raises `NotReady` after `seconds`."""
        loop = asyncio.get_running_loop()
        deadline, said = loop.time() + within, "it does not answer"
        while True:
            with suppress(httpx.TransportError, OSError):
                if not self._probed:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                    writer.close()
                    return
                answer = await self._fleet.client.get(f"http://127.0.0.1:{self.port}/ready")
                if answer.status_code == 200:
                    return
                said = answer.text
            if loop.time() > deadline:
                raise NotReady(f"{self} is not ready after {within:g} s: {said}\nThe end of {self.log}:\n{self.tail()}")
            await asyncio.sleep(0.1)

    async def kill(self) -> None:
        """Kill it with SIGKILL. Returns when it is gone."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """Drain and stop it with SIGTERM. Return the exit status."""
        try:
            async with asyncio.timeout(STOPPED_WITHIN):
                return await self._end(signal.SIGTERM)
        except TimeoutError:
            raise NotReady(f"{self} has not stopped {STOPPED_WITHIN:g} s after SIGTERM:\n{self.tail()}") from None

    async def _end(self, how: signal.Signals) -> int:
        assert self._process is not None
        self._told = True
        with suppress(ProcessLookupError):
            self._process.send_signal(how)
        return await self._process.wait()

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        status = await process.wait()
        if not self._told:
            raise Died(self, status)


class Fleet:
    """The processes of a demo. Get one from `fleet`."""

    def __init__(
        self, folder: Path, env: Mapping[str, str], group: int, client: httpx.AsyncClient, tasks: asyncio.TaskGroup
    ) -> None:
        self.folder, self.env, self.group, self.client, self.tasks = folder, dict(env), group, client, tasks
        self.children: list[Child] = []

    async def start(self, name: str, arguments: Sequence[str], port: int, *, probed: bool = True) -> Child:
        """Start `tidings ARGUMENTS`, which answers /ready at `port`, or with `probed=False` only listens there. Its
        output goes to NAME.log."""
        child = Child(self, name, arguments, port, probed)
        self.children.append(child)
        await child.start()
        return child

    async def stop(self) -> dict[str, int]:
        """Stop all with SIGTERM, the first one last, because the others need it. Return exit statuses by name."""
        first, *others = self.children
        statuses = await asyncio.gather(*(child.stop() for child in others))
        named = {child.name: status for child, status in zip(others, statuses, strict=True)}
        return named | {first.name: await first.stop()}


@asynccontextmanager
async def fleet(folder: Path, env: Mapping[str, str]) -> AsyncIterator[Fleet]:
    """Manage processes with this environment and logs in `folder`. The end of the block kills those that still run.

    Raises `Died` out of the block if one of them ends by itself.
    """
    guard = _guard()
    try:
        async with httpx.AsyncClient(timeout=5, trust_env=False) as client, tasks() as group:
            found = Fleet(folder, env, guard.pid, client, group)
            try:
                yield found
            finally:
                for child in found.children:
                    if child.alive:
                        await child.kill()
    finally:
        guard.communicate()


def _guard() -> subprocess.Popen[bytes]:
    """Start the leader of the group of all processes."""
    return subprocess.Popen([sys.executable, "-c", GUARD], stdin=subprocess.PIPE, process_group=0)


def free_ports(count: int) -> list[int]:
    """Find free ports of the loopback interface, below those given to clients, so that one stays free over a
    restart."""
    found: list[int] = []
    for port in random.sample(range(20_000, 32_000), 200):  # no secret  # nosec B311
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                probe.bind(("127.0.0.1", port))
                found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"of 200 TCP ports of 127.0.0.1 between 20000 and 32000 only {len(found)} are free")


def environment(folder: Path, store: str, bus: str, services: Sequence[str]) -> dict[str, str]:
    """Return the environment of every process: log, bus, databases and the gateway's ledger."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TIDINGS_", "PAYMENT_"))}
    return kept | settings(folder, store, bus, services)


def settings(folder: Path, store: str, bus: str, services: Sequence[str]) -> dict[str, str]:
    """Return the part of `environment` that a user would set."""
    return {
        "TIDINGS_STORE": store,
        "TIDINGS_BUS": bus,
        "TIDINGS_DATABASE": f"sqlite:///{folder}/{{service}}.db",
        "TIDINGS_SERVICES": ",".join(services),
        "PAYMENT_LEDGER": f"{folder}/gateway.db",
    }
