"""The command line `tidings`. Importing it imports no command; each command imports what it needs.

Internal: its public face is the command. Nothing imports it.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib.util import find_spec

__all__ = ["main"]


_SERVE = {"run", "relay", "dev", "server"}


def _end(number: int, frame: object) -> None:
    """Exit with code 0: a command that is to serve has not begun anything yet, so there is nothing to drain.

    Once it serves, `tidings.hosting.signals` handles signals.
    """
    os._exit(0)


def main() -> None:
    """Run the console script. Never returns: it exits with a code from `tidings.cli._exits`."""
    if _SERVE.intersection(sys.argv[1:]):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _end)
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        print(f"tidings: the command line needs {' and '.join(missing)}: pip install 'tidings[cli]'", file=sys.stderr)
        sys.exit(2)
    from tidings.cli._app import app

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters that a terminal cannot show are escaped, not an error
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="tidings")
