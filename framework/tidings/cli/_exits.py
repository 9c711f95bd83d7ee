"""How commands end: with an exit code, and an error as one or two lines with the remedy.

There is no traceback, except with `TIDINGS_DEBUG=1` or `tidings --debug COMMAND`.
"""

from __future__ import annotations

import asyncio
import errno
import os
import sys
import traceback
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import Any, Final, ParamSpec

import typer

from tidings._support.escaping import plain_lines
from tidings._support.tasks import leading
from tidings.cli._output import facts, plain
from tidings.errors import (
    BusUnavailable,
    ConfigurationError,
    DatabaseUnavailable,
    InvalidStreamName,
    LogBehind,
    LogChanged,
    StoreUnavailable,
    TidingsError,
)
from tidings.settings import DEBUG

__all__ = [
    "DEFECT",
    "INTERRUPTED",
    "NO",
    "OK",
    "TABLE",
    "UNAVAILABLE",
    "USAGE",
    "Refused",
    "answering",
    "code_of",
    "complain",
]

OK: Final = 0
NO: Final = 1
USAGE: Final = 2
UNAVAILABLE: Final = 3
DEFECT: Final = 70
"""EX_SOFTWARE of sysexits.h."""
INTERRUPTED: Final = 130
"""128 + SIGINT, as shells say it."""

TABLE: Final = """\b
Exit codes:
  0    done; for a command that serves: drained after Ctrl-C or SIGTERM
  1    the answer is no: not settled, different, unhealthy, not found, refused
  2    wrong usage or configuration
  3    something is unavailable: store, bus, database, port
  70   an unexpected error, in Tidings or in your code
  130  ended by Ctrl-C; for a command that serves: by the second one
"""

P = ParamSpec("P")


class Refused(Exception):
    """An error of the command line itself, with its exit code and text."""

    def __init__(self, code: int, text: str) -> None:
        self.code = code
        super().__init__(text)


def code_of(error: BaseException) -> int:
    """Return the exit code of a command that ended with this error."""
    match error:
        case Refused():
            return error.code
        case ConfigurationError(__cause__=OSError(errno=errno.EADDRINUSE)):
            return UNAVAILABLE
        case ConfigurationError() | InvalidStreamName() | LogChanged() | LogBehind():
            return USAGE
        case StoreUnavailable() | BusUnavailable() | DatabaseUnavailable():
            return UNAVAILABLE
        case TidingsError():
            return NO
        case KeyboardInterrupt() | typer.Abort():
            return INTERRUPTED
        case _:
            return DEFECT


def complain(error: BaseException) -> int:
    """Write to standard error what went wrong, and return the exit code."""
    error = leading(error)
    code = code_of(error)
    if os.environ.get(DEBUG) and not isinstance(error, typer.Abort):
        print(plain_lines("".join(traceback.format_exception(error)).rstrip()), file=sys.stderr)
    elif code == DEFECT:
        # A library's message may have many lines: the first one is enough.
        said = str(error).strip().partition("\n")[0]
        print(f"tidings: unexpected {type(error).__name__}: {plain(said)}", file=sys.stderr)
        print(f"{DEBUG}=1 shows where it comes from.", file=sys.stderr)
    elif code != INTERRUPTED:
        print(f"tidings: {plain(' '.join(str(error).split()))}", file=sys.stderr)
    return code


def answering(
    command: Callable[P, Coroutine[Any, Any, int | None]] | Callable[P, int | None],
) -> Callable[P, None]:
    """Make a function a command: run it, in an event loop if it is async, and exit with what it returns (None is 0)."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            outcome = command(*args, **kwargs)
            code = asyncio.run(_looking(outcome)) if isinstance(outcome, Coroutine) else outcome
            sys.stdout.flush()
        except BrokenPipeError:
            # The reader has seen enough (`| head`). Without this, Python would report an error when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = OK
        except (Exception, KeyboardInterrupt, asyncio.CancelledError) as error:
            if isinstance(error, typer.Exit | typer.BadParameter):
                raise
            code = complain(error)
            if kwargs.get("json") and code != INTERRUPTED:
                print(_as_json(leading(error), code))
        sys.stderr.flush()
        raise typer.Exit(code or OK)

    return run


def _as_json(error: BaseException, code: int) -> str:
    """Return the error as a JSON object, for programs that read standard output."""
    kind = "Refused" if isinstance(error, Refused) else type(error).__name__
    return facts({"error": kind, "message": " ".join(str(error).split()), "exit_code": code})


async def _looking(work: Coroutine[Any, Any, int | None]) -> int | None:
    """Run a command that answers: it logs only warnings and errors, to standard error."""
    from tidings.logs import configure_logging

    configure_logging(level="warning")
    return await work
