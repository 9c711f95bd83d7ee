"""The options that select held events or dead letters, and the code that reads them."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final, Generic, TypeVar

import typer

from tidings.cli._exits import USAGE, Refused

if TYPE_CHECKING:
    from tidings.operations.selection import Selection

__all__ = [
    "BIGGEST",
    "All",
    "Choice",
    "DryRun",
    "Error",
    "HandlerName",
    "Key",
    "Limit",
    "Since",
    "Stream",
    "Type",
    "Until",
    "selected",
]

T = TypeVar("T")

BIGGEST: Final = 2**63 - 1
"""The highest integer that databases store."""
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

_TIME: Final = "A time in ISO 8601, UTC if it names no zone, or how long ago: 90s, 20m, 2h, 1d."

HandlerName = Annotated[str | None, typer.Option("--handler", metavar="NAME", help="Only those of this handler.")]
Error = Annotated[
    str | None,
    typer.Option("--error", metavar="TEXT", help="Only where the reason contains this: an error's type, or its words."),
]
Type = Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Only events of this type.")]
Key = Annotated[str | None, typer.Option("--key", metavar="KEY", help="Only those of this partition key.")]
Stream = Annotated[str | None, typer.Option("--stream", metavar="STREAM", help="Only events of this stream.")]
Since = Annotated[
    str | None, typer.Option("--since", metavar="TIME", help=f"Only those held or dead since then. {_TIME}")
]
Until = Annotated[
    str | None, typer.Option("--until", metavar="TIME", help="Only those held or dead since before then.")
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, max=BIGGEST, help="At most this many, the oldest first.")]
All = Annotated[bool, typer.Option("--all", help="All of the service.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and change nothing.")]


def selected(
    handler: str | None,
    error: str | None,
    type: str | None,
    key: str | None,
    stream: str | None,
    since: str | None,
    until: str | None,
) -> Selection:
    """Return what the options select. Raises `Refused` for a time that cannot be read."""
    from tidings.operations.selection import Selection

    return Selection(handler, error, type, key, stream, _moment("--since", since), _moment("--until", until))


class Choice(Generic[T]):
    """What a command is to change: rows that were named, rows that options select, or all rows."""

    def __init__(
        self,
        usage: str,
        named: Sequence[T] | None,
        everything: bool,
        options: tuple[str | None, str | None, str | None, str | None, str | None, str | None, str | None],
        limit: int | None,
    ) -> None:
        """Raise `Refused` unless exactly one of the three is given."""
        if [bool(named), everything, any(option is not None for option in options)].count(True) != 1:
            raise Refused(
                USAGE, f"say which: tidings {usage}, or --all, or select by options such as --handler, --error"
            )
        if named and limit is not None:
            raise Refused(USAGE, "--limit goes with --all or with options that select, not with names")
        self.named = list(dict.fromkeys(named or ()))
        self.selection = selected(*options)
        self.limit = limit


def _moment(option: str, given: str | None) -> float | None:
    """Read a time, and return it as seconds since 1970. Raises `Refused`."""
    if given is None:
        return None
    ago = re.fullmatch(r"(\d{1,9})([smhdw])", given, re.ASCII)
    if ago is not None:
        return max(time.time() - int(ago[1]) * _UNITS[ago[2]], 0.0)
    try:
        when = datetime.fromisoformat(given)
        return (when if when.tzinfo is not None else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        raise Refused(
            USAGE, f"{option} {given!r} is not a time: write 2026-11-24T18:00+01:00, or how long ago, such as 20m or 2h"
        ) from None
