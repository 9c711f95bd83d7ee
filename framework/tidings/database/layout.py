"""Into how many partitions a service is divided, and how that is changed, while it runs or not. It touches no queue.

Count and epoch live in the service's database. Resizing is one transaction there: the epoch rises, and each new range
of buckets begins at the lowest floor of those that it overlaps; watermarks belong to buckets, so they stay. Queues
follow: whoever joins and finds that they are of an older epoch makes them anew, and passes over the log heal what they
held. So a resizing that is interrupted anywhere is done by the next who joins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.buses import Subscription, check_partitions
from tidings.database.engine import Database
from tidings.database.notebook import Notebook, notebook_of
from tidings.database.tables import floors, partitions, watermarks
from tidings.errors import ConfigurationError, Fenced
from tidings.protocol.position import BUCKETS

__all__ = [
    "Layout",
    "Range",
    "ask_for",
    "lay_out",
    "layout_of",
    "lowest",
    "ranges_of",
    "resize",
    "settled",
    "was_rebound",
]


@dataclass(frozen=True, slots=True)
class Layout:
    """How a service is divided, as its database says."""

    service: str
    count: int
    epoch: int
    rebound: int
    """The epoch whose queues were made."""
    former: int
    """The largest count that there was: queues of it may still be there."""

    @property
    def subscriptions(self) -> list[Subscription]:
        """One for each partition."""
        return [Subscription(self.service, index, self.count) for index in range(self.count)]

    @property
    def queues_are_old(self) -> bool:
        """The queues of this layout are to be made anew: they hold, or are bound to, what belonged to another one."""
        return self.rebound < self.epoch

    @property
    def strays(self) -> list[Subscription]:
        """What another layout left, or a process that had not heard of this one made again."""
        if not self.epoch:
            return []
        first = 0 if self.count == 1 else self.count
        numbered = [Subscription(self.service, index, BUCKETS) for index in range(first, self.former)]
        return numbered if self.count == 1 else [Subscription(self.service), *numbered]


class Range(NamedTuple):
    """One partition's row."""

    first: int
    last: int
    """Buckets."""
    floor: int
    active: str | None
    """The process at work on it; None after a clean end."""
    asked: str | None
    """The process that asks for it."""
    handlers: str | None = None
    """Whom its events are given to (`tidings.database.enrolment`); None where nobody has noted it."""


async def layout_of(connection: AsyncConnection, service: str, *, locked: bool = False) -> Layout | None:
    """None for a service whose database says nothing: it has never run, or was never divided. With `locked`, nobody
    changes it before the end of the transaction."""
    wanted = sa.select(*(partitions.c[field.name] for field in fields(Layout))).where(partitions.c.service == service)
    row = (await connection.execute(wanted.with_for_update() if locked else wanted)).one_or_none()
    return None if row is None else Layout(*row)


async def lay_out(database: Database, service: str, wanted: int | None) -> Layout:
    """The layout, made where there is none: `wanted` partitions, or one.

    Raises `ConfigurationError` when the database says another number than `wanted`, `DatabaseUnavailable`, and `Fenced`
    when another process made it at the same moment.
    """
    try:
        async with database.turn, database.transaction() as connection:
            found = await layout_of(connection, service) or await _begin(connection, service, wanted)
    except IntegrityError as error:
        raise Fenced(f"service {service!r}: another process joined at the same moment") from error
    if wanted is not None and wanted != found.count:
        raise ConfigurationError(
            f"service {service!r} is declared with partitions={wanted}, but its database {database.shown} says "
            f"{found.count}. To resize it: tidings partitions MODULE:SERVICE --resize {wanted}; else declare "
            f"partitions={found.count}, or leave it out to take what the database says"
        )
    return found


async def _begin(connection: AsyncConnection, service: str, wanted: int | None) -> Layout:
    """A database of an older Tidings has floors, but no layout: that service is one partition."""
    ran = await connection.scalar(sa.select(floors.c.service).where(floors.c.service == service).limit(1))
    count = 1 if ran else wanted or 1
    made = Layout(service, count, epoch=0, rebound=0, former=count)
    await connection.execute(partitions.insert().values(asdict(made)))
    return made


async def resize(database: Database, service: str, to: int) -> tuple[Layout, Layout]:
    """Divide the service into `to` partitions; the layout before, and the one from now on (the same when there is
    nothing to change). Processes that run notice within seconds.

    Raises `ConfigurationError`, `DatabaseUnavailable`; interrupted, it was done or it was not.
    """
    check_partitions(to)
    begun: list[tuple[str, int]] = []
    async with database.turn, database.transaction() as connection:
        before = await layout_of(connection, service, locked=True) or await _begin(connection, service, None)
        if before.count == to:
            return before, before
        after = replace(before, count=to, epoch=before.epoch + 1, former=max(before.former, to))
        this = partitions.update().where(partitions.c.service == service)
        await connection.execute(this.values(asdict(after)))
        logs = await connection.scalars(sa.select(floors.c.log).where(floors.c.service == service).distinct())
        for log in map(UUID, list(logs)):
            rows = await ranges_of(connection, service, log)
            agreed, handlers = _common(row.handlers for row in rows)
            if not agreed:
                raise ConfigurationError(
                    f"service {service!r} is in the middle of a deploy: its partitions give their events to different "
                    "handlers. Start the new version, wait until 'tidings status' shows it at work on every partition, "
                    "then resize. Nothing was changed"
                )
            of_log = (floors.c.service == service, floors.c.log == str(log))
            await connection.execute(floors.delete().where(*of_log))
            own: dict[str, object] = {"service": service, "log": str(log)}
            own["handlers"] = handlers
            divided = [own | _covering(rows, subscription.buckets) for subscription in after.subscriptions]
            await connection.execute(floors.insert(), divided)
            begun += [(row.active, row.first) for row in rows if row.active is not None]
    for process, first in begun:  # nobody will look for them
        Notebook.discard(notebook_of(database.file, process, first))
    return before, after


def _common(ranges: Iterable[str | None]) -> tuple[bool, str | None]:
    """Whether these ranges, as far as anything is noted of them, give to the same handlers; and those."""
    noted = [handlers for handlers in ranges if handlers is not None]
    return all(each == noted[0] for each in noted), noted[0] if noted else None


def _covering(rows: Iterable[Range], buckets: range) -> dict[str, object]:
    """The row of a new range. What nobody has a floor for was never settled.

    Nobody is at work on it: who was at work on the old one may still end cleanly, and has no row to say so.
    """
    below = [row for row in rows if row.first < buckets.stop and row.last >= buckets.start]
    return {"first_bucket": buckets.start, "last_bucket": buckets.stop - 1, "position": lowest(below, buckets)}


async def was_rebound(database: Database, layout: Layout) -> None:
    """Its queues were made; nothing is said of a layout that is not the present one any more."""
    this = (partitions.c.service == layout.service, partitions.c.epoch == layout.epoch)
    async with database.turn, database.transaction() as connection:
        await connection.execute(partitions.update().where(*this).values(rebound=layout.epoch))


async def ranges_of(connection: AsyncConnection, service: str, log: UUID) -> list[Range]:
    """The rows of a service's partitions, as far as they have joined this log, in their order."""
    columns = (
        floors.c.first_bucket,
        floors.c.last_bucket,
        floors.c.position,
        floors.c.active,
        floors.c.asked,
        floors.c.handlers,
    )
    of_log = (floors.c.service == service, floors.c.log == str(log))
    found = await connection.execute(sa.select(*columns).where(*of_log).order_by(floors.c.first_bucket))
    return [Range(*row) for row in found]


async def ask_for(database: Database, service: str, firsts: Mapping[int, str], process: str) -> None:
    """Ask, for `process`, for the partitions that begin at these buckets, each of the process named with it."""
    rows = [{"at": first, "owner": owner} for first, owner in firsts.items()]
    note = (
        floors.update()
        .where(
            floors.c.service == service,
            floors.c.first_bucket == sa.bindparam("at"),
            floors.c.active == sa.bindparam("owner"),
            floors.c.asked.is_(None),
        )
        .values(asked=process)
    )
    async with database.turn, database.transaction() as connection:
        await connection.execute(note, rows)


def lowest(rows: Iterable[Range], buckets: range = range(BUCKETS)) -> int:
    """Everything up to here is settled in all these buckets; -1 while there is one that nobody has joined with."""
    floor, following = None, buckets.start
    for row in rows:
        if row.first > following:
            return -1
        floor = row.floor if floor is None else min(floor, row.floor)
        following = row.last + 1
    return -1 if floor is None or following < buckets.stop else floor


async def settled(database: Database, service: str, log: UUID, bucket: int | None = None) -> int:
    """As committed by whichever process, however the service is divided: everything up to here, or without a bucket
    everything up to here in all of them; -1 for nothing. Raises `DatabaseUnavailable`."""
    async with database.reading() as connection:
        rows = await ranges_of(connection, service, log)
        if bucket is None:
            return lowest(rows)
        of_bucket = (watermarks.c.service == service, watermarks.c.log == str(log), watermarks.c.bucket == bucket)
        mark = await connection.scalar(sa.select(watermarks.c.position).where(*of_bucket))
    floor = next((row.floor for row in rows if row.first <= bucket <= row.last), -1)
    return max(floor, -1 if mark is None else mark)
