"""The scaffolding of the fault tests: real processes, traffic, and waiting for conditions. It checks no promise itself.

A `Stage` is one system in one folder: the processes that a user would start, by the commands that a user types, on one
event store and one bus. `Traffic` appends numbered events beside the test until it is told to stop. What was done is
read from the services' databases (`tests.faults.auditing`), never asked of the processes.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

from services.demo.fleet.processes import GUARD, free_ports
from tests.faults import auditing
from tests.faults.auditing import Counted, Errand, Fate, Noted, Row
from tidings import EventStore, open_store
from tidings.database.engine import open_database
from tidings.errors import StoreUnavailable
from tidings.modelling.codec import encode
from tidings.operations.verify import Report, verify
from tidings.stores import NO_STREAM

__all__ = ["Process", "Stage", "Traffic", "now", "until"]

ROOT: Final = Path(__file__).parents[2]
PATIENCE: Final = 60.0
"""Seconds."""
KEYS: Final = 7
STREAMS: Final = 12
"""Number of streams: not a multiple of the keys, so that a stream has events of every key and a key events in every
stream."""
MOST: Final = 20_000
"""Events after which traffic ends by itself."""
SERVICES: Final = {service.name: service for service in (auditing.audit, auditing.second)}
now: Final = time.monotonic
"""Return the monotonic clock, which all processes of a machine share."""


async def until(condition: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait for a condition that other processes bring about."""
    deadline = now() + seconds
    while not condition():
        assert now() < deadline, f"after {seconds:g} s still not: {what}"
        await asyncio.sleep(0.05)


class Process:
    """One process of a stage. `start` starts it again with the same command."""

    def __init__(self, name: str, command: Sequence[str], env: dict[str, str], log: Path, group: int) -> None:
        self.name = name
        self._command, self._env, self._log, self._group = [*command], env, log, group
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, *self._command],
                cwd=ROOT,
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=self._group,
            )
        return self

    @property
    def pid(self) -> int:
        """The id of the latest process."""
        assert self._process is not None
        return self._process.pid

    @property
    def status(self) -> int | None:
        """The exit status, negative for the signal that ended it; None while the process runs."""
        return None if self._process is None else self._process.poll()

    @property
    def alive(self) -> bool:
        return self._process is not None and self.status is None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """Kill it with SIGKILL, even while it is paused."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Pause it with SIGSTOP: its connections stay open, and nothing answers."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue it with SIGCONT."""
        self.signal(signal.SIGCONT)

    async def stop(self) -> int:
        """Drain and stop it with SIGTERM. Return the exit status."""
        self.signal(signal.SIGTERM)
        return await self.ended(15)

    async def ended(self, seconds: float = PATIENCE) -> int:
        """Wait for its end. Return the exit status."""
        await until(lambda: self.status is not None, f"{self.name} ends", seconds)
        return self.status or 0

    async def says(self, *words: str, seconds: float = PATIENCE) -> str:
        """Wait for a line of its log that has all these words."""

        def found() -> str | None:
            return next((line for line in self.log.splitlines() if all(word in line for word in words)), None)

        await until(lambda: found() is not None or not self.alive, f"{self.name} says {words}", seconds)
        line = found()
        assert line is not None, f"{self.name} ended, and never said {words}:\n{self.log[-2000:]}"
        return line


class Traffic:
    """Numbered events over several partition keys and streams, one at a time. Get it from `Stage.traffic`."""

    def __init__(self, store: EventStore, first: int, pause: float) -> None:
        self._store = store
        self._next = first
        self._pause = pause
        self._versions: dict[str, int] = {}
        self._stopped = asyncio.Event()
        self.acknowledged: dict[int, int] = {}
        """Number to position."""
        self.refused = 0
        """Number of appends that were repeated because the store did not acknowledge them."""

    async def run(self) -> None:
        while not self._stopped.is_set() and len(self.acknowledged) < MOST:
            await self.append()
            await asyncio.sleep(self._pause)

    def stop(self) -> None:
        self._stopped.set()

    async def append(self, fate: Fate = "note", key: str | None = None) -> int:
        """Append the next event now, until the store acknowledges it. Return its number."""
        number, self._next = self._next, self._next + 1
        stream = f"counts-{number % STREAMS}-{os.getpid()}" if fate == "note" else f"counts-{fate}-{number}"
        event = Counted(key=key or f"key{number % KEYS}", number=number, at=now(), fate=fate)
        version = self._versions.get(stream, NO_STREAM)
        data = encode(event, id=uuid4())
        while True:  # with the version that it must have, so that it is written once, whatever became of the answer
            try:
                done = await self._store.append(stream, [data], expected=version)
                break
            except StoreUnavailable:
                self.refused += 1
                await asyncio.sleep(0.1)
        self._versions[stream] = done.version
        self.acknowledged[number] = done.position
        return number

    def position(self, number: int) -> int:
        """Return the position of a number."""
        return self.acknowledged[number]

    async def reached(self, count: int) -> None:
        """Wait until this many more events are in the log."""
        goal = len(self.acknowledged) + count
        await until(lambda: len(self.acknowledged) >= goal, f"{goal} events in the log")


class Stage:
    """`with Stage(folder, bus) as stage`: a system in a folder. The end of the block ends its processes and shows their
    logs if the test failed."""

    def __init__(self, folder: Path, bus: str, server: str | None = None) -> None:
        """Prepare a stage. `server` is the URL of a server for the database of `audit`, instead of a file."""
        self.folder = folder
        self.database_server = server
        self.database_url = server or f"sqlite:///{folder}/databases/{{service}}.db"
        """Environment of processes that are started from now on."""
        self.databases = folder / "databases"
        self.databases.mkdir()
        self.bus = bus
        self.store_url = f"sqlite:///{folder}/events.db"
        """The store of processes that are started from now on: a shared file, until `server` is called."""
        self.acknowledged: dict[int, int] = {}
        """Number to position of acknowledged events."""
        self.names: list[str] = []
        """Names of the services that were started."""
        self._all: list[Process] = []
        self._guard: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        # The leader of the group that all processes are in kills the group when this process is gone, however it went.
        self._guard = subprocess.Popen([sys.executable, "-c", GUARD], stdin=subprocess.PIPE, process_group=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._all:
            if process.alive:
                process.kill()
        if kind is not None:
            print(self.logs)
        assert self._guard is not None
        self._guard.communicate()

    @property
    def logs(self) -> str:
        """Return the end of each process's log."""
        return "\n".join(f"---- {process.name}\n{process.log[-4000:]}" for process in self._all)

    # ---- processes -------------------------------------------------------------------------------------------------

    def start(self, name: str, *arguments: str, bus: str | None = None, arranged: Sequence[str] = ()) -> Process:
        """Start `tidings ARGUMENTS`, with another bus URL if one is given. `arranged` are faults inside it, see
        `tests.faults.arranged`."""
        assert self._guard is not None
        kept = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
        env = kept | {
            "TIDINGS_STORE": self.store_url,
            "TIDINGS_BUS": bus or self.bus,
            "TIDINGS_DATABASE": self.database_url,
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        command = ["-m", "tests.faults.arranged", *arranged, "--"] if arranged else ["-m", "tidings"]
        log = self.folder / f"{len(self._all)}-{name}.log"
        process = Process(name, [*command, *arguments], env, log, self._guard.pid)
        self._all.append(process)
        return process.start()

    def relay(self, name: str = "main", **how: Any) -> Process:
        """Start a relay. Two with one name are leader and standby. `how` is for `start`."""
        return self.start(f"relay-{name}", "relay", f"--name={name}", **how)

    def service(self, name: str = "audit", **how: Any) -> Process:
        """Start a process of the service `audit` or `second`. `how` is for `start`."""
        if name not in self.names:
            self.names.append(name)
        return self.start(name, "run", f"tests.faults.auditing:{name}", **how)

    async def server(self) -> Process:
        """Start `tidings server` as the event store of processes that are started from now on."""
        (port,) = free_ports(1)
        arguments = ("--db", str(self.folder / "events.db"), "--port", str(port))
        process = self.start("store", "server", *arguments)
        self.store_url = f"esdb://127.0.0.1:{port}?tls=false"
        await until(lambda: "esdb://" in process.log or not process.alive, "the server listens")
        return process

    # ---- what they are given ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def traffic(self, pause: float = 0.005) -> AsyncIterator[Traffic]:
        """Append events while the block runs, `pause` seconds apart. Its end waits for the last acknowledgement."""
        async with open_store(self.store_url) as store:
            traffic = Traffic(store, len(self.acknowledged), pause)
            producing = asyncio.create_task(traffic.run())
            try:
                yield traffic
            except BaseException:
                producing.cancel()
                raise
            finally:
                traffic.stop()
                with suppress(asyncio.CancelledError):
                    await producing
                self.acknowledged |= traffic.acknowledged

    async def errand(self, key: str, seconds: float, *, blocks: int | None = None) -> None:
        """Append an event whose handler takes some seconds, see `Errand`."""
        async with open_store(self.store_url) as store:
            event = encode(Errand(key=key, seconds=seconds, blocks=blocks), id=uuid4())
            await store.append(f"errands-{uuid4()}", [event])

    # ---- what they did ---------------------------------------------------------------------------------------------

    def database(self, name: str = "audit") -> Path:
        return self.databases / f"{name}.db"

    def place(self, name: str = "audit") -> Path | str:
        """Return where a service's database can be read: its file, or the URL of the server."""
        return self.database_server or self.database(name)

    def rows(self, name: str = "audit") -> list[Row]:
        """Return every effect, in the order in which they became durable."""
        return auditing.rows_of(self.place(name))

    def effects(self, name: str = "audit") -> int:
        found = auditing.query(self.place(name), "SELECT count(*) FROM audit")
        return int(found[0][0]) if found else 0

    async def handled(self, count: int, name: str = "audit") -> None:
        """Wait until a service has had this many effects in all."""
        await until(lambda: self.effects(name) >= count, f"{count} effects in {name}")

    async def handles(self, count: int, name: str = "audit") -> None:
        """Wait until a service has had this many more effects."""
        await self.handled(self.effects(name) + count, name)

    async def recovered(self, since: float, *names: str, key: str = "%", seconds: float = PATIENCE) -> float:
        """Wait until an event that was appended after the moment `since`, with a partition key like `key`, has had its
        effect in each service, or in those that are named. Return the seconds between: how long nothing got through."""
        sql = "SELECT min(handled) FROM audit WHERE appended > ? AND key LIKE ?"

        def first(name: str) -> float | None:
            rows = auditing.query(self.place(name), sql, since, key)
            return rows[0][0] if rows else None

        wanted, found = names or self.names, dict[str, float]()

        def all_found() -> bool:
            found.update({name: at for name in wanted if name not in found and (at := first(name)) is not None})
            return len(found) == len(wanted)

        await until(all_found, f"an event gets through to {', '.join(wanted)}", seconds)
        return max(found.values()) - since

    async def answered(self, key: str) -> bool:
        """Return whether every service that was started has answered an event of the key."""
        async with open_store(self.store_url) as store:
            said = [event async for event in store.read_all() if event.type == "Noted"]
        keys = [(note.service, note.key) for note in (Noted.model_validate_json(event.data) for event in said)]
        return all((name, key) in keys for name in self.names)

    async def answers(self, key: str) -> None:
        """Wait until `answered`."""
        deadline = now() + PATIENCE
        while not await self.answered(key):
            assert now() < deadline, f"{key} is still not answered"
            await asyncio.sleep(0.1)

    async def settled(self, seconds: float = PATIENCE) -> Report:
        """Wait until every event of the log is settled in every service: `tidings verify` would say so."""
        deadline = now() + seconds
        async with open_store(self.store_url) as store:
            while True:
                report = await self._verified(store)
                if report.ok:
                    return report
                assert now() < deadline, f"not settled after {seconds:g} s:\n{report}"
                await asyncio.sleep(0.2)

    async def _verified(self, store: EventStore) -> Report:
        async with AsyncExitStack() as stack:
            services = []
            for name in self.names:
                url = self.database_server or f"sqlite:///{self.database(name)}"
                database = await stack.enter_async_context(open_database(url, auditing.tables))
                services.append((SERVICES[name], database))
            return await verify(store, services)

    async def keeps_promises(self, seconds: float = PATIENCE) -> int:
        """Wait until everything is settled, and assert that nothing is lost and each effect happened once, in order per
        key. Return the number of audited events."""
        await self.settled(seconds)
        async with open_store(self.store_url) as store:
            asked = await auditing.asked_of(store)
        databases = {name: self.place(name) for name in self.names}
        broken = auditing.broken_promises(asked, self.acknowledged, databases)
        assert not broken, "\n".join(broken)
        assert self.acknowledged, "nothing was appended, so nothing was proved"
        return len(asked.counted)
