"""Real processes and signals: the first drains and returns whatever hangs, the second ends at once; probes answer."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import ROOT, until
from tidings import Service
from tidings.errors import ConfigurationError
from tidings.hosting.collector import YOUNG
from tidings.hosting.serve import serve


class Process:
    def __init__(self, folder: Path, *arguments: str, **env: str) -> None:
        self.path = folder / "log"
        with self.path.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.stoppable", *arguments],
                cwd=ROOT,
                env=os.environ
                | {
                    "TIDINGS_STORE": f"sqlite:///{folder}/log.db",
                    "TIDINGS_DATABASE": f"sqlite:///{folder}/{{service}}.db",
                    **env,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def log(self) -> str:
        return self.path.read_text(errors="replace")

    async def shows(self, text: str, times: int = 1) -> None:
        await until(lambda: self.log.count(text) >= times, f"{text!r} in the log:\n{self.log}", 30)

    async def ends(self) -> int:
        return await asyncio.to_thread(self.process.wait, 15)

    def entry(self, event: str) -> dict[str, Any]:
        return next(found for line in self.log.splitlines() if (found := json.loads(line))["event"] == event)

    def ask(self, path: str) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(
                f"http://{self.entry('process.starting')['health']}{path}", timeout=10
            ) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)


Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    begun: list[Process] = []

    def start(*arguments: str, **env: str) -> Process:
        begun.append(Process(tmp_path, *arguments, **env))
        return begun[-1]

    yield start
    for process in begun:
        if process.process.poll() is None:
            process.process.kill()
            process.process.wait()


@pytest.mark.parametrize("kind", ["hang", "deaf", "thread", "block"])
async def test_one_signal_ends_a_process_whose_handlers_hang_and_says_what_becomes_of_it(
    start: Start, kind: str
) -> None:
    process = start(kind)
    # Of both services, so that the start is over: one that is interrupted drains nothing. A blocked loop begins one.
    await process.shows("handler.began", times=1 if kind == "block" else 2)
    process.process.send_signal(signal.SIGTERM)
    assert await process.ends() == 0
    assert "comes again at the next start" in process.log
    assert '"stream": "begun-1"' in process.log
    assert "Traceback" not in process.log


@pytest.mark.parametrize("kind", ["hang", "thread", "block"])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_second_signal_ends_the_process_at_once(
    start: Start, kind: str, number: signal.Signals, status: int
) -> None:
    process = start(kind)
    await process.shows("handler.began")

    def ended() -> bool:  # asked again and again, because two signals that meet are one
        if process.process.poll() is None:
            process.process.send_signal(number)
        return process.process.poll() is not None

    await until(ended, "the end")
    assert await process.ends() == status
    assert process.entry("process.ended_at_once")["signal"] == number.name


async def test_an_idle_process_drains_and_is_ready_until_then(start: Start) -> None:
    process = start("quick")
    await process.shows("handler.began", times=2)
    await until(lambda: process.ask("/ready")[0] == 200, "ready")
    status, answer = process.ask("/live")
    assert (status, answer["status"]) == (200, "ok")
    process.process.send_signal(signal.SIGINT)
    assert await process.ends() == 0
    assert process.entry("process.stopped")["services"] == ["one", "two"]


async def test_a_signal_while_the_broker_is_away_stops_cleanly(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start("quick", "relay", TIDINGS_BUS=f"amqp://guest:hidden@127.0.0.1:{port}")
    await process.shows("bus.unreachable")
    status, answer = process.ask("/ready")
    assert status == 503
    assert {"one.bus", "relay.main.bus"} & {check["name"] for check in answer["checks"] if not check["ok"]}
    assert process.ask("/live")[0] == 200
    process.process.send_signal(signal.SIGTERM)
    assert await process.ends() == 0
    assert "Traceback" not in process.log
    assert "hidden" not in process.log + str(answer)


async def test_a_signal_while_the_store_is_locked_stops_cleanly(start: Start, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "log.db", isolation_level=None)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        process = start("quick")
        await process.shows("process.starting")
        process.process.send_signal(signal.SIGINT)
        assert await process.ends() == 0
    assert "Traceback" not in process.log


async def test_over_rabbitmq_a_hanging_handler_is_left_and_comes_again(start: Start, amqp_url: str) -> None:
    process = start("hang", "relay", TIDINGS_BUS=amqp_url)
    await process.shows("handler.began", times=2)
    process.process.send_signal(signal.SIGTERM)
    assert await process.ends() == 0
    again = start("quick", "relay", TIDINGS_BUS=amqp_url)
    await again.shows("handler.began", times=2)
    await until(lambda: again.ask("/ready")[0] == 200, "ready")
    again.process.send_signal(signal.SIGTERM)
    assert await again.ends() == 0


async def test_a_script_with_a_runtime_ends_with_one_keyboard_interrupt(start: Start) -> None:
    process = start("quick", "bare")
    await process.shows("handler.began")
    process.process.send_signal(signal.SIGINT)
    assert await process.ends() != 0
    assert process.log.rstrip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in process.log
    assert "Exception ignored" not in process.log


async def test_a_health_port_in_use_is_refused_before_anything_is_handled() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigurationError, match=rf"127.0.0.1:{port}.*another port"):
            await serve(Service("never"), health=port)


@pytest.mark.parametrize("frozen", [False, True], ids=["by serve", "by the application"])
async def test_the_collector_spares_what_a_process_begins_with_until_it_ends(
    frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[bool] = []

    @asynccontextmanager
    async def stopping() -> AsyncIterator[None]:
        async def stop() -> None:
            await until(lambda: gc.get_freeze_count() > 0, "the collector spares nothing", 30)
            await until(lambda: gc.get_threshold()[0] == YOUNG, "it looks through what is in flight too often", 30)
            seen.append(True)
            signal.raise_signal(signal.SIGTERM)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(stop())
            yield

    if frozen:
        gc.freeze()
    before = gc.get_threshold()
    try:
        await serve(Service("idle"), beside=[stopping()])
        assert seen == [True]
        assert gc.get_threshold() == before
        assert (gc.get_freeze_count() > 0) is frozen
    finally:
        gc.unfreeze()
