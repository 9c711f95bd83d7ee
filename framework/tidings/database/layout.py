"""How many partitions a service has, and how that number is changed while the service runs. It touches no queue.

Count and epoch live in the service's database. Resizing is one transaction there: the epoch rises, and each new range
of buckets begins at the lowest floor of those that it overlaps. Watermarks belong to buckets, so they stay. Queues
follow: a process that joins and finds queues of an older epoch makes new ones, and passes over the log bring what the
old ones held. So a resizing that is interrupted anywhere is finished by the next process that joins.
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
from tidings.database.contention import again_when_contended, commanding
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
    """The partitions of a service, as its database says."""

    service: str
    count: int
    epoch: int
    rebound: int
    """The epoch for which the queues were last made."""
    former: int
    """The largest count so far: queues of that layout may still exist."""

    @property
    def subscriptions(self) -> list[Subscription]:
        """One subscription for each partition."""
        return [Subscription(self.service, index, self.count) for index in range(self.count)]

    @property
    def queues_are_old(self) -> bool:
        """Whether the queues must be made anew, because they hold or are bound to what belonged to an older layout."""
        return self.rebound < self.epoch

    @property
    def strays(self) -> list[Subscription]:
        """Queues that an older layout left, or that a process made which does not know of this one yet."""
        if not self.epoch:
            return []
        first = 0 if self.count == 1 else self.count
        numbered = [Subscription(self.service, index, BUCKETS) for index in range(first, self.former)]
        return numbered if self.count == 1 else [Subscription(self.service), *numbered]


class Range(NamedTuple):
    """The row of one partition."""

    first: int
    """The first bucket."""
    last: int
    """The last bucket."""
    floor: int
    active: str | None
    """Id of the process at work on the range; None after a clean stop."""
    asked: str | None
    """Id of a process that asks for the range."""
    handlers: str | None = None
    """The handlers that get its events, as `tidings.database.enrolment` writes them; None where nothing was noted."""
    receipted: int = -2
    """The floor for which receipts were written last."""


async def layout_of(connection: AsyncConnection, service: str, *, locked: bool = False) -> Layout | None:
    """Return the layout; None for a service that has never run or was never divided. With `locked`, it cannot change
    before the end of the transaction."""
    wanted = sa.select(*(partitions.c[field.name] for field in fields(Layout))).where(partitions.c.service == service)
    row = (await connection.execute(wanted.with_for_update() if locked else wanted)).one_or_none()
    return None if row is None else Layout(*row)


async def lay_out(database: Database, service: str, wanted: int | None) -> Layout:
    """Return the layout. Where there is none, make one of `wanted` partitions, or of one.

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
    """Make the layout. A database of an older Tidings has floors but no layout: that service has one partition."""
    ran = await connection.scalar(sa.select(floors.c.service).where(floors.c.service == service).limit(1))
    count = 1 if ran else wanted or 1
    made = Layout(service, count, epoch=0, rebound=0, former=count)
    await connection.execute(partitions.insert().values(asdict(made)))
    return made


@again_when_contended
async def resize(database: Database, service: str, to: int) -> tuple[Layout, Layout]:
    """Divide the service into `to` partitions. Returns the layout before and after (the same one when nothing changes).
    Running processes notice within seconds.

    Raises `ConfigurationError`, `DatabaseUnavailable`. If it is interrupted, the service was resized, or nothing was
    changed.
    """
    check_partitions(to)
    begun: list[tuple[str, int]] = []
    async with database.turn, commanding(database) as connection:
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
    for process, first in begun:  # no later process looks for these notebooks
        Notebook.discard(notebook_of(database.file, process, first))
    return before, after


def _common(ranges: Iterable[str | None]) -> tuple[bool, str | None]:
    """Return whether all ranges with a note give their events to the same handlers, and these handlers."""
    noted = [handlers for handlers in ranges if handlers is not None]
    return all(each == noted[0] for each in noted), noted[0] if noted else None


def _covering(rows: Iterable[Range], buckets: range) -> dict[str, object]:
    """Return the row of a new range. Buckets without a floor were never settled.

    No process is at work on it. The one that was at work on the old range may still stop cleanly, and finds no row.
    """
    below = [row for row in rows if row.first < buckets.stop and row.last >= buckets.start]
    floor = lowest(below, buckets)
    receipted = floor if all(row.receipted == row.floor for row in below) else -2
    return {
        "first_bucket": buckets.start,
        "last_bucket": buckets.stop - 1,
        "position": floor,
        "receipted": receipted,
    }


async def was_rebound(database: Database, layout: Layout) -> None:
    """Note that the queues of this layout were made, unless the service was resized again meanwhile."""
    this = (partitions.c.service == layout.service, partitions.c.epoch == layout.epoch)
    async with database.turn, database.transaction() as connection:
        await connection.execute(partitions.update().where(*this).values(rebound=layout.epoch))


async def ranges_of(connection: AsyncConnection, service: str, log: UUID) -> list[Range]:
    """Return the rows of the partitions that have joined this log, in the order of their buckets."""
    columns = (
        floors.c.first_bucket,
        floors.c.last_bucket,
        floors.c.position,
        floors.c.active,
        floors.c.asked,
        floors.c.handlers,
        floors.c.receipted,
    )
    of_log = (floors.c.service == service, floors.c.log == str(log))
    found = await connection.execute(sa.select(*columns).where(*of_log).order_by(floors.c.first_bucket))
    return [Range(*row) for row in found]


async def ask_for(database: Database, service: str, firsts: Mapping[int, str], process: str) -> None:
    """Ask the processes in `firsts` to give `process` the partitions that begin at these buckets."""
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
    """Return the position up to which all these buckets are settled; -1 while any of them belongs to no row."""
    floor, following = None, buckets.start
    for row in rows:
        if row.first > following:
            return -1
        floor = row.floor if floor is None else min(floor, row.floor)
        following = row.last + 1
    return -1 if floor is None or following < buckets.stop else floor


async def settled(database: Database, service: str, log: UUID, bucket: int | None = None) -> int:
    """Return the position up to which the bucket, or without one every bucket, is settled; -1 for none.

    This is what any process of the service has committed, however it is divided. Raises `DatabaseUnavailable`.
    """
    async with database.reading() as connection:
        rows = await ranges_of(connection, service, log)
        if bucket is None:
            return lowest(rows)
        of_bucket = (watermarks.c.service == service, watermarks.c.log == str(log), watermarks.c.bucket == bucket)
        mark = await connection.scalar(sa.select(watermarks.c.position).where(*of_bucket))
    floor = next((row.floor for row in rows if row.first <= bucket <= row.last), -1)
    return max(floor, -1 if mark is None else mark)
