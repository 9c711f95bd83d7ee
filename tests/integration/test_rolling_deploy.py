"""Two versions of a service's code at once, as in a rolling deploy: what the older one still has under way is fenced.

It has run its own handlers only. If it could move a watermark after the newer version has taken over, a handler that
is new would never be given the event.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa

from tests.integration.databases import database_url
from tests.integration.embedded import Happened, until
from tidings import Service
from tidings.database.engine import Database, connected, open_database
from tidings.database.enrolment import Enrolled, enrol
from tidings.database.inbox import Inbox
from tidings.errors import Fenced
from tidings.modelling.handlers import Since
from tidings.modelling.roster import BEHIND, SKIPPED, Span
from tidings.protocol.position import ALL_BUCKETS

pytestmark = pytest.mark.postgresql

LOG = uuid4()
FIRST, BUCKET, POSITION = ALL_BUCKETS.start, 7, 40


def code(*names: str, since: Since | None = None) -> Service:
    """A version of the service with these handlers; all but the first begin at `since`."""
    service = Service("shop")
    for name in names:

        @service.on(Happened, name=name, since=None if name == names[0] else since)
        async def handle(event: Happened) -> None: ...

    return service


class Version:
    """One process of the service, with one version of its code."""

    def __init__(self, database: Database, service: Service) -> None:
        self.database = database
        self.service = service
        self.inbox = Inbox(database, "shop", LOG, ALL_BUCKETS)

    async def take_over(self) -> Enrolled:
        """What a process does that is given the messages."""
        async with self.database.transaction() as connection:
            await self.inbox.watermarks.fence(connection)
            enrolled = await enrol(connection, self.service, LOG, ALL_BUCKETS)
        if enrolled.changed:
            self.inbox.watermarks.fenced_others()
        return enrolled

    async def handles(self, *, bucket: int = BUCKET) -> None:
        """Commit an event of the bucket."""
        async with self.database.transaction() as connection:
            await self.inbox.watermarks.move(connection, {bucket: (-1, POSITION)})


@asynccontextmanager
async def at_work(folder: Path, before: Service, after: Service) -> AsyncIterator[tuple[Version, Version]]:
    """Two processes: the older code is at work, the newer has joined."""
    url = database_url(folder, "shop")
    async with open_database(url) as database, connected(url) as other:
        old, new = Version(database, before), Version(other, after)
        await old.inbox.join()
        await old.take_over()
        await new.inbox.join()
        yield old, new


CHANGED = {
    "added": (code("first"), code("first", "second")),
    "removed": (code("first", "second"), code("first")),
    "renamed": (code("first"), code("second")),
}


@pytest.mark.parametrize("bucket", [FIRST, BUCKET])
@pytest.mark.parametrize(("before", "after"), CHANGED.values(), ids=CHANGED)
async def test_older_code_commits_nothing_after_newer_code_has_taken_over(
    tmp_path: Path, before: Service, after: Service, bucket: int
) -> None:
    async with at_work(tmp_path, before, after) as (old, new):
        assert (await new.take_over()).changed
        with pytest.raises(Fenced):
            await old.handles(bucket=bucket)
        with pytest.raises(Fenced, match="another version of the service has taken over"):
            async with old.database.transaction() as connection:
                await old.inbox.watermarks.fence(connection)  # goes before floors and held events
        await new.handles(bucket=bucket)


async def test_the_same_code_fences_nobody(tmp_path: Path) -> None:
    async with at_work(tmp_path, code("first", "second"), code("first", "second")) as (old, new):
        assert not (await new.take_over()).changed
        await old.handles()


@pytest.mark.usefixtures("on_postgresql")
@pytest.mark.parametrize("since", ["start", None], ids=["its_past_counts", "its_past_does_not_count"])
async def test_what_older_code_commits_while_newer_code_takes_over_is_known_to_the_newer(
    tmp_path: Path, since: Since | None
) -> None:
    """The older version has handled an event with its own handlers, and its commit is under way."""
    async with at_work(tmp_path, code("first"), code("first", "second", since=since)) as (old, new):
        async with old.database.transaction() as connection:
            await old.inbox.watermarks.move(connection, {BUCKET: (-1, POSITION)})
            await old.inbox.floor.raise_to(connection, POSITION - 1)
            taking_over = asyncio.create_task(new.take_over())
            await until(lambda: _waits_for_a_lock(old.database))
        enrolled = await taking_over
    past = [span for span in enrolled.spans if span.bucket == BUCKET]
    if since == "start":
        assert past == [Span(BUCKET, "second", BEHIND, -1, -1)], "the new handler is still given the event"
    else:
        assert past == [Span(BUCKET, "second", SKIPPED, -1, POSITION)]
        assert {span.upto for span in enrolled.spans} == {POSITION, POSITION - 1}


async def _waits_for_a_lock(database: Database) -> bool:
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    async with database.reading() as connection:
        return bool(await connection.scalar(sa.text(waiting)))
