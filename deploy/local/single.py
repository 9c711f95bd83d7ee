"""The commands of a script of `deploy/local` whose server is one process. It knows no product: a `Server` says how.

It never touches a server that it did not start.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import machine
from kept import Kept, private
from machine import fail, free_port, runs, wait_for

__all__ = ["PROGRAMS", "Server", "State", "installing", "run"]

State = dict[str, Any]
"""`password`; `port`; `process`; whatever the server keeps beside them."""


def _programs() -> Path:
    named = os.environ.get("TIDINGS_LOCAL_PROGRAMS")
    return Path(named).absolute() if named else Path(__file__).resolve().parents[2] / "var" / "programs"


PROGRAMS = _programs()
"""Folder of programs that a script has installed."""


@contextmanager
def installing() -> Iterator[Path]:
    """A folder for what is needed on the way, while nobody else installs. Look again whether it is still missing."""
    PROGRAMS.mkdir(parents=True, exist_ok=True)
    with (PROGRAMS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with tempfile.TemporaryDirectory(dir=PROGRAMS) as scratch:
            yield Path(scratch)


class Server(ABC):
    """One product. `kept` is its folder; `state` what is kept there."""

    name: str
    """Of its script."""
    title: str
    """As people know it."""
    port: int
    """The usual one."""
    ready_within = 60.0
    """Seconds until it must accept clients."""
    logs = "server.log"
    """What it prints, in its folder."""

    def __init__(self) -> None:
        self.kept = Kept(f"var/{self.name}")

    @abstractmethod
    def install(self) -> None:
        """Install its programs, unless they are there; fail with what to do where that cannot be done."""

    @abstractmethod
    def url(self, state: State) -> str:
        """Where clients find it, with the password."""

    @abstractmethod
    def prepare(self, state: State, settings: dict[str, str]) -> list[str]:
        """Write its configuration and make its data, unless they are there. Return the command line."""

    @abstractmethod
    def is_ready(self, state: State) -> bool:
        """Whether it speaks its protocol on its port."""


def run(server: Server, doc: str) -> int:
    parser = argparse.ArgumentParser(prog=server.name, description=doc, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = {
        name: commands.add_parser(name)
        for name in ("up", "install", "down", "status", "url", "logs", "pause", "resume", "guard")
    }
    command["up"].add_argument("--port", type=int, help=f"default: what it had, {server.port}, or any (0: any)")
    command["up"].add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for its configuration")
    command["down"].add_argument("--kill", action="store_true")
    options = parser.parse_args()
    match options.command:
        case "install":
            server.install()
            return 0
        case "up":
            with server.kept.alone():
                return _up(server, options.port, dict(text.split("=", 1) for text in options.set))
        case "down":
            return _down(server, signal.SIGKILL if options.kill else signal.SIGTERM)
        case "guard":
            sys.stdin.buffer.read()
            return _down(server, signal.SIGKILL)
    return _of_running(server, options.command)


def _of_running(server: Server, command: str) -> int:
    """The commands that need a server."""
    state = server.kept.read()
    if state is None or not runs(state["process"]):
        fail(f"does not run: deploy/local/{server.name} up")
    match command:
        case "status":
            return _status(server, state)
        case "url":
            print(server.url(state))
        case "logs":
            return subprocess.call(["tail", "-n", "200", "-F", str(server.kept.home / server.logs)])
        case "pause":
            machine.signal_all([state["process"]], signal.SIGSTOP)
            wait_for(partial(machine.all_stopped, state["process"]["pid"]), 10, "it did not stop")
        case "resume":
            machine.signal_all([state["process"]], signal.SIGCONT)
    return 0


def _condition(server: Server, state: State) -> str:
    if not runs(state["process"]):
        return "does not run"
    if machine.all_stopped(state["process"]["pid"]):
        return "is paused"
    return "runs" if server.is_ready(state) else "does not answer"


def _status(server: Server, state: State) -> int:
    found = _condition(server, state)
    remedies = {
        "does not run": f"deploy/local/{server.name} up",
        "is paused": f"deploy/local/{server.name} resume",
        "does not answer": f"it starts, or recovers after a crash; see {server.kept.home / server.logs}",
    }
    print(f"runs on {server.url(state)}" if found == "runs" else f"{found}: {remedies[found]}")
    return 0 if found == "runs" else 1


def _up(server: Server, port: int | None, settings: dict[str, str]) -> int:
    state = server.kept.read() or {"password": secrets.token_urlsafe(18), "port": 0, "process": None}
    match _condition(server, state):
        case "is paused":
            fail(f"it is paused:  deploy/local/{server.name} resume")
        case "does not run":
            server.install()
            state["port"] = _choose(server, port, state["port"])
            _start(server, state, settings)
        case _ if port and port != state["port"]:
            found = state["port"]
            down = f"deploy/local/{server.name} down"
            fail(f"it runs already, on port {found}. For another:  {down}, then up --port {port}")
        case _:
            log = server.kept.home / server.logs
            wait_for(lambda: server.is_ready(state), server.ready_within, f"it does not get ready; see {log}")
    print(server.url(state))
    return 0


def _choose(server: Server, port: int | None, before: int) -> int:
    wanted = port if port is not None else before or server.port
    if port == 0:
        wanted = before
    found = free_port(wanted)
    if wanted and found != wanted:
        complaint = f"port {wanted} of 127.0.0.1 is taken ({machine.holder_of(wanted)})"
        if port:
            fail(f"{complaint}; give another, or leave --port out")
        print(f"{complaint}; it takes {found}", file=sys.stderr)
    return found


def _start(server: Server, state: State, settings: dict[str, str]) -> None:
    home = server.kept.home
    command = server.prepare(state, settings)
    file = home / server.logs
    with private(file, file.read_text(errors="replace") if file.exists() else "").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=home, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    state["process"] = machine.process_of(process.pid)
    server.kept.write(state)

    def ready() -> bool:
        if process.poll() is not None:
            last = file.read_text(errors="replace")[-1000:]
            fail(f"it ended while it started (code {process.returncode}):\n{last}")
        return server.is_ready(state)

    try:
        wait_for(
            ready, server.ready_within, f"{server.title} was not ready within {server.ready_within:g} s; see {file}"
        )
    except BaseException:  # it is not left behind half started
        machine.end(state["process"], signal.SIGKILL)
        raise


def _down(server: Server, how: signal.Signals) -> int:
    if not server.kept.home.exists():
        return 0
    with server.kept.alone():  # an `up` under way ends before
        state = server.kept.read()
        if state is not None:
            machine.end(state["process"], how)
            state["process"] = None
            server.kept.write(state)
    return 0
