"""A server of this machine for tests, started by a script of `deploy/local`; how one is found, or missed loudly.

It knows no product. What it started it ends, even when the tests are killed; it touches nothing else.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NoReturn, Self

import pytest

__all__ = ["LocalServer", "docker_answers", "missing", "script_of"]

_SCRIPTS: Final = Path(__file__).parents[3] / "deploy" / "local"


def script_of(product: str) -> Path | None:
    """`deploy/local/PRODUCT`, in a checkout."""
    script = _SCRIPTS / product
    return script if script.exists() else None


def missing(reason: str) -> NoReturn:
    """Skip the test; with `CI=true`, fail it."""
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def docker_answers() -> bool:
    """Whether an engine is there to start containers."""
    if shutil.which("docker") is None:
        return False
    return subprocess.run(["docker", "info"], capture_output=True, timeout=20, check=False).returncode == 0


class LocalServer:
    """For one test session or for tests that harm it.

    Every method blocks until it is done; in an event loop that must go on, use `await asyncio.to_thread(node.restart)`.
    A guard process ends it even if the tests are killed.
    """

    product: str
    at_the_end: tuple[str, ...] = ("--kill",)
    """How `close` ends it: the quickest way that leaves nothing behind."""
    """Its script in `deploy/local`."""

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        """`settings` are lines for its configuration."""
        script = script_of(self.product)
        if script is None:
            raise FileNotFoundError(
                f"{_SCRIPTS / self.product}: a server can only be started from a checkout of Tidings"
            )
        self._command = [sys.executable, str(script)]
        self._settings = [f"--set={name}={value}" for name, value in (settings or {}).items()]
        self.folder = tempfile.mkdtemp(prefix=f"tidings-{self.product}-")
        """`TIDINGS_LOCAL` for whoever calls the script itself."""
        self._guard: subprocess.Popen[bytes] | None = None
        self._runs = self._paused = False
        self.url = ""
        """Stays the same over stops and starts."""

    def start(self) -> None:
        """Start it, or start it again with its data; returns when it accepts connections."""
        if self._guard is None:
            self._guard = subprocess.Popen(
                [*self._command, "guard"], env=self._env(), stdin=subprocess.PIPE, start_new_session=True
            )
        port = [] if self.url else ["--port=0"]
        self.url = self._run("up", *self._size(), *port, *self._settings).splitlines()[-1]
        self._runs = True

    def stop(self) -> None:
        """Stop it in good order; connections are closed with a word of why."""
        self._runs = False
        self._run("down")

    def kill(self) -> None:
        """SIGKILL: connections break, and nothing is flushed."""
        self._runs = False
        self._run("down", "--kill")

    def restart(self) -> None:
        """`stop`, then `start`."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """SIGSTOP: connections stay open and nothing answers."""
        self._paused = True
        self._run("pause")

    def resume(self) -> None:
        """SIGCONT after `pause`."""
        self._run("resume")
        self._paused = False

    def mend(self) -> None:
        """A test that failed may leave it stopped or paused: it runs again."""
        if self._paused:
            self.resume()
        if not self._runs:
            self.start()

    def close(self) -> None:
        """End it and forget its data."""
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
        """More arguments of `up`."""
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
