"""The commands for what failed in a service, held or dead alike: list, show, and act on what was chosen.

What differs between the two (columns, names of one event, what an action does) is a `Failed`. Nothing is changed
without a yes.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar
from uuid import UUID

import typer

from tidings.cli._asking import Of, OfAny, Yes, chosen, confirmed
from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._find import find_services
from tidings.cli._output import BOLD, Json, columns, document_lines, facts, paint, plain, say
from tidings.cli._selecting import (
    BIGGEST,
    All,
    Choice,
    DryRun,
    Error,
    HandlerName,
    Key,
    Limit,
    Since,
    Stream,
    Type,
    Until,
    selected,
)
from tidings.cli.verify import Targets
from tidings.errors import TidingsError
from tidings.operations.looking import existing_database, existing_store
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.operations.selection import Selection
    from tidings.service import Service

__all__ = ["Action", "Chosen", "Failed", "add_action", "add_list", "add_show"]

E = TypeVar("E")
E_co = TypeVar("E_co", covariant=True)


class Operations(Protocol[E_co]):
    """What operators can do with one table of one service."""

    async def list(self, selection: Selection, *, limit: int) -> Sequence[E_co]: ...

    async def count(self, selection: Selection) -> int: ...


O = TypeVar("O", bound=Operations[Any])  # noqa: E741


class Chosen(NamedTuple):
    """What a command is about to act on."""

    events: int
    act: Callable[[], Awaitable[int]]
    """Do it, and return how many it was done to."""
    left: str = ""
    """What of the selection it cannot be done to, and what to do instead."""


class Action(NamedTuple):
    """A command that changes something."""

    verb: str
    done: str
    """What the events are afterwards."""
    help: str
    then: str = ""
    """What happens next."""


class Failed(ABC, Generic[O, E]):
    """One of the two tables, at the command line. `O` are its operations, `E` one row."""

    command: ClassVar[str]
    noun: ClassVar[str]
    metavar: ClassVar[str]
    """What help texts call the name of a row."""
    names: ClassVar[Any]
    """The argument that names rows; `name` names one."""
    name: ClassVar[Any]
    titles: ClassVar[tuple[str, ...]]
    right: ClassVar[tuple[int, ...]]
    """Columns that are numbers."""

    @abstractmethod
    def of(self, database: Database, service: str, log: UUID) -> O:
        """Return the operations on the rows of one service and one log."""

    @asynccontextmanager
    async def opened(self, settings: Settings, service: Service) -> AsyncIterator[O | None]:
        """Open the rows of a service; None for one that has never run."""
        from tidings.operations.writer import naming_the_writer

        async with (
            existing_store(settings) as store,
            naming_the_writer(store, settings, service),
            existing_database(settings, service.name) as database,
        ):
            yield None if database is None else self.of(database, service.name, await store.log_id())

    @abstractmethod
    def missing(self) -> type[TidingsError]:
        """Return the error of `get` that says that the service does not have the row."""

    @abstractmethod
    async def get(self, operations: O, name: str) -> E: ...

    @abstractmethod
    async def choose(self, operations: O, verb: str, choice: Choice[str]) -> Chosen: ...

    @abstractmethod
    def row(self, service: Service, entry: E) -> tuple[Any, ...]: ...

    @abstractmethod
    def facts(self, service: Service, entry: E) -> dict[str, Any]: ...

    @abstractmethod
    def story(self, service: Service, entry: E) -> tuple[str, Sequence[tuple[str, object]]]:
        """What one row is, in a sentence, and its fields; those that are None are not told."""

    async def notes(self, service: Service, operations: O) -> Sequence[str]:
        """What is told below the list."""
        return ()

    def existing(self, operations: O | None) -> O:
        if operations is None:
            raise Refused(NO, f"this service has never run here, so it has no {self.noun}")
        return operations


def add_list(app: typer.Typer, failed: Failed[Any, Any], help: str) -> None:
    """Add the command that lists."""

    @app.command("list", help=help)
    @answering
    async def list_(
        services: Targets = None,
        handler: HandlerName = None,
        error: Error = None,
        type: Type = None,
        key: Key = None,
        stream: Stream = None,
        since: Since = None,
        until: Until = None,
        limit: Annotated[int, typer.Option(min=1, max=BIGGEST, help="At most this many of each service.")] = 100,
        json: Json = False,
    ) -> int:
        settings = Settings()
        selection = selected(handler, error, type, key, stream, since, until)
        rows: list[tuple[Any, ...]] = []
        notes: list[str] = []
        shown = total = 0
        for service in find_services(services or (), settings).values():
            async with failed.opened(settings, service) as operations:
                if operations is None:
                    continue
                found = await operations.list(selection, limit=limit)
                shown, total = shown + len(found), total + await operations.count(selection)
                notes += await failed.notes(service, operations)
            if json:
                for entry in found:
                    say(facts(failed.facts(service, entry)))
            else:
                rows += [failed.row(service, entry) for entry in found]
        if json:
            if shown < total or not total:
                say(facts({"shown": shown, "total": total}))
            return OK
        if rows:
            for line in [*columns(failed.titles, rows, right=failed.right), *map(plain, notes)]:
                say(line)
        if shown < total:
            say(f"{shown} of {total} are shown; --limit {total} shows all of them")
        elif not total:
            print(f"No {failed.noun}.", file=sys.stderr)
        return OK


def add_show(app: typer.Typer, failed: Failed[Any, Any], help: str) -> None:
    """Add the command that shows one."""

    async def show(name: str, service: OfAny = None, json: Json = False) -> int:
        of, entry = await _found(failed, str(name), service, Settings())
        if json:
            say(facts(failed.facts(of, entry)))
            return OK
        told, fields = failed.story(of, entry)
        say(paint(plain(told), BOLD))
        for field, value in fields:
            if value is not None:
                say(f"  {field:<9} {plain(str(value))}")
        detail = (entry.detail or "").rstrip().encode()
        for field, content in (("data", entry.data), ("metadata", entry.metadata), ("detail", detail)):
            if content:
                for line in document_lines(field, content, is_json=field != "detail"):
                    say(line)
        return OK

    show.__annotations__["name"] = failed.name
    app.command("show", help=help)(answering(show))


async def _found(failed: Failed[Any, E], name: str, target: str | None, settings: Settings) -> tuple[Service, E]:
    """Return the row of this name and the service that has it: the service `target` or, without one, whichever it is.

    Raises `Refused` when no service has it, or several.
    """
    services = find_services((target,) if target is not None else (), settings).values()
    rows: list[tuple[Service, E]] = []
    for service in services:
        async with failed.opened(settings, service) as operations:
            if operations is None and len(services) > 1:
                continue
            try:
                rows.append((service, await failed.get(failed.existing(operations), name)))
            except failed.missing():
                if len(services) == 1:
                    raise
    if len(rows) == 1:
        return rows[0]
    names = ", ".join(service.name for service, _ in rows) or ", ".join(service.name for service in services)
    if rows:
        raise Refused(USAGE, f"of which service? Several have {name}: say --service with one of {names}")
    raise Refused(NO, f"{name} is not among the {failed.noun} of {names}: list them again")


def add_action(app: typer.Typer, failed: Failed[Any, Any], action: Action) -> None:
    """Add a command that changes what is chosen."""

    async def act(
        names: Any = None,
        everything: All = False,
        handler: HandlerName = None,
        error: Error = None,
        type: Type = None,
        key: Key = None,
        stream: Stream = None,
        since: Since = None,
        until: Until = None,
        limit: Limit = None,
        dry_run: DryRun = False,
        yes: Yes = False,
        service: Of = None,
        json: Json = False,
    ) -> int:
        options = (handler, error, type, key, stream, since, until)
        usage = f"{failed.command} {action.verb} {failed.metavar}..."
        choice = Choice(usage, [str(name) for name in names or ()], everything, options, limit)
        return await _act(failed, action, choice, service, dry_run=dry_run, yes=yes, json=json)

    act.__annotations__["names"] = failed.names
    app.command(action.verb, help=action.help)(answering(act))


async def _act(
    failed: Failed[Any, Any],
    action: Action,
    choice: Choice[str],
    target: str | None,
    *,
    dry_run: bool,
    yes: bool,
    json: bool,
) -> int:
    settings = Settings()
    service = chosen(target, settings)
    count, left = 0, ""
    async with failed.opened(settings, service) as operations:
        if operations is not None or choice.named:
            what = await failed.choose(failed.existing(operations), action.verb, choice)
            count, left = what.events, what.left
            if count and not dry_run:
                if not confirmed(f"{action.verb.capitalize()} {count} of the {failed.noun} of {service.name}?", yes):
                    return NO
                count = await what.act()
    if json:
        told = {"service": service.name, "command": action.verb, "events": count, "dry_run": dry_run}
        say(facts(told | ({"left": left} if left else {})))
    elif dry_run:
        say(" ".join(filter(None, (f"{count} would be {action.done}; nothing was changed.", left))))
    else:
        say(" ".join(filter(None, (f"{count} {action.done}.", action.then if count else "", left))))
    return OK
