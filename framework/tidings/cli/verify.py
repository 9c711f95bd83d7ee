"""`tidings verify`: is every event settled in every service? It only reads, unless it is asked to repair."""

from __future__ import annotations

import os
import sys
import threading
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidings.cli._exits import NO, OK, answering
from tidings.cli._find import find_services
from tidings.cli._output import GREEN, RED, YELLOW, Json, facts, paint, plain, say
from tidings.cli._reading import Reading
from tidings.operations.checking import opened_to_look
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.operations.recount import Recount
    from tidings.operations.report import Report
    from tidings.service import Service

__all__ = ["Targets", "verify"]

Targets = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODULE:SERVICE", help="Or a name of one in TIDINGS_SERVICES; by default all of them."),
]


@answering
async def verify(
    services: Targets = None,
    deep: Annotated[bool, typer.Option("--deep", help="Read the whole log, and recount everything from it.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Heal what is pending or staged, and nothing else.")] = False,
    timeout: Annotated[float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for --repair.")] = 60.0,
    relay: Annotated[str, typer.Option(metavar="NAME", help="The relay whose checkpoint is compared.")] = "main",
    strict: Annotated[
        bool, typer.Option("--strict", help="Look once: what is on its way at this moment is not settled.")
    ] = False,
    json: Json = False,
) -> int:
    """Show that every event is settled in every service, or name those that are not (exit code 1).

    An event is settled when its handlers are done with it, or when it is dead: the first line counts dead letters, and
    'tidings status' ends with 1 for them. Services at work have 5 seconds to settle what
    there was when the command began; what came since is on the way, and is only counted. When all is well it costs a
    few rows per service; otherwise it reads the log above the lowest floor. --deep checks every row of the services
    against the log. --repair makes services that are behind read the log: over a network by sending one marker, which
    the others drop; embedded by running the services here, if no other process has them. It leaves alone what is on the
    way. What is settled is never run again.
    """
    settings = Settings()
    found = list(find_services(services or (), settings).values())
    before = set(threading.enumerate())
    report, recount = await _look(settings, found, relay, deep, strict)
    done: list[str] = []
    if repair:
        from tidings.cli._repairing import Repair

        if not json and not report.ok:
            _show(report, None)
        tell = done.append if json else _tell
        report = await Repair(settings, found, relay, timeout, tell, strict=strict).run(report)
        if deep:
            _, recount = await _look(settings, found, relay, deep, strict)
    if json:
        say(facts(_facts(report, recount) | ({"repaired": done} if repair else {})))
    else:
        _show(report, recount)
    code = OK if report.ok and (recount is None or recount.ok) else NO
    if repair:
        _leave(before, code)
    return code


def _tell(done: str) -> None:
    """At once: what follows may take long, or fail."""
    print(plain(f"repair: {done}"), flush=True)


def _leave(before: set[threading.Thread], code: int) -> None:
    """Services that were run here may have handlers that hang, and would hold up the end of the process for ever."""
    from tidings.hosting.signals import left_behind

    if left := left_behind(before):
        print(plain(f"left behind, what they work on stays pending: {', '.join(left)}"), file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


async def _look(
    settings: Settings, services: list[Service], relay: str, deep: bool, strict: bool
) -> tuple[Report, Recount | None]:
    from tidings.operations.live_verify import verify_live
    from tidings.operations.verify import verify as look

    async with opened_to_look(settings, services) as (store, pairs):
        report = await (look if strict else verify_live)(store, pairs, relay=relay)
        if not deep:
            return report, None
        from tidings.operations.recount import recount

        with Reading() as reading:
            return report, await recount(store, pairs, reading.reached, upto=report.position)


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
