"""What a script of `deploy/local` keeps in its folder: one file of state, written whole, and a lock. It starts nothing.

The state is the script's own; it holds passwords, so nobody else may read the folder's file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Kept", "private"]


class Kept:
    """In the folder TIDINGS_LOCAL, or else in `default` of this checkout, wherever the script is called."""

    def __init__(self, default: str) -> None:
        named = os.environ.get("TIDINGS_LOCAL")
        self.home = Path(named).absolute() if named else Path(__file__).resolve().parents[2] / default
        self._file = self.home / "state.json"

    def read(self) -> dict[str, Any] | None:
        """None before the first `write`."""
        return json.loads(self._file.read_text()) if self._file.exists() else None

    def write(self, state: dict[str, Any]) -> None:
        private(self._file.with_suffix(".new"), json.dumps(state, indent=2)).replace(self._file)

    @contextlib.contextmanager
    def alone(self, mode: int = 0o700) -> Iterator[None]:
        """One `up` or `down` at a time: a second one waits, and then finds what the first has done."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.home.chmod(mode)
        with (self.home / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def private(file: Path, text: str) -> Path:
    """A file that only this user may read."""
    file.touch(mode=0o600)
    file.write_text(text)
    return file
