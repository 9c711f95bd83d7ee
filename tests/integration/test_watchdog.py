"""A process that was stopped is told from an event loop that a handler blocks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tidings.hosting.watchdog import _Moment

pytestmark = pytest.mark.timeout(300)

CHILD = """
import asyncio, sys, time, structlog
from tidings.hosting.watchdog import Watchdog

structlog.configure(processors=[structlog.processors.JSONRenderer()])

async def main():
    with Watchdog("audit", lambda: ["pack"], seconds=0.2):
        await asyncio.sleep(0.2)
        print('{"event": "ready"}', flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        share = 1.0 if sys.argv[1:] == [] else 0.0
        while share < 0.3:  # where the machine has no CPU time for it, it is stopped rather than busy
            began, worked = time.monotonic(), time.process_time()
            sum(range(60_000_000))  # one call in C: no other thread runs meanwhile
            share = (time.process_time() - worked) / (time.monotonic() - began)
            await asyncio.sleep(0.5)
        await asyncio.sleep(0.5)

asyncio.run(main())
"""


def child(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    while json.loads(process.stdout.readline())["event"] != "ready":  # a busy machine may stop it before
        pass
    return process


def told(process: subprocess.Popen[str]) -> list[dict[str, Any]]:
    said, _ = process.communicate("go on\n", timeout=240)
    assert process.returncode == 0
    return [json.loads(line) for line in said.splitlines()]


def test_a_process_that_was_stopped_blames_no_handler() -> None:
    process = child()
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(1.5)
    os.kill(process.pid, signal.SIGCONT)
    entries = told(process)
    (stopped,) = [entry for entry in entries if entry["event"] == "process.was_stopped" and entry["seconds"] >= 1.4]
    assert stopped["service"] == "audit"
    assert "no handler is to blame" in stopped["advice"]
    assert [entry for entry in entries if entry["event"] == "loop.blocked"] == []


def test_a_handler_that_lets_no_thread_run_is_blamed_for_it() -> None:
    entries = told(child("compute"))
    blocked = [entry for entry in entries if entry["event"] == "loop.blocked"]
    assert blocked
    assert all(entry["handlers"] == ["pack"] for entry in blocked)


def test_a_suspended_machine_is_a_stopped_process_though_its_clock_stood_still() -> None:
    before = _Moment(running=100.0, passed=500.0, worked=7.0)
    assert not _Moment(running=100.6, passed=4100.0, worked=7.5).since(before).busy
    assert _Moment(running=103.0, passed=503.0, worked=9.9).since(before).busy
