"""`tidings skip`: makes an event dead in a service, so that it is never run. Nothing is done without a yes."""

from __future__ import annotations

from typing import Annotated

import typer

from tidings.cli._asking import Of, Yes, chosen, confirmed
from tidings.cli._exits import NO, OK, Refused, answering
from tidings.cli._find import event_named
from tidings.cli._output import Json, facts, plain, say
from tidings.cli._reading import Reading
from tidings.cli._selecting import DryRun
from tidings.operations.looking import existing_database, existing_store
from tidings.settings import Settings

__all__ = ["skip"]


@answering
async def skip(
    event: Annotated[str, typer.Argument(metavar="EVENT", help="Its id, STREAM@VERSION, or its global position.")],
    service: Of = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: Json = False,
) -> int:
    """Make an event dead in a service: it is never run, and events that wait behind it go on.

    The service may be running, paused, stuck at the event, dying at every start, or not at the event yet. The skip is
    durable at once, and no effects of the event are committed afterwards. Handlers without a session that are running
    in the same partition at that moment may run twice. 'tidings dead retry' brings the event back.
    """
    from tidings.operations.lookup import Lookup, Waiting
    from tidings.operations.skip import Skip, skip_state
    from tidings.operations.skip import skip as do
    from tidings.operations.writer import naming_the_writer

    settings, named = Settings(), event_named(event)
    of = chosen(service, settings)
    async with (
        existing_store(settings) as store,
        naming_the_writer(store, settings, of),
        existing_database(settings, of.name) as database,
    ):
        if database is None:
            raise Refused(NO, f"service {of.name!r} has never run here: start it once, then skip the event")
        log = await store.log_id()
        with Reading() as reading:
            found = await Lookup(store, [(of, database)], log, reading.reached).find(named)
        if isinstance(found, Waiting):
            raise Refused(
                NO, f"event {event} is not in the log yet, so no service has it: look at 'tidings why {event}'"
            )
        state = await skip_state(database, of, log, found)
        where = f"{found.type} {found.id} at {found.stream}@{found.version}, position {found.position}"
        changes = state in (Skip.HELD, Skip.DEAD, Skip.PENDING)
        if changes and not dry_run:
            if not confirmed(f"Skip {where} in service {of.name} ({state.value})?", yes):
                return NO
            state = await do(database, of, log, found)
    if json:
        told = {"service": of.name, "position": found.position, "event_id": found.id, "type": found.type}
        told |= {"stream": found.stream, "version": found.version, "was": state.value}
        say(facts(told | {"dry_run": dry_run}))
        return OK
    if dry_run:
        say(plain(f"{where} would be skipped in {of.name}. It is {state.value}. Nothing was changed."))
        return OK
    outcome = {
        Skip.HELD: "it was held, and is dead now; its key goes on",
        Skip.DEAD: "it was dead and blocked its key, which goes on now",
        Skip.RELEASED: "it is already dead and blocks nothing; nothing was changed",
        Skip.PENDING: "it will be dead when the service comes to it, without being run",
        Skip.NOTED: "it was skipped before, and will be dead when the service comes to it",
    }[state]
    say(plain(f"{of.name}: {where}: {outcome}."))
    return OK
