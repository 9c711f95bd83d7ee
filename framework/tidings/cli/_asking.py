"""Asks a person before something is changed, and finds out which service is meant."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from tidings.cli._exits import USAGE, Refused
from tidings.cli._find import find_services, named
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.service import Service

__all__ = ["Of", "OfAny", "Yes", "chosen", "confirmed"]

Of = Annotated[
    str | None,
    typer.Option(
        "--service", "-s", metavar="MODULE:SERVICE", help="Or its name; by default the only one of TIDINGS_SERVICES."
    ),
]
OfAny = Annotated[
    str | None,
    typer.Option("--service", "-s", metavar="MODULE:SERVICE", help="Or its name; by default the one that has it."),
]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask; needed where nobody can answer.")]


def confirmed(question: str, yes: bool) -> bool:
    """Ask, and return whether a person says yes, now or with --yes. Raises `Refused` if nobody can answer.

    If the answer is no, tell the person that nothing was changed.
    """
    if yes:
        return True
    if not sys.stdin.isatty():
        raise Refused(USAGE, f"{question} Nobody can answer here: say --yes")
    # The event loop's own handler would only run after this question is answered.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        agreed = typer.confirm(question, err=True)
    finally:
        signal.signal(signal.SIGINT, before)
    if not agreed:
        print("Nothing was changed.", file=sys.stderr)
    return agreed


def chosen(target: str | None, settings: Settings) -> Service:
    """Return the service that `target` names, or the only one of the settings. Raises `Refused`."""
    if target is not None:
        return named(target, settings)[1]
    found = find_services((), settings)
    if len(found) > 1:
        names = ", ".join(service.name for service in found.values())
        raise Refused(USAGE, f"which service? Say --service with one of {names}")
    return next(iter(found.values()))
