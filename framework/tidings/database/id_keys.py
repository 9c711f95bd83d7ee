"""Which keys a service has made ids with, so that none of them is forgotten: their names, and no key itself.

A process without one of these keys would not recognise what was emitted with it, and a replay would emit it again.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database.engine import Database
from tidings.database.tables import floors, id_keys, replays, watermarks
from tidings.errors import ConfigurationError, Fenced
from tidings.protocol.identity import OPEN, IdKeys

__all__ = ["forget_key", "keep_keys", "known_keys"]


async def keep_keys(database: Database, service: str, keys: IdKeys) -> None:
    """Note that ids are made with the first of these keys from now on.

    Raises `ConfigurationError` if a key that made ids before is not among them, `DatabaseUnavailable`, and `Fenced` if
    another process notes keys at the same moment.
    """
    names = [key.name for key in keys.keys]
    async with database.reading() as connection:
        noted, new = await _compare(connection, service, names)
    if missing := sorted(noted - set(names)):
        raise ConfigurationError(_missing(service, missing[0]))
    if not new:
        return
    try:
        async with database.turn, database.transaction() as connection:
            _, new = await _compare(connection, service, names)  # another partition may have noted it meanwhile
            for name in sorted(new):
                await connection.execute(id_keys.insert().values(service=service, name=name))
    except IntegrityError as error:
        if names[0] not in await known_keys(database, service):
            raise Fenced(f"service {service!r}: another process joined at the same moment") from error


async def _compare(connection: AsyncConnection, service: str, names: Sequence[str]) -> tuple[set[str], set[str]]:
    """Return the names of keys that made ids, and those that are to be noted."""
    query = sa.select(id_keys.c.name).where(id_keys.c.service == service)
    noted = set(await connection.scalars(query))
    new = {names[0]} - noted
    if not noted:
        for reached in (floors.c.position, watermarks.c.position, replays.c.upto):  # a replay lowers the other two
            worked = sa.select(sa.literal(1)).where(reached.table.c.service == service, reached >= 0).limit(1)
            if await connection.scalar(worked) is not None:  # a Tidings that knew no keys was at work
                return {OPEN}, new | {OPEN}
    return noted, new


async def known_keys(database: Database, service: str) -> set[str]:
    """Return the names of the keys that ids were made with. Raises `DatabaseUnavailable`."""
    async with database.reading() as connection:
        return set(await connection.scalars(sa.select(id_keys.c.name).where(id_keys.c.service == service)))


async def forget_key(database: Database, service: str, name: str, keys: IdKeys) -> None:
    """Let the service start with `keys`, although it has made ids with another one. Raises `DatabaseUnavailable`.

    The first of `keys` is noted instead: a service without any note counts as one that has made ids without a key.
    """
    instead = keys.keys[0].name
    these = (id_keys.c.service == service, id_keys.c.name.in_((name, instead)))
    async with database.turn, database.transaction() as connection:
        await connection.execute(id_keys.delete().where(*these))
        await connection.execute(id_keys.insert().values(service=service, name=instead))


def _missing(service: str, name: str) -> str:
    if name == OPEN:
        made, remedy = (
            "without a key, and TIDINGS_ID_KEYS does not say so",
            "Write TIDINGS_ID_KEYS=KEY,open (in which order, if several processes run: docs/trust.md)",
        )
    else:
        made = (
            f"with key {name}, which TIDINGS_ID_KEYS does not contain ('tidings keys names' names those that it does)"
        )
        remedy = "Add that key, after the one that makes new ids"
    return (
        f"service {service!r} has made ids of emitted events {made}: a replay, or a new database, would emit those "
        f"events a second time. {remedy}. To accept that: tidings keys forget MODULE:SERVICE {name}"
    )
