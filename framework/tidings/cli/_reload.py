"""Serve in a child process, and start it again when a .py file changes. The parent imports nothing of the user's.

A child that ends with an error waits for the next change. Watching compares modification times twice a second: a few
milliseconds for a thousand files, on every platform, without a dependency.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from tidings.cli._exits import INTERRUPTED, OK

__all__ = ["python_files", "serve_with_reload"]

POLL_SECONDS: Final = 0.5
AT_ONCE_SECONDS: Final = 1.0
"""So long a child has after a second signal to say what it leaves."""
DRAIN_SECONDS: Final = 10.0
"""A child that takes longer to drain is killed: what it had not committed is done again."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def python_files(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Path, time of modification and size of each .py file below; not in hidden folders and virtual environments."""
    waiting = [str(folder)]
    while waiting:
        try:
            entries = list(os.scandir(waiting.pop()))
        except OSError:  # removed meanwhile, or not ours to read
            continue
        if any(entry.name == "pyvenv.cfg" for entry in entries):
            continue
        for entry in entries:
            try:
                if entry.is_dir(follow_symlinks=False):
                    if not entry.name.startswith((".", "__pycache__", "node_modules")):
                        waiting.append(entry.path)
                elif entry.name.endswith(".py"):
                    found = entry.stat()
                    yield entry.path, found.st_mtime_ns, found.st_size
            except OSError:
                continue


def serve_with_reload(command: Sequence[str], folder: Path | None = None) -> int:
    """Run `tidings COMMAND` again and again; the exit code, when a signal ends it."""
    folder = folder or Path.cwd()
    heard, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    for number in _SIGNALS:
        signal.signal(number, _heard)
    try:
        return _Reloader([sys.executable, "-m", "tidings", command[0], "--leash", *command[1:]], folder, heard).run()
    finally:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
        signal.set_wakeup_fd(-1)
        os.close(heard)
        os.close(tell)


def _heard(number: int, frame: object) -> None:
    """Python has written the number into the pipe."""


class _Reloader:
    def __init__(self, command: Sequence[str], folder: Path, heard: int) -> None:
        self._command = command
        self._folder = folder
        self._heard = heard
        self._child: subprocess.Popen[bytes] | None = None
        self._files: set[tuple[str, int, int]] = set()

    def run(self) -> int:
        self._start()
        try:
            while True:
                if number := self._signal(POLL_SECONDS):
                    return self._end(number)
                if self._child is not None and self._child.poll() is not None:
                    code, self._child = self._child.returncode, None
                    if code == OK:
                        return OK
                    self._say(f"ended with {code}; waiting for a change in a .py file below {self._folder}")
                if changed := self._changed():
                    self._say(f"{changed} changed, starting again")
                    if self._stop() is None:
                        return INTERRUPTED
                    self._start()
        finally:
            if self._child is not None:
                self._child.kill()
                self._child.wait()

    def _start(self) -> None:
        self._files = set(python_files(self._folder))
        # A group of its own: a terminal's Ctrl-C then reaches only us, and the child hears of it once, from us. Its
        # standard input, on which nothing is ever written, ends with us, and so does it.
        self._child = subprocess.Popen(self._command, stdin=subprocess.PIPE, process_group=0)

    def _stop(self, number: int = signal.SIGTERM) -> int | None:
        """Let the child drain; its exit code. None when a second signal came meanwhile."""
        child, self._child = self._child, None
        if child is None:
            return OK
        child.send_signal(number)
        for _ in range(int(DRAIN_SECONDS / 0.05)):
            if child.poll() is not None:
                return child.returncode
            if again := self._signal(0.05):
                child.send_signal(again)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(AT_ONCE_SECONDS)
                child.kill()
                child.wait()
                return None
        self._say(f"it did not drain within {DRAIN_SECONDS:g} s, killing it")
        child.kill()
        return child.wait()

    def _end(self, number: int) -> int:
        code = self._stop(number)
        if code is None:
            return INTERRUPTED
        if code in (-number, INTERRUPTED):
            return OK  # ended by the signal itself, which came before there was anything to drain
        return code if code >= 0 else 128 - code

    def _changed(self) -> str | None:
        """The name of a file that changed, came or went."""
        found = set(python_files(self._folder))
        if found == self._files:
            return None
        path = min(found ^ self._files)[0]
        self._files = found
        return os.path.relpath(path, self._folder)

    def _signal(self, seconds: float) -> int:
        """Wait for a signal, but no longer; 0 when none came."""
        ready, _, _ = select.select([self._heard], [], [], seconds)
        return os.read(self._heard, 1)[0] if ready else 0

    @staticmethod
    def _say(text: str) -> None:
        print(f"tidings: {text}", file=sys.stderr, flush=True)
