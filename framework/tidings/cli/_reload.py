"""Serves in a child process, and starts it again when a .py file changes. The parent imports no code of the user.

After a child has ended with an error, it waits for the next change. watchfiles tells what changes: if the system sends
no notifications, as in some containers, set WATCHFILES_FORCE_POLLING=true.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, cast

from watchfiles import Change, watch

from tidings.cli._exits import INTERRUPTED, NO, OK

__all__ = ["is_code", "serve_with_reload"]

LOOK_SECONDS: Final = 0.1
"""Seconds until the end of a child is noticed while no file changes."""
GATHER_SECONDS: Final = 0.5
"""Seconds within which several changes, such as those of a checkout, count as one."""
AT_ONCE_SECONDS: Final = 1.0
"""Seconds that a child has after a second signal to log what it leaves."""
DRAIN_SECONDS: Final = 10.0
"""Seconds after which a draining child is killed. What it had not committed is done again."""
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


def is_code(folder: Path, change: Change, path: str) -> bool:
    """Return whether a change below the folder is one of code: a .py file, or a new directory with such files.

    Hidden directories, caches and virtual environments do not count.
    """
    changed = Path(path)
    above = [folder / part for part in reversed(changed.relative_to(folder).parents)]
    for directory in above:
        if directory.name.startswith((".", "__pycache__", "node_modules")) and directory != folder:
            return False
        if (directory / "pyvenv.cfg").exists():
            return False
    if changed.suffix == ".py":
        return True
    if (
        change is not Change.added or not changed.is_dir()
    ):  # only the directory is named if it was moved here as a whole
        return False
    return any(is_code(folder, change, str(file)) for file in changed.rglob("*.py"))


def serve_with_reload(command: Sequence[str], folder: Path | None = None) -> int:
    """Run `tidings COMMAND`, again after each change, until a signal; return the exit code."""
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
    """Do nothing: Python has written the signal's number into the pipe."""


class _Reloader:
    def __init__(self, command: Sequence[str], folder: Path, heard: int) -> None:
        self._command = command
        self._folder = folder.resolve()
        self._heard = heard
        self._child: subprocess.Popen[bytes] | None = None

    def run(self) -> int:
        changes = watch(
            self._folder,
            watch_filter=None,  # with a filter, changes of other files would suppress the timeouts, too
            debounce=int(GATHER_SECONDS * 1000),
            rust_timeout=int(LOOK_SECONDS * 1000),
            yield_on_timeout=True,
            stop_event=cast("Any", self),
            raise_interrupt=False,
            ignore_permission_denied=True,
        )
        try:
            try:
                next(changes, None)  # begin to watch before the child reads its code
            except OSError as error:  # such as the system's limit of watched directories
                self._say(
                    f"changes below {self._folder} cannot be watched: {error}. Set WATCHFILES_FORCE_POLLING=true to "
                    "look for them instead, or run without reloading"
                )
                return NO
            if not self.is_set():
                self._start()
            for found in changes:
                if self._child is not None and self._child.poll() is not None:
                    code, self._child = self._child.returncode, None
                    if code == OK:
                        return OK
                    self._say(f"ended with {code}; waiting for a change in a .py file below {self._folder}")
                files = sorted(path for change, path in found if is_code(self._folder, change, path))
                if files:
                    self._say(f"{os.path.relpath(files[0], self._folder)} changed, starting again")
                    if self._stop() is None:
                        return INTERRUPTED
                    self._start()
            return self._end(self._signal(0))
        finally:
            changes.close()
            if self._child is not None:
                self._child.kill()
                self._child.wait()

    def _start(self) -> None:
        # The child gets a process group of its own, so that a terminal's Ctrl-C reaches only this process, which passes
        # it on once. Nothing is written to the child's standard input: when this process ends, it ends, and the child.
        self._child = subprocess.Popen(self._command, stdin=subprocess.PIPE, process_group=0)

    def _stop(self, number: int = signal.SIGTERM) -> int | None:
        """Let the child drain, and return its exit code; None if a second signal came meanwhile."""
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

    def is_set(self) -> bool:
        """Return whether a signal has come: then watchfiles, which calls this, stops."""
        return bool(select.select([self._heard], [], [], 0)[0])

    def _signal(self, seconds: float) -> int:
        """Wait for a signal for at most `seconds`, and return its number; 0 if none came."""
        ready, _, _ = select.select([self._heard], [], [], seconds)
        return os.read(self._heard, 1)[0] if ready else 0

    @staticmethod
    def _say(text: str) -> None:
        print(f"tidings: {text}", file=sys.stderr, flush=True)
