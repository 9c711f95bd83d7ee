"""The command line `tidings`. Importing it imports no command; what only one command needs is imported by that one."""

from __future__ import annotations

import sys
from importlib.util import find_spec

__all__ = ["main"]


def main() -> None:
    """The console script. Never returns: it exits with a code of `tidings.cli.exits`."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        print(f"tidings: the command line needs {' and '.join(missing)}: pip install 'tidings[cli]'", file=sys.stderr)
        sys.exit(2)
    from tidings.cli.app import app

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what a terminal cannot show is escaped, not an error
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="tidings")
