"""The commands for held events and for dead letters: list them, show one, and act on chosen ones.

A `Failed` says what differs between the two: columns, how one is named, what an action does. Nothing is changed
without a yes.
"""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar
from uuid import UUID

import typer

from tidings.cli._asking import Of, OfAny, Yes, chosen, confirmed
from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._find import find_services
from tidings.cli._output import BOLD, Json, columns, document_lines, facts, paint, plain, say
from tidings.cli._pacing import Rate, in_waves
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
from tidings.cli._unseen import Unseen
from tidings.cli.verify import Targets
from tidings.errors import TidingsError
from tidings.operations.looking import existing_database, existing_store
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.operations.selection import Selection
    from tidings.service import Service
    from tidings.stores import EventStore

__all__ = ["Action", "PlannedAction", "Failed", "add_action", "add_list", "add_show"]

E = TypeVar("E")
E_co = TypeVar("E_co", covariant=True)


class Operations(Protocol[E_co]):
    """What the commands need of the operations on one table of one service."""

    async def list(self, selection: Selection, *, limit: int) -> Sequence[E_co]: ...

    async def count(self, selection: Selection) -> int: ...

    def at_one_moment(self) -> AbstractAsyncContextManager[None]: ...


O = TypeVar("O", bound=Operations[Any])  # noqa: E741


class PlannedAction(NamedTuple):
    """What a command will act on."""

    events: int
    act: Callable[[], Awaitable[int]]
    """Act on all of them, and return on how many."""
    left: str = ""
    """Which of the selection it cannot act on, and what to do about those instead; "" if there are none."""
    names: Callable[[], Awaitable[Sequence[int]]] | None = None
    """Return the names of those to act on, so that it can be done a few at a time."""
    some: Callable[[Sequence[int]], Awaitable[int]] | None = None
    """Act on a few of them, leave out those that no longer exist, and return on how many."""


class Action(NamedTuple):
    """A command that changes something."""

    verb: str
    done: str
    """What the events are afterwards, such as "dropped"."""
    help: str
    then: str = ""
    """A sentence about what happens next."""
    paced: bool = False
    """Whether it can be done a few at a time."""


class Failed(ABC, Generic[O, E]):
    """One of the two tables on the command line. `O` is the type of its operations, `E` that of a row."""

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
    def of(self, database: Database, service: str, log: UUID, store: EventStore) -> O:
        """Return the operations on the rows of one service and one log."""

    @asynccontextmanager
    async def opened(self, settings: Settings, service: Service) -> AsyncIterator[O | None]:
        """Open the rows of a service; None if it has never run."""
        from tidings.operations.writer import naming_the_writer

        async with (
            existing_store(settings) as store,
            naming_the_writer(store, settings, service),
            existing_database(settings, service.name) as database,
        ):
            yield None if database is None else self.of(database, service.name, await store.log_id(), store)

    @abstractmethod
    def missing(self) -> type[TidingsError]:
        """Return the type of error with which `get` says that the service does not have the row."""

    @abstractmethod
    async def get(self, operations: O, name: str) -> E: ...

    @abstractmethod
    async def choose(self, operations: O, verb: str, choice: Choice[str]) -> PlannedAction: ...

    @abstractmethod
    def row(self, service: Service, entry: E) -> tuple[Any, ...]: ...

    @abstractmethod
    def facts(self, service: Service, entry: E) -> dict[str, Any]: ...

    @abstractmethod
    def story(self, service: Service, entry: E) -> tuple[str, Sequence[tuple[str, object]]]:
        """Return a sentence about one row, and its fields; those that are None are not shown."""

    async def notes(self, service: Service, operations: O) -> Sequence[str]:
        """Return lines to show below the list."""
        return ()

    def existing(self, operations: O | None) -> O:
        if operations is None:
            raise Refused(NO, f"this service has never run here, so it has no {self.noun}")
        return operations


def add_list(app: typer.Typer, failed: Failed[Any, Any], help: str) -> None:
    """Add the command that lists rows."""

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
        limit: Annotated[int, typer.Option(min=1, max=BIGGEST, help="At most this many from each service.")] = 100,
        json: Json = False,
    ) -> int:
        settings = Settings()
        selection = selected(handler, error, type, key, stream, since, until)
        rows: list[tuple[Any, ...]] = []
        notes: list[str] = []
        shown = total = 0
        wanted = find_services(services or (), settings).values()
        unseen = Unseen(len(wanted))
        for service in wanted:
            found: Sequence[Any] = ()
            with unseen.without(service.name):
                async with failed.opened(settings, service) as operations:
                    if operations is None:
                        continue
                    async with operations.at_one_moment():
                        found, count = await operations.list(selection, limit=limit), await operations.count(selection)
                        more = await failed.notes(service, operations)
                shown, total, notes = shown + len(found), total + count, [*notes, *more]
            if json:
                for entry in found:
                    say(facts(failed.facts(service, entry)))
            else:
                rows += [failed.row(service, entry) for entry in found]
        unseen.raise_if_all()
        unseen.tell()
        if json:
            not_seen = {"unseen": unseen.facts()} if unseen.errors else {}
            if shown < total or not total or not_seen:
                say(facts({"shown": shown, "total": total} | not_seen))
            return unseen.code
        if rows:
            for line in [*columns(failed.titles, rows, right=failed.right), *map(plain, notes)]:
                say(line)
        if shown < total:
            say(f"{shown} of {total} are shown; --limit {total} shows all of them")
        elif not total:
            where = " in the others" if unseen.errors else ""
            print(f"No {failed.noun}{where}.", file=sys.stderr)
        return unseen.code


def add_show(app: typer.Typer, failed: Failed[Any, Any], help: str) -> None:
    """Add the command that shows one row."""

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
    """Return the row of this name, and the service that has it: `target`, or without one, any service.

    Raises `Refused` if no service has it, or several have it.
    """
    services = find_services((target,) if target is not None else (), settings).values()
    rows: list[tuple[Service, E]] = []
    unseen = Unseen(len(services))
    for service in services:
        with unseen.without(service.name):
            async with failed.opened(settings, service) as operations:
                if operations is None and len(services) > 1:
                    continue
                try:
                    existing = failed.existing(operations)
                    async with existing.at_one_moment():
                        rows.append((service, await failed.get(existing, name)))
                except failed.missing():
                    if len(services) == 1:
                        raise
    unseen.raise_if_all()
    unseen.tell()
    if len(rows) == 1:
        return rows[0]
    if not rows and unseen.errors:
        seen = ", ".join(service.name for service in services if service.name not in unseen.errors)
        raise Refused(unseen.code, f"{name} is not among the {failed.noun} of {seen}; the rest could not be seen")
    names = ", ".join(service.name for service, _ in rows) or ", ".join(service.name for service in services)
    if rows:
        raise Refused(USAGE, f"which service? Several have {name}: say --service with one of {names}")
    raise Refused(NO, f"{name} is not among the {failed.noun} of {names}: list them again")


def add_action(app: typer.Typer, failed: Failed[Any, Any], action: Action) -> None:
    """Add a command that changes chosen rows."""

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
        rate: Rate = None,
        dry_run: DryRun = False,
        yes: Yes = False,
        service: Of = None,
        json: Json = False,
    ) -> int:
        options = (handler, error, type, key, stream, since, until)
        usage = f"{failed.command} {action.verb} {failed.metavar}..."
        choice = Choice(usage, [str(name) for name in names or ()], everything, options, limit)
        return await _act(failed, action, choice, service, rate=rate, dry_run=dry_run, yes=yes, json=json)

    act.__annotations__["names"] = failed.names
    if not action.paced:
        signature = inspect.signature(act, eval_str=True)
        left = [parameter for name, parameter in signature.parameters.items() if name != "rate"]
        act.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    app.command(action.verb, help=action.help)(answering(act))


async def _act(
    failed: Failed[Any, Any],
    action: Action,
    choice: Choice[str],
    target: str | None,
    *,
    rate: float | None,
    dry_run: bool,
    yes: bool,
    json: bool,
) -> int:
    settings = Settings()
    service = chosen(target, settings)
    count, left = 0, ""
    async with failed.opened(settings, service) as operations:
        if operations is not None or choice.named:
            existing = failed.existing(operations)
            async with existing.at_one_moment():
                what = await failed.choose(existing, action.verb, choice)
            count, left = what.events, what.left
            if count and not dry_run:
                pace = "" if rate is None else f", {rate:g} a second"
                asked = f"{action.verb.capitalize()} {count} of the {failed.noun} of {service.name}{pace}?"
                if not confirmed(asked, yes):
                    return NO
                count = await _do(what, rate, action.done)
    if json:
        told = {"service": service.name, "command": action.verb, "events": count, "dry_run": dry_run}
        say(facts(told | ({"left": left} if left else {})))
    elif dry_run:
        say(" ".join(filter(None, (f"{count} would be {action.done}; nothing was changed.", left))))
    else:
        say(" ".join(filter(None, (f"{count} {action.done}.", action.then if count else "", left))))
    return OK


async def _do(what: PlannedAction, rate: float | None, done: str) -> int:
    if rate is None or what.names is None or what.some is None:
        return await what.act()
    return await in_waves(await what.names(), rate, what.some, done)
