"""`tidings status`: shows how far log, relay and services are, once or continually. It changes nothing."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tidings.adapters import open_bus
from tidings.cli._exits import NO, OK, USAGE, answering
from tidings.cli._find import find_services
from tidings.cli._output import BOLD, GREEN, RED, YELLOW, Json, columns, facts, moment, paint, plain, say
from tidings.cli.verify import Targets
from tidings.errors import BusUnavailable, DatabaseUnavailable, StoreUnavailable
from tidings.operations.looking import existing_store
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.operations.status import ServiceState, State
    from tidings.service import Service

__all__ = ["status"]

SECONDS: Final = 1.0
"""Seconds between two looks of --watch."""
NUMBERS: Final = re.compile(r"\d+")
"""What to ignore in texts when a change is looked for: mostly ages."""


@answering
async def status(
    services: Targets = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Look every second, until Ctrl-C.")] = False,
    relay: Annotated[str, typer.Option(help="The relay's name.")] = "main",
    json: Json = False,
) -> int:
    """Show how far log, relay and services are, what is unhealthy, and what to do about it.

    The exit code is 1 if something is unhealthy, and 2 if no service was named: then no service was looked at.
    LAG is the number of events above a service's floor, PENDING the number of those that its handlers have not done,
    and AGE the age of the oldest pending event in seconds. These and 'behind' look at 10,000 events of the log at most;
    42+ means 42 or more. CODE is the version of the code that the service's processes run, or a fingerprint of its
    handlers. READY and CONSUMERS belong to the queue on the bus; an embedded bus is in the services' process and cannot
    be seen from here. --watch redraws a terminal. Into a pipe, it writes a line with the time for each change, or with
    --json for each look. Whatever does not answer is tried again every second.
    """
    settings = Settings()
    found = find_services(services or (), settings, needed=False)
    if not watch:
        state = await _once(settings, found, relay)
        for line in [facts(state_facts(state))] if json else _lines(state):
            say(line)
        return NO if state.problems else OK if state.services else USAGE
    async with aclosing(_looks(settings, found, relay)) as looks:
        if not json and sys.stdout.isatty():
            await _redraw(looks)
        last = None
        async for seen in looks:
            changed = NUMBERS.sub("", seen) if isinstance(seen, str) else _change(seen)
            if json or changed != last:
                last, now = changed, moment(datetime.now(UTC))
                print(_as_json(seen, now) if json else f"{now}  {_line(seen)}", flush=True)
    return OK


async def _once(settings: Settings, services: dict[str, Service], relay: str) -> State:
    async with _opened(settings, services, relay) as look:
        return await look()


@asynccontextmanager
async def _opened(
    settings: Settings, services: dict[str, Service], relay: str
) -> AsyncIterator[Callable[[], Awaitable[State]]]:
    from tidings.operations.status import look

    async with existing_store(settings) as store, open_bus(settings.bus) as bus:
        yield lambda: look(settings, store, bus, services, relay=relay)


async def _looks(settings: Settings, services: dict[str, Service], relay: str) -> AsyncGenerator[State | str, None]:
    """Yield look after look, for ever. If a look fails, yield the error, and connect again."""
    while True:
        try:
            async with _opened(settings, services, relay) as look:
                while True:
                    yield await look()
                    await asyncio.sleep(SECONDS)
        except (StoreUnavailable, BusUnavailable, DatabaseUnavailable) as error:
            yield " ".join(str(error).split())
        await asyncio.sleep(SECONDS)


async def _redraw(looks: AsyncIterator[State | str]) -> None:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    lines: list[str] = []
    with Live(console=Console(highlight=False), auto_refresh=False, screen=False) as live:
        async for state in looks:
            if isinstance(state, str):  # keep showing what was seen last
                now = moment(datetime.now(UTC))
                shown = [*lines, paint(f"UNAVAILABLE since the look above; tried again {now}", RED), plain(state)]
            else:
                shown = lines = _lines(state)
            live.update(Text.from_ansi("\n".join(shown)), refresh=True)


def state_facts(state: State) -> dict[str, object]:
    from dataclasses import asdict

    oldest = state.relay.oldest_seconds
    relay = asdict(state.relay) | {"oldest_seconds": None if oldest is None else round(oldest)}
    healthy = False if state.problems else True if state.services else None
    return {"healthy": healthy} | asdict(state) | {"relay": relay}


def _as_json(seen: State | str, now: str) -> str:
    told = {"healthy": False, "problems": [seen]} if isinstance(seen, str) else state_facts(seen)
    return facts({"at": now} | told)


def _change(state: State) -> str:
    """Return the text by which a change is noticed, without the numbers in problems, which are mostly ages."""
    return NUMBERS.sub("", "\n".join([_counts(state), *state.problems])) + _counts(state)


def _line(seen: State | str) -> str:
    """Return one look as one line, with the problems at its end."""
    if isinstance(seen, str):
        return plain(f"problems=1 {seen}")
    return " ".join([_counts(seen), *(f"UNHEALTHY {plain(problem)}" for problem in seen.problems)])


def _counts(state: State) -> str:
    parts = [f"head={state.head}", f"relay={state.relay.checkpoint}", f"behind={state.relay.behind}"]
    for part in state.services:
        counts = ("floor", "pending", "held", "staged", "dead", "ready", "consumers")
        numbers = [f"{name}={value}" for name in counts if (value := getattr(part, name)) is not None]
        parts.append(f"{part.service}({' '.join(numbers)})")
    return " ".join([*parts, f"problems={len(state.problems)}"])


def _count(number: int | None, complete: bool) -> str | None:
    return None if number is None else f"{number}{'' if complete else '+'}"


def _codes(part: ServiceState) -> list[str]:
    """Return a line if processes of a service run different code."""
    if len({(one.version, one.code) for one in part.processes}) < 2:
        return []
    return [plain(f"{part.service}: its processes run different code: {', '.join(map(str, part.processes))}")]


def _lines(state: State) -> list[str]:
    relay = state.relay
    late = "" if relay.oldest_seconds is None else f", the oldest for {relay.oldest_seconds:.0f} s"
    behind = _count(relay.behind, relay.complete)
    lines = [
        f"{paint('log', BOLD)}    {state.log}  head {state.head}",
        f"{paint('relay', BOLD)}  {plain(relay.name)}  checkpoint {relay.checkpoint}, {behind} behind{late}",
    ]
    if state.services:
        counts = ("held", "staged", "dead", "ready", "consumers", "queue")
        titles = ("service", "floor", "lag", "pending", "age", *counts, "processes", "code")
        rows = [
            [
                part.service,
                part.floor,
                _count(part.lag, part.complete),
                _count(part.pending, part.complete),
                None if part.oldest_seconds is None else round(part.oldest_seconds),
                *(getattr(part, name) for name in counts),
                len(part.processes) or None,
                ",".join(dict.fromkeys(one.version or one.code for one in part.processes)).replace(" ", "_"),
            ]
            for part in state.services
        ]
        lines += columns([title.upper() for title in titles], rows, right=(*range(1, 10), 11))
        lines += [line for part in state.services for line in _codes(part)]
    for part in state.services:
        said = [
            line
            for handler in part.handlers
            if handler.ok or handler.state != "to begin"
            for line in handler.lines(part.service)
        ]
        lines += [f"{plain(part.service)}: {plain(line)}" for line in said]
    if not state.services:
        lines.append(f"{paint('NO SERVICE', YELLOW)}  was looked at: give MODULE:SERVICE, or set TIDINGS_SERVICES")
    elif not state.problems:
        lines.append(paint("healthy", GREEN))
    for problem in state.problems:
        lines.append(f"{paint('UNHEALTHY', RED)}  {plain(problem)}")
        lines += [f"    follows  {plain(effect)}" for effect in state.effects.get(problem, ())]
    return lines
