"""`tidings keys`: keys that seal messages, and keys that make the ids of emitted events."""

from __future__ import annotations

from typing import Annotated

import typer

from tidings.cli._asking import Yes, confirmed
from tidings.cli._exits import NO, OK, Refused, answering
from tidings.cli._find import named
from tidings.cli._output import plain, say
from tidings.operations.looking import existing_database
from tidings.protocol.identity import OPEN
from tidings.protocol.seal import new_key
from tidings.settings import Settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Keys of messages and of the ids of emitted events: new, names, forget.")


@app.command()
def new() -> None:
    """Print a new key, and nothing else. Tidings does not store it.

    As TIDINGS_BUS_KEYS it seals messages: give it to relay and services. As TIDINGS_ID_KEYS it makes the ids of emitted
    events: give it to all processes of a service. TIDINGS_BUS_KEYS__FILE or TIDINGS_ID_KEYS__FILE can name a file with
    it instead. To change the seal's keys without a pause: first give the services OLD,NEW, then the relay NEW,OLD, then
    both NEW. Keys of ids must stay: first give all processes OLD,NEW, then NEW,OLD.
    """
    print(new_key())


@app.command()
@answering
async def names(
    service: Annotated[
        str | None, typer.Argument(metavar="MODULE:SERVICE", help="Also name keys that this service has used.")
    ] = None,
) -> int:
    """Print the names of the keys in TIDINGS_ID_KEYS, as errors and databases use them. No key is shown."""
    from tidings.database.id_keys import known_keys

    settings = Settings()
    there = [key.name for key in settings.ids.keys]
    for name in there:
        say(name)
    if service is not None:
        _, found = named(service, settings)
        async with existing_database(settings, found.name) as database:
            used = set[str]() if database is None else await known_keys(database, found.name)
        for name in sorted(used - set(there)):
            say(plain(f"{name}, used by {found.name}, but not in TIDINGS_ID_KEYS"))
        return NO if used - set(there) else OK
    return OK


@app.command()
@answering
async def forget(
    service: Annotated[str, typer.Argument(metavar="MODULE:SERVICE", help="Or the name of one in TIDINGS_SERVICES.")],
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the key, as in the error.")],
    yes: Yes = False,
) -> int:
    """Let a service start without a key that it has made ids with, if the key is lost.

    Events that were emitted with it are no longer recognised: a replay, or a new database, emits them again.
    """
    from tidings.database.id_keys import forget_key, known_keys

    settings = Settings()
    _, found = named(service, settings)
    if name in [key.name for key in settings.ids.keys]:
        raise Refused(NO, f"key {name} is in TIDINGS_ID_KEYS, so nothing needs to be forgotten: take it out first")
    async with existing_database(settings, found.name) as database:
        used = set[str]() if database is None else await known_keys(database, found.name) or {OPEN}
        if database is None or name not in used:
            raise Refused(NO, f"service {found.name!r} has made no ids with key {name!r}")
        if not confirmed(f"Forget that service {found.name} has made ids with key {name}?", yes):
            return NO
        await forget_key(database, found.name, name, settings.ids)
    say(plain(f"{found.name}: key {name} is forgotten. Start the service without it."))
    return OK
