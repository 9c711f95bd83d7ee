"""`tidings capture`: an event of production as a test that fails as the event failed. It only reads."""

from __future__ import annotations

import re
import shlex
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Final
from uuid import UUID

import typer

from tidings.cli._asking import chosen
from tidings.cli._exits import NO, OK, Refused, answering
from tidings.cli._find import event_named, find_services, named
from tidings.cli._output import say
from tidings.cli._reading import Reading
from tidings.operations.looking import existing_database, existing_store
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.operations.lookup import Target
    from tidings.service import Service
    from tidings.stores import EventStore

__all__ = ["capture"]

_LETTER: Final = re.compile(r"dead:([0-9]{1,18})")


@answering
async def capture(
    event: Annotated[
        str,
        typer.Argument(
            metavar="EVENT", help="Its id, STREAM@VERSION, its global position, or dead:ID as 'dead list' shows it."
        ),
    ],
    service: Annotated[
        str | None,
        typer.Option(
            "--service", "-s", metavar="MODULE:SERVICE", help="Or its name; by default the one of TIDINGS_SERVICES."
        ),
    ] = None,
    redact: Annotated[
        list[str] | None,
        typer.Option("--redact", metavar="FIELD", help="Replace this field's values, at any depth; may be repeated."),
    ] = None,
) -> int:
    """Write a pytest file that gives an event to its handler again: tidings capture EVENT > test_it.py

    What there was before is stated as given: what the streams held that the handler's repositories may have read, the
    earlier events of the partition key, and the event's causes. The test fails as the event failed. Of several services
    the one is meant in which the event failed.

    With --redact, the same value gets the same replacement everywhere, and ids keep their shape. Whatever else is
    personal in these events stays in the file: read it before you commit it.
    """
    settings = Settings()
    letter = _LETTER.fullmatch(event)
    services = _services(service, settings, alone=letter is not None)
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(existing_store(settings))
        pairs = [(one, await stack.enter_async_context(existing_database(settings, one.name))) for one in services]
        from tidings.cli._captured import test_file
        from tidings.operations.capture import capture as read

        if letter is None:
            target: Target = event_named(event)
        else:
            target = await _event_of_letter(settings, store, services[0], int(letter[1]))
        with Reading() as reading:
            captured = await read(store, pairs, target, progress=reading.reached)
    fields = redact or []
    options = [f"--redact {shlex.quote(field)}" for field in fields]
    say(test_file(captured, fields, " ".join(("tidings capture", shlex.quote(event), *options))).rstrip("\n"))
    return OK


def _services(target: str | None, settings: Settings, *, alone: bool) -> list[Service]:
    if target is not None:
        return [named(target, settings)[1]]
    return [chosen(None, settings)] if alone else list(find_services((), settings).values())


async def _event_of_letter(settings: Settings, store: EventStore, service: Service, id: int) -> UUID:
    """Return the id of the event that a dead letter is about."""
    from tidings.operations.dead import DeadLetters

    async with existing_database(settings, service.name) as database:
        if database is None:
            raise Refused(NO, f"service {service.name!r} has never run here, so it has no dead letters")
        letter = await DeadLetters(database, service.name, await store.log_id()).get(id)
    if letter.kind != "handler" or letter.event_id is None:
        what = "a message that is no event" if letter.kind == "message" else "an event that the store refuses"
        cause = f": capture its cause, the event at position {letter.position}" if letter.position is not None else ""
        raise Refused(NO, f"dead letter {id} of service {service.name!r} is {what}, so no handler was given it{cause}")
    return UUID(letter.event_id)
