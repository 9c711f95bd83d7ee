"""Spans: what a handler that was added late, or was away, is still given on its own. It moves them as work is done.

Every write takes the connection of the transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.scope import Conditions, Scope
from tidings.errors import Fenced
from tidings.modelling.roster import SKIPPED

__all__ = ["Spans"]

Late = tuple[int, str, str]
"""A span's bucket, handler and kind."""


class Spans:
    """The spans of one bucket range."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    async def advance(self, connection: AsyncConnection, moves: Sequence[tuple[Late, int, int]]) -> None:
        """Compare and set how far spans are: from, to. Raises `Fenced` when any stood elsewhere: roll back."""
        rows = tables.spans
        for late, old, new in moves:
            this = rows.update().where(*self._of(late), rows.c.done == old).values(done=new)
            self._check(late, (await connection.execute(this)).rowcount)

    async def end(self, connection: AsyncConnection, ended: Sequence[tuple[Late, int]]) -> None:
        """Delete spans of which nothing is left; each stands at a position. Raises `Fenced` where it does not: roll
        back."""
        rows = tables.spans
        for late, at in ended:
            this = rows.delete().where(*self._of(late), rows.c.done == at)
            self._check(late, (await connection.execute(this)).rowcount)

    async def raise_all(self, connection: AsyncConnection, names: Collection[str], position: int) -> None:
        """Note that these handlers have done everything up to the position that they are given on their own.

        `Watermarks.fence` goes before.
        """
        rows = tables.spans
        theirs = (rows.c.handler.in_(names), rows.c.kind != SKIPPED, rows.c.done < position)
        await connection.execute(rows.update().where(*self._scope.in_range(rows), *theirs).values(done=position))

    def _of(self, late: Late) -> Conditions:
        rows = tables.spans
        bucket, handler, kind = late
        this = (rows.c.bucket == bucket, rows.c.handler == handler, rows.c.kind == kind)
        return *self._scope.of_log(rows), *this

    def _check(self, late: Late, rows: int) -> None:
        if rows != 1:
            raise Fenced(
                f"service {self._scope.service!r}: another process gave handler {late[1]!r} its past in bucket "
                f"{late[0]}; this group was rolled back"
            )
