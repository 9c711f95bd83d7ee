"""`tidings dead`: lists, shows, retries and drops dead letters. Nothing is changed without a yes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from tidings.cli._failed import Action, Failed, PlannedAction, add_action, add_list, add_show
from tidings.cli._output import moment
from tidings.cli._selecting import BIGGEST, Choice

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.errors import TidingsError
    from tidings.operations.dead import DeadLetter, DeadLetters
    from tidings.service import Service
    from tidings.stores import EventStore

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Events that a service gave up: list, show, retry, drop.")


class _Dead(Failed["DeadLetters", "DeadLetter"]):
    command = "dead"
    noun = "dead letters"
    metavar = "ID"
    names = Annotated[list[int] | None, typer.Argument(metavar="ID", min=1, max=BIGGEST, help="As 'dead list' shows.")]
    name = Annotated[int, typer.Argument(metavar="ID", min=1, max=BIGGEST, help="As 'dead list' shows it.")]
    titles = ("SERVICE", "ID", "DIED", "KIND", "TYPE", "EVENT", "REASON")
    right = (1,)

    def of(self, database: Database, service: str, log: UUID, store: EventStore) -> DeadLetters:
        from tidings.operations.dead import DeadLetters

        return DeadLetters(database, service, log, store)

    def missing(self) -> type[TidingsError]:
        from tidings.operations.dead import DeadLetterNotFound

        return DeadLetterNotFound

    async def get(self, operations: DeadLetters, name: str) -> DeadLetter:
        return await operations.get(int(name))

    async def choose(self, operations: DeadLetters, verb: str, choice: Choice[str]) -> PlannedAction:
        if choice.named:
            wanted, stays = [(await operations.get(int(name))).id for name in choice.named], ""
        else:
            found = await operations.ids(choice.selection, limit=choice.limit)
            wanted = [number for number, kind in found if verb == "drop" or kind != "message"]
            left = len(found) - len(wanted)
            stays = f"{left} are messages, not events, and cannot be retried: drop them." if left else ""
        if verb == "retry":
            await operations.check(wanted)

        async def names() -> list[int]:
            return sorted(wanted)

        some = partial(operations.retry, all_or_none=False)
        return PlannedAction(len(wanted), partial(getattr(operations, verb), wanted), stays, names, some)

    def row(self, service: Service, entry: DeadLetter) -> tuple[Any, ...]:
        place = f"{entry.stream}@{entry.version}" if entry.stream and entry.version is not None else entry.stream
        why = entry.reason.partition("\n")[0]
        return (service.name, entry.id, moment(entry.died_at), entry.kind, entry.type, place, why)

    def facts(self, service: Service, entry: DeadLetter) -> dict[str, Any]:
        return {"service": service.name} | asdict(entry)

    def story(self, service: Service, entry: DeadLetter) -> tuple[str, Sequence[tuple[str, object]]]:
        names = ("kind", "position", "stream", "version", "type", "event_id", "key", "handler", "attempts")
        holds = "later events of its key wait until it is retried or dropped" if entry.holds_key else None
        fields = [*((name, getattr(entry, name)) for name in names), ("died", moment(entry.died_at)), ("holds", holds)]
        return f"dead letter {entry.id} of {service.name}: {entry.reason.partition(chr(10))[0]}", fields


_DEAD = _Dead()
add_list(app, _DEAD, "List the dead letters of services, the oldest first.")
add_show(app, _DEAD, "Show everything about one dead letter: the event, the reason, the traceback.")
for _action in (
    Action(
        "retry",
        "retried",
        "Hand dead letters to their handlers again. Mend the handler first.",
        "Its handler runs again as soon as the service does.",
        paced=True,
    ),
    Action("drop", "dropped", "Delete dead letters for good: the service will not handle these events any more."),
):
    add_action(app, _DEAD, _action)
