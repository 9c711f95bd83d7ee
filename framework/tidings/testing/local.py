"""A server on this machine for tests, started by a script of `deploy/local`, and what to do if there is none.

It knows no product. It ends the server that it started, even when the tests are killed, and touches nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, NoReturn, Self

import pytest

__all__ = ["LocalServer", "docker_answers", "guarded", "missing", "script_of"]

_PLACES: Final = (Path(__file__).parent / "servers", Path(__file__).parents[3] / "deploy" / "local")
"""Folders of the scripts that start servers: in an installed wheel, and in a checkout."""


def script_of(product: str) -> Path | None:
    """Return the script that starts this product; None for one that has none."""
    return next((folder / product for folder in _PLACES if (folder / product).exists()), None)


def missing(reason: str) -> NoReturn:
    """Skip the test; with `CI=true`, fail it."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def docker_answers() -> bool:
    """Return whether a Docker engine answers."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False).returncode == 0


_GUARD: Final = """
import subprocess, sys, threading
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=sys.stderr)
threading.Thread(target=lambda: (sys.stdin.read(), child.kill()), daemon=True).start()
sys.exit(child.wait())
"""
"""A program that runs another one until its standard input ends."""


@contextmanager
def guarded(command: Sequence[str], said: Path) -> Iterator[Callable[[], bool]]:
    """Run a server around the block. What it prints goes to the file `said`. Yields a function that returns whether it
    has ended. A guard process kills it at the end, and also when the tests are killed."""
    guard = [sys.executable, "-c", _GUARD, *command]
    with (
        said.open("wb") as file,
        subprocess.Popen(guard, stdin=subprocess.PIPE, stderr=file, start_new_session=True) as process,
    ):
        try:
            yield lambda: process.poll() is not None
        finally:
            process.communicate()


class LocalServer:
    """A server for one test session, or for tests that harm it.

    Every method blocks until it is done. If an event loop must go on, use `await asyncio.to_thread(node.restart)`. A
    guard process ends the server even if the tests are killed.
    """

    product: str
    """Name of its script in `deploy/local`."""
    at_the_end: tuple[str, ...] = ("--kill",)
    """Options of `down` for `close`: the quickest way that leaves nothing behind."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        """Prepare a server. `settings` are lines for its configuration."""
        script = script_of(self.product)
        if script is None:
            raise FileNotFoundError(
                f"{_PLACES[0] / self.product}: Tidings is not installed completely: install it again"
            )
        self._command = [sys.executable, str(script)]
        self._settings = [f"--set={name}={value}" for name, value in (settings or {}).items()]
        self.folder = tempfile.mkdtemp(prefix=f"tidings-{self.product}-")
        """The value of `TIDINGS_LOCAL` for a caller of the script."""
        self._guard: subprocess.Popen[bytes] | None = None
        self._runs = self._paused = False
        self.url = ""
        """The server's URL. Stopping and starting does not change it."""

    def start(self) -> None:
        """Start it, or start it again with its data. Returns when it accepts connections."""
        if self._guard is None:
            self._guard = subprocess.Popen(
                [*self._command, "guard"], env=self._env(), stdin=subprocess.PIPE, start_new_session=True
            )
        port = [] if self.url else ["--port=0"]
        self.url = self._run("up", *self._size(), *port, *self._settings).splitlines()[-1]
        self._runs = True

    def stop(self) -> None:
        """Stop it cleanly: it closes connections with a reason."""
        self._runs = False
        self._run("down")

    def kill(self) -> None:
        """Kill it with SIGKILL: connections break, and nothing is flushed."""
        self._runs = False
        self._run("down", "--kill")

    def restart(self) -> None:
        """Stop it cleanly and start it again."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Pause it with SIGSTOP: connections stay open, and nothing answers."""
        self._paused = True
        self._run("pause")

    def resume(self) -> None:
        """Continue after `pause`, with SIGCONT."""
        self._run("resume")
        self._paused = False

    def mend(self) -> None:
        """Make it run again if a failed test left it stopped or paused."""
        if self._paused:
            self.resume()
        if not self._runs:
            self.start()

    def close(self) -> None:
        """End it and delete its data."""
        if self._guard is not None:
            self._run("down", *self.at_the_end)
            self._guard.communicate()
            self._guard = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _size(self) -> list[str]:
        """Return further arguments of `up`."""
        return []

    def _env(self) -> dict[str, str]:
        return os.environ | {"TIDINGS_LOCAL": self.folder}

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self._command, *arguments],
            env=self._env(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=150,  # seconds: longer than the script's own patience
        )
        if done.returncode != 0:
            error = subprocess.CalledProcessError(done.returncode, arguments[0], done.stdout, done.stderr)
            error.add_note((done.stdout + done.stderr).decode(errors="replace"))
            raise error
        return done.stdout.decode()
