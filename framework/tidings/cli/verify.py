"""`tidings verify`: shows whether every event is settled in every service.

Without --repair it changes nothing, except that --deep notes how far services are proved.
"""

from __future__ import annotations

import os
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidings.cli._exits import NO, OK, answering
from tidings.cli._find import find_services
from tidings.cli._output import GREEN, RED, YELLOW, Json, facts, paint, plain, say
from tidings.cli._reading import Reading
from tidings.cli._unseen import Unseen
from tidings.errors import ConfigurationError
from tidings.operations.checking import opened_to_look
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.operations.recount import Recount
    from tidings.operations.report import Report
    from tidings.service import Service

__all__ = ["Targets", "verify"]

Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODULE:SERVICE", help="Or the name of one in TIDINGS_SERVICES; by default all of them."),
]


@answering
async def verify(
    services: Targets = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read the whole log, and prove everything from it.")] = False,
    since: Annotated[
        int | None,
        typer.Option(
            min=-1, metavar="POSITION", help="With --deep: only what came after this, which was proved before."
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Repair what is pending or staged, and nothing else.")
    ] = False,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Seconds to wait for --repair.")] = 60.0,
    relay: Annotated[str, typer.Option(metavar="NAME", help="The relay whose checkpoint is compared.")] = "main",
    strict: Annotated[
        bool, typer.Option("--strict", help="Look once; what is on the way counts as not settled.")
    ] = False,
    json: Json = False,
) -> int:
    """Show that every event is settled in every service, or name those that are not (exit code 1).

    An event is settled when its handlers are done with it, or when it is dead. The first line counts dead letters;
    'tidings status' ends with 1 if there are any. Services at work have 5 seconds to settle what was there when the
    command began. Events that came later are on the way, and are only counted. If everything is settled, this reads a
    few rows per service; otherwise, it reads the log above the lowest floor.
    --deep compares every row of the services with the log, and names events that were skipped, replaced, foreign or out
    of order. --repair makes services that are behind read the log: over a network, it sends one marker, which the other
    services drop; embedded, it runs the services here, if no other process does. It leaves alone what is on the way,
    and never runs a settled event again. If the database of one of several services does not answer, the others are
    shown, that one is named, and the exit code is 3.
    """
    if since is not None and not deep:
        raise ConfigurationError("--since goes with --deep: only --deep proves anything")
    settings = Settings()
    found = list(find_services(services or (), settings).values())
    before = set(threading.enumerate())
    unseen = Unseen(len(found))
    report, recount = await _look(settings, found, relay, deep, since, strict, unseen)
    done: list[str] = []
    if repair:
        from tidings.cli._repairing import Repair

        if not json and not report.ok:
            _show(report, None)
        tell = done.append if json else _tell
        found = [service for service in found if service.name not in unseen.errors]
        after = await Repair(settings, found, relay, timeout, tell, strict=strict).run(report)
        report = replace(after, unseen=report.unseen)
        if deep:
            _, recount = await _look(settings, found, relay, deep, since, strict, unseen)
    if json:
        not_seen = {"unseen": unseen.facts()} if unseen.errors else {}
        say(facts(_facts(report, recount) | not_seen | ({"repaired": done} if repair else {})))
    else:
        _show(report, recount)
    unseen.tell()
    code = unseen.code or (OK if report.ok and (recount is None or recount.ok) else NO)
    if repair:
        _leave(before, code)
    return code


def _tell(done: str) -> None:
    """Print what was done at once: the next step may take long, or fail."""
    print(plain(f"repair: {done}"), flush=True)


def _leave(before: set[threading.Thread], code: int) -> None:
    """End the process now if services that ran here have left threads behind, which could keep it from ending."""
    from tidings.hosting.signals import left_behind

    if left := left_behind(before):
        print(plain(f"left behind; what they work on stays pending: {', '.join(left)}"), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


async def _look(
    settings: Settings,
    services: list[Service],
    relay: str,
    deep: bool,
    since: int | None,
    strict: bool,
    unseen: Unseen,
) -> tuple[Report, Recount | None]:
    from tidings.operations.live_verify import verify_live
    from tidings.operations.verify import verify as look

    async with opened_to_look(settings, services, unseen.note) as (store, pairs):
        unseen.raise_if_all()
        report = await (look if strict else verify_live)(store, pairs, relay=relay)
        report = replace(report, unseen=tuple(unseen.errors))
        if not deep:
            return report, None
        from tidings.operations.recount import recount

        with Reading() as reading:
            return report, await recount(store, pairs, reading.reached, upto=report.position, since=since)


def _facts(report: Report, recount: Recount | None) -> dict[str, Any]:
    parts = [
        {"service": part.service, "ok": part.ok} | {name: getattr(part, name) for name in part.__slots__}
        for part in report.services
    ]
    ok = report.ok and (recount is None or recount.ok)
    deep = {} if recount is None else {"deep": recount}
    relay = report.relay
    return {"log": report.log, "position": report.position, "ok": ok, "relay": relay, "services": parts} | deep


def _show(report: Report, recount: Recount | None) -> None:
    first, *rest = str(report).split("\n")
    good = YELLOW if report.dead else GREEN
    say(paint(plain(first), good if report.ok else RED))
    for line in rest:
        say(plain(line))
    if recount is not None:
        first, *rest = str(recount).split("\n")
        say(paint(plain(first), GREEN if recount.ok else RED))
        for line in rest:
            say(plain(line))
