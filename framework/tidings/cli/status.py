"""`tidings status`: how far log, relay and services are, once or continually. It only reads."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tidings.cli.exits import NO, OK, answering
from tidings.cli.find import find_services
from tidings.cli.looking import existing_store
from tidings.cli.output import BOLD, GREEN, RED, Json, columns, facts, moment, paint, plain, say
from tidings.cli.settled import Targets
from tidings.settings import Settings, open_bus

if TYPE_CHECKING:
    from tidings.cli.state import State
    from tidings.service import Service

__all__ = ["status"]

SECONDS: Final = 1.0
"""Between two looks of --watch."""


@answering
async def status(
    services: Targets = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look every second, until Ctrl-C.")] = False,
    relay: Annotated[str, typer.Option(help="The relay's name.")] = "main",
    json: Json = False,
) -> int:
    """Show how far log, relay and services are; exit code 1 when something is unhealthy, with what to do.

    LAG is from a service's floor to the last event, in positions. PENDING and 'behind' are counted among 10,000 events
    of the log; 42+ is 42 or more. READY and CONSUMERS are the queue's on the bus; an embedded bus lives in the
    services' process and cannot be seen from here. With --watch a terminal is redrawn; into a pipe goes a line per
    change.
    """
    settings = Settings()
    found = find_services(services or (), settings, needed=False)
    async with _looking(settings, found, relay) as looks:
        if watch and not json and sys.stdout.isatty():
            await _redraw(looks)
        last = None
        async for state in looks:
            shown = facts(state_facts(state)) if json else _line(state)
            if not watch:
                if json:
                    say(shown)
                else:
                    for line in _lines(state):
                        say(line)
                return NO if state.problems else OK
            if shown != last:
                last = shown
                print(shown if json else f"{moment(datetime.now(UTC))}  {shown}", flush=True)
    return OK


@asynccontextmanager
async def _looking(settings: Settings, services: dict[str, Service], relay: str) -> AsyncIterator[AsyncIterator[State]]:
    from tidings.cli.state import look

    async def looks() -> AsyncIterator[State]:
        while True:
            yield await look(settings, store, bus, services, relay=relay)
            await asyncio.sleep(SECONDS)

    async with existing_store(settings) as store, open_bus(settings.bus) as bus:
        yield looks()


async def _redraw(looks: AsyncIterator[State]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(highlight=False), auto_refresh=False, screen=False) as live:
        async for state in looks:
            live.update(Text.from_ansi("\n".join(_lines(state))), refresh=True)


def state_facts(state: State) -> dict[str, object]:
    from dataclasses import asdict

    oldest = state.relay.oldest_seconds
    relay = asdict(state.relay) | {"oldest_seconds": None if oldest is None else round(oldest)}
    return {"healthy": not state.problems} | asdict(state) | {"relay": relay}


def _line(state: State) -> str:
    """What a change is noticed by: ages, which always change, are not in it."""
    parts = [f"head={state.head}", f"relay={state.relay.checkpoint}", f"behind={state.relay.behind}"]
    for part in state.services:
        counts = ("floor", "pending", "held", "staged", "dead", "ready", "consumers")
        numbers = [f"{name}={value}" for name in counts if (value := getattr(part, name)) is not None]
        parts.append(f"{part.service}({' '.join(numbers)})")
    return " ".join([*parts, f"problems={len(state.problems)}"])


def _count(number: int | None, complete: bool) -> str | None:
    return None if number is None else f"{number}{'' if complete else '+'}"


def _lines(state: State) -> list[str]:
    relay = state.relay
    late = "" if relay.oldest_seconds is None else f", the oldest for {relay.oldest_seconds:.0f} s"
    behind = _count(relay.behind, relay.complete)
    lines = [
        f"{paint('log', BOLD)}    {state.log}  head {state.head}",
        f"{paint('relay', BOLD)}  {plain(relay.name)}  checkpoint {relay.checkpoint}, {behind} behind{late}",
    ]
    if state.services:
        names = ("service", "floor", "lag", "pending", "held", "staged", "dead", "ready", "consumers", "queue")
        rows = [
            [_count(part.pending, part.complete) if name == "pending" else getattr(part, name) for name in names]
            for part in state.services
        ]
        lines += columns([name.upper() for name in names], rows, right=range(1, 9))
    if not state.problems:
        return [*lines, paint("healthy", GREEN)]
    return [*lines, *(f"{paint('UNHEALTHY', RED)}  {plain(problem)}" for problem in state.problems)]
