"""Options that choose among held events or dead letters, and how they are read."""

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
"""What a database's integers hold."""
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}

_TIME: Final = "A time in ISO 8601, UTC if it names no zone, or how long ago: 90s, 20m, 2h, 1d."

HandlerName = Annotated[str | None, typer.Option("--handler", metavar="NAME", help="Only of this handler.")]
Error = Annotated[
    str | None,
    typer.Option("--error", metavar="TEXT", help="Only where the reason contains this: an error's type, or its words."),
]
Type = Annotated[str | None, typer.Option("--type", metavar="TYPE", help="Only events of this type.")]
Key = Annotated[str | None, typer.Option("--key", metavar="KEY", help="Only of this partition key.")]
Stream = Annotated[str | None, typer.Option("--stream", metavar="STREAM", help="Only events of this stream.")]
Since = Annotated[str | None, typer.Option("--since", metavar="TIME", help=f"Only since then. {_TIME}")]
Until = Annotated[str | None, typer.Option("--until", metavar="TIME", help="Only since before then.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, max=BIGGEST, help="At most this many, the oldest.")]
All = Annotated[bool, typer.Option("--all", help="Every one of the service.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done; change nothing.")]


def selected(
    handler: str | None,
    error: str | None,
    type: str | None,
    key: str | None,
    stream: str | None,
    since: str | None,
    until: str | None,
) -> Selection:
    """What the options choose. Raises `Refused` for a time that is none."""
    from tidings.operations.selection import Selection

    return Selection(handler, error, type, key, stream, _moment("--since", since), _moment("--until", until))


class Choice(Generic[T]):
    """What a command that changes something is about: what was named, or what options choose, or everything."""

    def __init__(
        self,
        usage: str,
        named: Sequence[T] | None,
        everything: bool,
        options: tuple[str | None, str | None, str | None, str | None, str | None, str | None, str | None],
        limit: int | None,
    ) -> None:
        """Raises `Refused` unless exactly one of them is said."""
        if [bool(named), everything, any(option is not None for option in options)].count(True) != 1:
            raise Refused(
                USAGE, f"say which: tidings {usage}, or --all, or choose by options such as --handler, --error"
            )
        if named and limit is not None:
            raise Refused(USAGE, "--limit is for --all and for options that choose, not for what is named")
        self.named = list(dict.fromkeys(named or ()))
        self.selection = selected(*options)
        self.limit = limit


def _moment(option: str, given: str | None) -> float | None:
    """Seconds since 1970."""
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
            USAGE, f"{option} {given!r} is no time: write 2026-11-24T18:00+01:00, or how long ago, such as 20m or 2h"
        ) from None
