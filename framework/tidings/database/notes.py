"""Notes of events that are being handled, taken after an unclean end only, so that one that ends the process is found.

What they mean is decided in `tidings.delivery.crashes`. Every write takes the connection of the transaction that it
belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.scope import Scope, in_parts
from tidings.errors import Fenced
from tidings.modelling.roster import BEHIND, SKIPPED

__all__ = ["Notes"]


class Notes:
    """The notes of one bucket range."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._of_log = scope.of_log(tables.begun)
        self._in_range = scope.in_range(tables.begun)

    async def read(self, connection: AsyncConnection, names: Collection[str] | None = None) -> dict[int, int]:
        """Return position to the number of unclean ends with that event under way.

        What was settled meanwhile is forgotten first; `names` are all that the service's handlers have, or had, as far
        as is known.
        """
        await self.forget_settled(connection, names)
        columns = (tables.begun.c.position, tables.begun.c.times)
        found = await connection.execute(sa.select(*columns).where(*self._in_range))
        return {row.position: row.times for row in found}

    async def add(self, connection: AsyncConnection, notes: Mapping[int, tuple[int, int]]) -> None:
        """Note what is about to be run: position to bucket, and the number of unclean ends with the event under way if
        the process ends now.

        Raises `Fenced` when another process noted one of them at the same moment: roll back.
        """
        if not notes:
            return
        await self.forget(connection, notes)
        own = self._scope.own
        rows = [own | {"position": at, "bucket": bucket, "times": times} for at, (bucket, times) in notes.items()]
        try:
            await connection.execute(tables.begun.insert().values(rows))  # one statement, however many
        except IntegrityError as error:
            raise Fenced(
                f"service {self._scope.service!r}: another process began one of the positions {sorted(notes)} at the "
                "same moment"
            ) from error

    async def count(self, connection: AsyncConnection, notes: Mapping[int, int]) -> None:
        """Set the number of unclean ends in notes that are there, position to number."""
        for position, times in notes.items():
            this = tables.begun.update().where(*self._of_log, tables.begun.c.position == position)
            await connection.execute(this.values(times=times))

    async def forget(self, connection: AsyncConnection, positions: Iterable[int]) -> None:
        """Forget events that ended while the process did not."""
        for some in in_parts(list(positions)):
            these = (*self._of_log, tables.begun.c.position.in_(some))
            await connection.execute(tables.begun.delete().where(*these))

    async def forget_all(self, connection: AsyncConnection) -> None:
        """Forget all notes of the range: the process ends cleanly."""
        await connection.execute(tables.begun.delete().where(*self._in_range))

    async def forget_settled(self, connection: AsyncConnection, names: Collection[str] | None = None) -> None:
        """Forget notes of events that were settled, whoever did it: who noted them may have been fenced since.

        An event that is held, or that is still to be given to a handler on its own (one of `names`, or any), is not
        settled, although the watermark is above it.
        """
        note, marks, held, spans = tables.begun.c, tables.watermarks.c, tables.held.c, tables.spans.c
        same_bucket = (marks.service == note.service, marks.log == note.log, marks.bucket == note.bucket)
        mark = sa.select(marks.position).where(*same_bucket).scalar_subquery()
        floor = sa.select(tables.floors.c.position).where(*self._scope.of_floor()).scalar_subquery()
        still_held = sa.exists().where(
            held.service == note.service, held.log == note.log, held.position == note.position
        )
        still_late = sa.exists().where(
            spans.service == note.service,
            spans.log == note.log,
            spans.bucket == note.bucket,
            spans.kind != SKIPPED,
            spans.done < note.position,
            (spans.kind == BEHIND) | (spans.upto >= note.position),
            *(() if names is None else (spans.handler.in_(names),)),
        )
        settled = sa.or_(note.position <= mark, note.position <= floor)
        await connection.execute(tables.begun.delete().where(*self._in_range, settled, ~still_held, ~still_late))
