"""`tidings capture`: writes a test from an event of production and the handler that it was given to. It only reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Annotated, Final
from uuid import UUID

import typer

from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._find import event_named, find_services, named
from tidings.cli._output import say
from tidings.cli._reading import Reading
from tidings.operations.looking import existing_database, existing_store
from tidings.settings import Settings

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.operations.dead import DeadLetter
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
        typer.Option(
            "--redact", metavar="FIELD", help="Replace this field's values, at any depth. Repeat it for more."
        ),
    ] = None,
) -> int:
    """Write a pytest file that gives an event to its handler again: tidings capture EVENT > test_it.py

    The test states earlier events as given: those of the streams that the handler's repositories may have read, those
    of the same partition key, and the event's causes. It fails as the event failed, if the reason is in the handler or
    in these events. Stand-ins replace what the service's lifespan yields; if the traceback says how one failed, it
    fails in the same way. If several services handle the event, the one in which it failed is taken.

    With --redact, each value gets the same replacement everywhere, and ids keep their shape. Other personal values in
    these events stay in the file: read it before you commit it.
    """
    settings = Settings()
    letter = _LETTER.fullmatch(event)
    services = list(find_services((), settings).values()) if service is None else [named(service, settings)[1]]
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(existing_store(settings))
        pairs = [(one, await stack.enter_async_context(existing_database(settings, one.name))) for one in services]
        from tidings.cli._captured import test_file
        from tidings.operations.capture import capture as read

        if letter is None:
            target: Target = event_named(event)
        else:
            found, target = await _event_of_letter(store, pairs, int(letter[1]))
            pairs = [pair for pair in pairs if pair[0] is found]
        with Reading() as reading:
            captured = await read(store, pairs, target, progress=reading.reached)
    fields = redact or []
    options = [f"--redact {shlex.quote(field)}" for field in fields]
    say(test_file(captured, fields, " ".join(("tidings capture", shlex.quote(event), *options))).rstrip("\n"))
    return OK


async def _event_of_letter(
    store: EventStore, pairs: Sequence[tuple[Service, Database | None]], id: int
) -> tuple[Service, UUID]:
    """Return the service that has a dead letter with this id, and the id of the event that it is about."""
    from tidings.operations.dead import DeadLetterNotFound, DeadLetters

    log = await store.log_id()
    found: list[tuple[Service, DeadLetter]] = []
    names = ", ".join(service.name for service, _ in pairs)
    if all(database is None for _, database in pairs):
        raise Refused(NO, f"service {names} has never run here, so it has no dead letters")
    for service, database in pairs:
        if database is None:
            continue
        try:
            found.append((service, await DeadLetters(database, service.name, log).get(id)))
        except DeadLetterNotFound:
            if len(pairs) == 1:
                raise
    if not found:
        raise Refused(NO, f"none of the services {names} has dead letter {id}: 'tidings dead list' shows what there is")
    if len(found) > 1:
        having = ", ".join(service.name for service, _ in found)
        raise Refused(USAGE, f"which service? Several have a dead letter {id}: say --service with one of {having}")
    service, letter = found[0]
    if letter.kind != "handler" or letter.event_id is None:
        what = "a message, not an event" if letter.kind == "message" else "an event that the store refuses"
        cause = f": capture its cause, the event at position {letter.position}" if letter.position is not None else ""
        raise Refused(NO, f"dead letter {id} of service {service.name!r} is {what}, so no handler was given it{cause}")
    return service, UUID(letter.event_id)
