"""`tidings held`: lists, shows, retries, skips and drops held events. Nothing is changed without a yes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from tidings.cli._failed import Action, Failed, PlannedAction, add_action, add_list, add_show
from tidings.cli._find import event_named
from tidings.cli._selecting import Choice
from tidings.operations.report import moment_of

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.errors import TidingsError
    from tidings.operations.held import HeldEntry, HeldOperations
    from tidings.service import Service
    from tidings.stores import EventStore

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True, help="Events that failed and will be tried again: list, show, retry, skip, drop."
)


class _Held(Failed["HeldOperations", "HeldEntry"]):
    command = "held"
    noun = "held events"
    metavar = "EVENT"
    names = Annotated[
        list[str] | None,
        typer.Argument(metavar="EVENT", help="A position, an id, or STREAM@VERSION, as 'held list' shows."),
    ]
    name = Annotated[str, typer.Argument(metavar="EVENT", help="A position, an id, or STREAM@VERSION.")]
    titles = ("SERVICE", "POSITION", "HELD", "NEXT TRY", "ATTEMPTS", "TYPE", "EVENT", "REASON")
    right = (1, 4)

    def of(self, database: Database, service: str, log: UUID, store: EventStore) -> HeldOperations:
        from tidings.operations.held import HeldOperations

        return HeldOperations(database, service, log, store)

    def missing(self) -> type[TidingsError]:
        from tidings.operations.held import HeldNotFound

        return HeldNotFound

    async def get(self, operations: HeldOperations, name: str) -> HeldEntry:
        named = event_named(name)
        if isinstance(named, int):
            return await operations.get(named)
        return await operations.get(await operations.find(named if isinstance(named, tuple) else str(named)))

    async def choose(self, operations: HeldOperations, verb: str, choice: Choice[str]) -> PlannedAction:
        positions: Sequence[int] | None = None
        if choice.named:
            positions = [(await self.get(operations, name)).position for name in choice.named]
            count = len(positions)
        else:
            count = await operations.count(choice.selection)
            count = count if choice.limit is None else min(count, choice.limit)

        async def names() -> Sequence[int]:
            if positions is not None:
                return sorted(positions)
            return await operations.positions(choice.selection, limit=choice.limit)

        if verb == "retry":
            await operations.check(await names())
        act = partial(getattr(operations, verb), choice.selection, positions=positions, limit=choice.limit)
        return PlannedAction(count, act, names=names, some=partial(operations.retry_these, choice.selection))

    def row(self, service: Service, entry: HeldEntry) -> tuple[Any, ...]:
        due = moment_of(entry.due) if entry.attempts else None
        why = self._reason(service, entry).partition("\n")[0]
        place = f"{entry.stream}@{entry.version}"
        return (service.name, entry.position, _time(entry.since), due, entry.attempts, entry.type, place, why)

    def facts(self, service: Service, entry: HeldEntry) -> dict[str, Any]:
        from tidings.database.held_code import in_code

        return {"service": service.name, "handler_in_code": in_code(service, entry.handler, entry.type)} | {
            name: getattr(entry, name) if name not in ("since", "due") else _time(getattr(entry, name))
            for name in entry.__slots__
            if not (name in ("data", "metadata") and not getattr(entry, name))
        }

    def story(self, service: Service, entry: HeldEntry) -> tuple[str, Sequence[tuple[str, object]]]:
        names = ("stream", "version", "type", "event_id", "key", "handler", "attempts", "tries")
        held = None if entry.since is None else f"since {moment_of(entry.since)}"
        due = moment_of(entry.due) if entry.attempts else "after the earlier events of its key"
        fields = [*((name, getattr(entry, name)) for name in names), ("held", held), ("next try", due)]
        reason = self._reason(service, entry).partition("\n")[0]
        return f"held event at position {entry.position} of {service.name}: {reason}", fields

    async def notes(self, service: Service, operations: HeldOperations) -> Sequence[str]:
        """Return a line per handler with the number of events that it has failed at."""
        from tidings.database.held_code import reason_in_code

        return [
            f"{service.name}.{count.handler}: {count.events} failed, the oldest held since "
            f"{moment_of(count.since) if count.since is not None else 'an older version'}: "
            f"{reason_in_code(service, count.handler, None, count.reason)}"
            for count in await operations.by_handler()
        ]

    def _reason(self, service: Service, entry: HeldEntry) -> str:
        from tidings.database.held_code import reason_in_code

        return reason_in_code(service, entry.handler, entry.type, entry.reason)


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else moment_of(seconds)


_HELD = _Held()
add_list(
    app,
    _HELD,
    "List held events, in the order of the log, and how many each handler has failed at.\n\n"
    "Events that wait behind an earlier event of their partition key are also listed, without attempts.",
)
add_show(app, _HELD, "Show everything about one held event: its attempts, the reason, the traceback.")
for _action in (
    Action(
        "retry",
        "due now",
        "Try held events again now. First mend what they failed because of.",
        "The service runs them within seconds.",
        paced=True,
    ),
    Action(
        "skip",
        "skipped",
        "Turn held events into dead letters, which 'dead retry' can bring back. Events that wait behind them go on.",
        "'tidings dead list' has them.",
    ),
    Action(
        "drop",
        "dropped",
        "Delete held events for good: the service will not handle them any more. Events that wait behind them go on.",
    ),
):
    add_action(app, _HELD, _action)
