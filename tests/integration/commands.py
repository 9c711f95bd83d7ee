"""`tidings` as processes of their own, in a folder with a user's modules; at a pipe, or at a terminal."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from tests.integration.processes import until

__all__ = ["SHOP", "Command", "Commands"]

SHOP: Final = """
import asyncio
import time
from pathlib import Path

from tidings import Context, Event, Service
from tidings.modelling.handlers import Retry

class Placed(Event):
    number: int

class Slow(Event):
    pass

class Stuck(Event):
    pass

class Blocking(Event):
    pass

class Poisoned(Event):
    pass

shop = Service("shop")
VERSION = 1

def note(text):
    with Path("handled").open("a") as file:
        file.write(text + chr(10))

@shop.on(Placed)
async def take(event: Placed) -> None:
    note(f"placed {event.number} by version {VERSION}")

@shop.on(Slow)
async def dawdle(event: Slow) -> None:
    note("slow begun")
    await asyncio.sleep(0.5)
    note("slow done")

@shop.on(Stuck)
async def hang(event: Stuck) -> None:
    note("stuck")
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            pass

@shop.on(Blocking)
def block(event: Blocking) -> None:
    note("stuck")
    time.sleep(600)

@shop.on(Poisoned, retry=Retry(attempts=1, permanent=(ValueError,)))
async def die(event: Poisoned) -> None:
    raise ValueError("poison")
"""

# What makes a terminal this process's own, so that Ctrl-C typed there reaches it; then the command line.
_AT_TERMINAL: Final = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from tidings.cli import main
main()
"""


class Command:
    """A running command. `out` and `err` are what it has printed so far; at a terminal, everything is in `out`."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path, name: str, terminal: int | None = None) -> None:
        self.process = process
        self._terminal = terminal
        self._files = (folder / f"{name}.out", folder / f"{name}.err")
        self._screen = bytearray()
        if terminal is not None:
            self._reader = threading.Thread(target=self._read, args=(terminal,), daemon=True)
            self._reader.start()

    @property
    def out(self) -> str:
        if self._terminal is not None:
            return self._screen.decode(errors="replace")
        return self._files[0].read_text()

    @property
    def err(self) -> str:
        return self._files[1].read_text()

    def type(self, text: str) -> None:
        """Type at the terminal; '\x03' is Ctrl-C."""
        assert self._terminal is not None
        os.write(self._terminal, text.encode())

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def ended(self, seconds: float = 30.0) -> int:
        """Wait for its end. Return the exit code."""
        await until(lambda: self.process.poll() is not None, "the command ends", seconds)
        if self._terminal is not None:
            await asyncio.to_thread(self._reader.join, 10)
        return int(self.process.returncode)

    def _read(self, terminal: int) -> None:
        while True:
            try:
                part = os.read(terminal, 4096)
            except OSError:  # how Linux says that nobody has the other end open any more
                return
            if not part:
                return
            self._screen += part

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self._terminal is not None:
            self._reader.join(10)
            os.close(self._terminal)


class Commands:
    """Starts commands in `folder`, which has the module `shop`. The end of the block ends those that still run."""

    def __init__(self, folder: Path, settings: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self._all: list[Command] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
        for name in ("NO_COLOR", "FORCE_COLOR", "PYTHONUNBUFFERED"):
            kept.pop(name, None)
        self.env = kept | {"PYTHONDONTWRITEBYTECODE": "1", "TERM": "xterm"} | dict(settings or {})
        (folder / "shop.py").write_text(SHOP)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for command in self._all:
            command.close()
            if kind is not None:
                print(command.process.args, command.out[-2000:], command.err[-3000:], sep="\n")

    def start(self, *arguments: str) -> Command:
        """Start a command whose output goes to files and is therefore plain."""
        name = f"{len(self._all)}-{arguments[0]}"
        with (self.folder / f"{name}.out").open("wb") as out, (self.folder / f"{name}.err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "tidings", *arguments],
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )
        self._all.append(Command(process, self.folder, name))
        return self._all[-1]

    def at_terminal(self, *arguments: str, env: Mapping[str, str] | None = None) -> Command:
        """Start a command at a terminal of its own."""
        ours, theirs = pty.openpty()
        name = f"{len(self._all)}-{arguments[0]}"
        (self.folder / f"{name}.err").touch()
        process = subprocess.Popen(
            [sys.executable, "-c", _AT_TERMINAL, *arguments],
            cwd=self.folder,
            env=self.env | dict(env or {}),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        self._all.append(Command(process, self.folder, name, ours))
        return self._all[-1]

    async def run(self, *arguments: str) -> Command:
        """Start a command and wait for its end."""
        command = self.start(*arguments)
        await command.ended()
        return command

    async def append(self, type: str, data: str = "{}", stream: str = "order-1") -> None:
        command = await self.run("streams", "append", stream, type, data)
        assert command.process.returncode == 0, command.err

    @property
    def handled(self) -> Sequence[str]:
        """Return the lines that the shop's handlers wrote."""
        file = self.folder / "handled"
        return file.read_text().splitlines() if file.exists() else []
