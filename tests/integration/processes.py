"""Real processes for integration tests, and the audit of what they did."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from tests.integration.served import SERVED
from tests.integration.worker import Ticked
from tidings import EventStore
from tidings.modelling.codec import encode

__all__ = ["Worker", "Workers", "audit_of", "dead_of", "proves_every_effect_once_in_order", "tick", "until"]

ROOT = Path(__file__).parents[2]


class Worker:
    """A process of `tests.integration.worker`."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    async def stop(self) -> int:
        """Stop it with SIGTERM. Return the exit status."""
        self._process.terminate()
        return await asyncio.to_thread(self._process.wait, 15)


class Workers:
    """Starts workers on one store, bus and folder. The end of the block ends those that still run."""

    def __init__(self, folder: Path, bus: str) -> None:
        self.folder = folder
        self.store = f"sqlite:///{folder}/events.db"
        self.bus = bus
        self._all: list[Worker] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        if SERVED:
            from tests.integration.server import ServerProcess

            self.store = self._stack.enter_context(ServerProcess(self.folder / "events.db")).uri
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._all:
            if worker.alive:
                worker.kill()
            if kind is not None:
                print(worker.log[-4000:])
        self._stack.close()

    def start(self, role: str, *options: str) -> Worker:
        log = self.folder / f"{len(self._all)}-{role}.log"
        env = os.environ | {
            "TIDINGS_STORE": self.store,
            "TIDINGS_BUS": self.bus,
            "TIDINGS_DATABASE": f"sqlite:///{self.folder}/{{service}}.db",
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.worker", role, *options],
                cwd=ROOT,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        worker = Worker(process, log)
        self._all.append(worker)
        return worker

    def database(self, service: str = "audit") -> Path:
        return self.folder / f"{service}.db"


async def until(condition: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    """Wait for a condition that another process brings about."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, f"after {seconds:g} s still not: {what}"
        await asyncio.sleep(0.05)


async def tick(store: EventStore, first: int, count: int, keys: int = 10) -> None:
    """Append `count` events from number `first` on, one after the other, over `keys` keys, in 20 streams."""
    for number in range(first, first + count):
        event = encode(Ticked(key=f"key{number % keys}", number=number), id=uuid4())
        await store.append(f"ticks-{number % 20}", [event])


def _rows(database: Path, query: str) -> list[tuple[object, ...]]:
    if not database.exists():
        return []
    with closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=5)) as connection:
        try:
            return connection.execute(query).fetchall()
        except sqlite3.OperationalError:  # the tables are not made yet
            return []


def audit_of(database: Path) -> list[tuple[str, int]]:
    """Return key and number of every effect, in order."""
    rows = _rows(database, "SELECT key, number FROM audit ORDER BY id")
    return [(str(key), int(str(number))) for key, number in rows]


def dead_of(database: Path) -> list[str]:
    return [str(reason) for (reason,) in _rows(database, "SELECT reason FROM tidings_dead")]


def proves_every_effect_once_in_order(database: Path, count: int) -> None:
    """Assert that numbers 0 to `count` - 1 have one effect each, and that each key is in order."""
    rows = audit_of(database)
    numbers = [number for _, number in rows]
    assert sorted(set(range(count)) - set(numbers)) == [], "lost"
    assert len(numbers) == len(set(numbers)), "twice"
    for key in {key for key, _ in rows}:
        of_key = [number for other, number in rows if other == key]
        assert of_key == sorted(of_key), f"{key} out of order"
    assert dead_of(database) == []
