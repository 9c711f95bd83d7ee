"""Several processes change one aggregate at once, on the embedded store's file and behind `tidings server`.

Run as a program it is one of them: `python -m tests.integration.test_contention URL NAME`.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.processes import ROOT
from tidings import Aggregate, Event, evolves, open_store
from tidings.modelling.repository import Repository
from tidings.server import EventStoreServer

PROCESSES = 3
CHANGES = 50


class Opened(Event):
    pass


class Counted(Event):
    by: str


class Counter(Aggregate, category="counter"):
    def __init__(self) -> None:
        self.counted: list[str] = []

    def open(self) -> None:
        self.record(Opened())

    def count(self, by: str) -> int:
        self.record(Counted(by=by))
        return len(self.counted)

    @evolves(Opened)
    def _opened(self, event: Opened) -> None:
        pass

    @evolves(Counted)
    def _counted(self, event: Counted) -> None:
        self.counted.append(event.by)


async def count(url: str, name: str) -> None:
    async with open_store(url) as store:
        repository = Repository(Counter, lambda: store, within=60)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        done = await asyncio.gather(*(repository.change("1", Counter.count, name) for _ in range(CHANGES)))
    print(*(one.result for one in done), flush=True)


@pytest.mark.parametrize("served", [False, True], ids=["file", "server"])
async def test_changes_of_one_aggregate_by_several_processes_at_once_all_succeed(tmp_path: Path, served: bool) -> None:
    if served:
        async with EventStoreServer(str(tmp_path / "log.db")) as server:
            await compete(server.uri)
    else:
        await compete(f"sqlite:///{tmp_path}/log.db")


async def compete(url: str) -> None:
    async with open_store(url) as store:
        repository = Repository(Counter, lambda: store)
        await repository.create("1", Counter.open)
        processes = [
            await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "tests.integration.test_contention",
                url,
                f"process-{n}",
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            for n in range(PROCESSES)
        ]
        try:
            async with asyncio.timeout(90):
                for process in processes:
                    assert process.stdout is not None
                    assert await process.stdout.readline() == b"ready\n"
                said = await asyncio.gather(*(process.communicate(b"go\n") for process in processes))
        finally:
            for process in processes:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        assert [process.returncode for process in processes] == [0] * PROCESSES
        seen = sorted(int(number) for out, _ in said for number in out.split())
        assert seen == list(range(1, PROCESSES * CHANGES + 1)), "each decision saw exactly those before it"
        assert len((await repository.load("1")).counted) == PROCESSES * CHANGES


if __name__ == "__main__":
    asyncio.run(count(sys.argv[1], sys.argv[2]))
