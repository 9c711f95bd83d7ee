"""Watermarks: per bucket, the position of the last event whose effects are committed; they fence rival processes.
Beside each stands a receipt (`tidings.protocol.receipts`) of what was settled, which moves with it.

Every write takes the connection of the transaction that it belongs to; nothing here begins or commits one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection

from tidings.database import tables
from tidings.database.bulk import BulkUpdate
from tidings.database.receipts import BucketRow, Receipts, Written
from tidings.database.scope import Scope
from tidings.errors import Fenced
from tidings.protocol.receipts import Receipt

__all__ = ["Watermarks", "lock_service", "lower"]


_UNCHANGED: Final[Written] = (-2, "")
"""For a receipt that stays as it is."""


class Watermarks:
    """The watermarks of one bucket range."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._replays: dict[int, int] = {}
        """By bucket: how often it had been sent back when this process joined. What it knew before a replay is true no
        more, even where the watermark stands as before, or will again."""
        self.receipts = Receipts()
        """The receipts beside them."""
        rows = tables.watermarks
        ours = scope.of_log(rows)
        moved = rows.update().where(
            *ours,
            rows.c.bucket == sa.bindparam("of_bucket"),
            rows.c.position == sa.bindparam("from_position"),
            rows.c.replays == sa.bindparam("at_replays"),
        )
        moved = moved.values(position=sa.bindparam("to_position"))
        self._move = BulkUpdate(moved, list(_MOVES)[:4])
        settled = moved.values(receipt_at=sa.bindparam("to_receipt_at"), receipt=sa.bindparam("to_receipt"))
        self._settle = BulkUpdate(settled, list(_MOVES))
        further = settled.where(rows.c.receipt_at <= sa.bindparam("to_receipt_at"))
        self._pass = BulkUpdate(further, list(_MOVES))
        self._move_all = _move_all(scope)
        self._replays_of_first = sa.select(rows.c.replays).where(*ours, rows.c.bucket == scope.buckets.start)
        self._replays_kept = self._replays_of_first.with_for_update(read=True)

    async def read(self, connection: AsyncConnection, floor: int, *, receipted: bool) -> dict[int, int]:
        """Return bucket to position when joining; buckets without a row get one.

        `floor` is that of the range, read before; unless `receipted`, a version without receipts has raised it.
        """
        rows = tables.watermarks
        columns = (rows.c.bucket, rows.c.position, rows.c.replays, rows.c.receipt_at, rows.c.receipt)
        known = await connection.execute(sa.select(*columns).where(*self._scope.of_log(rows)))
        found = [row for row in known if row.bucket in self._scope.buckets]
        marks = {row.bucket: row.position for row in found}
        self._replays = dict.fromkeys(self._scope.buckets, 0) | {row.bucket: row.replays for row in found}
        receipts, begun = dict[int, BucketRow](), list[Any]()
        for row in found:
            receipt, start = Receipt.read(row.receipt), max(row.position, floor)
            if receipt is None or row.receipt_at < (row.position if receipted else start):
                receipts[row.bucket] = BucketRow(row.position, start, Receipt(start))
                begun.append(row)
            else:
                receipts[row.bucket] = BucketRow(row.position, row.receipt_at, receipt)
        missing = [bucket for bucket in self._scope.buckets if bucket not in marks]
        if missing:
            first = {"position": -1, "receipt_at": floor, "receipt": Receipt(floor).write()}
            await connection.execute(rows.insert(), [self._scope.own | {"bucket": at} | first for at in missing])
            receipts |= dict.fromkeys(missing, BucketRow(-1, floor, Receipt(floor)))
        if begun:
            await self._begin_receipts(connection, begun, receipts)
        self.receipts.begin(receipts)
        return marks | dict.fromkeys(missing, -1)

    async def _begin_receipts(
        self, connection: AsyncConnection, rows: Collection[Any], receipts: Mapping[int, BucketRow]
    ) -> None:
        """Write receipts that begin anew. Where a row has changed since it was read, another process is at work, and
        fences this one."""
        table = tables.watermarks
        for row in sorted(rows, key=lambda row: row.bucket):
            this = (table.c.bucket == row.bucket, table.c.position == row.position, table.c.receipt == row.receipt)
            begun = receipts[row.bucket]
            text = {"receipt_at": begun.at, "receipt": begun.receipt.write()}
            await connection.execute(table.update().where(*self._scope.of_log(table), *this).values(text))

    async def move(
        self,
        connection: AsyncConnection,
        moves: Mapping[int, tuple[int, int]],
        receipts: Mapping[int, Written] | None = None,
        passed: Mapping[int, tuple[int, Written]] | None = None,
    ) -> None:
        """Compare and set watermarks, bucket to (from, to), with their `receipts`. Raises `Fenced` when any stood
        elsewhere: roll back.

        `passed` are receipts of other buckets, whose watermarks stay where they are. One may have moved beyond them
        meanwhile, in a group of this process.
        """
        receipts, passed = receipts or {}, passed or {}
        if not moves and not passed:
            return
        if connection.dialect.name == "postgresql":
            await self._move_beside_others(connection, moves, receipts, passed)
            return
        at, done = self._replays, 0
        if receipts:
            settled = [(bucket, *moves[bucket], at[bucket], *written) for bucket, written in receipts.items()]
            done += await self._settle.run(connection, settled)
        if len(moves) > len(receipts):
            rest = [(bucket, *move, at[bucket]) for bucket, move in moves.items() if bucket not in receipts]
            done += await self._move.run(connection, rest)
        if passed:
            resting = [(bucket, mark, mark, at[bucket], *written) for bucket, (mark, written) in passed.items()]
            done += await self._pass.run(connection, resting)
        self._check([*moves, *passed], done)

    async def _move_beside_others(
        self,
        connection: AsyncConnection,
        moves: Mapping[int, tuple[int, int]],
        receipts: Mapping[int, Written],
        passed: Mapping[int, tuple[int, Written]],
    ) -> None:
        """Do the same while groups of this process are in other transactions."""
        at = self._replays
        rows = [(bucket, *move, at[bucket], *receipts.get(bucket, _UNCHANGED)) for bucket, move in moves.items()]
        rows += [(bucket, mark, mark, at[bucket], *written) for bucket, (mark, written) in passed.items()]
        rows.sort()  # one order for all, so that no two wait for each other
        columns = {name: list(column) for name, column in zip(_MOVES, zip(*rows, strict=True), strict=True)}
        moved = set(await connection.scalars(self._move_all, columns))
        self._check(moves, len(moves.keys() & moved))
        if beyond := passed.keys() - moved:
            table = tables.watermarks
            these = (*self._scope.of_log(table), table.c.bucket.in_(beyond))
            found = await connection.execute(sa.select(table.c.bucket, table.c.receipt_at).where(*these))
            self._check(beyond, sum(row.receipt_at >= passed[row.bucket][1][0] for row in found))

    async def assert_unmoved(self, connection: AsyncConnection, marks: Mapping[int, int]) -> None:
        """Raise `Fenced` when any watermark stands elsewhere than `marks` says, bucket to position."""
        if not marks:
            return
        rows = tables.watermarks
        columns = (rows.c.bucket, rows.c.position, rows.c.replays)
        these = sa.select(*columns).where(*self._scope.of_log(rows), rows.c.bucket.in_(marks))
        found = await connection.execute(these)
        unmoved = sum((row.position, row.replays) == (marks[row.bucket], self._replays[row.bucket]) for row in found)
        self._check(marks, unmoved)

    async def fence(self, connection: AsyncConnection, *, locking: bool = True) -> None:
        """Raise `Fenced` when a replay has sent the service back, or other code has taken over, since this process
        joined. With `locking`, nobody can until the end of the transaction."""
        found = await connection.scalar(self._replays_kept if locking else self._replays_of_first)
        if found != self._replays[self._scope.buckets.start]:
            raise Fenced(
                f"service {self._scope.service!r}: a replay was asked for, an event skipped, a dead letter retried, or "
                "another version of the service has taken over; joining again"
            )

    async def fence_rivals(self, connection: AsyncConnection, buckets: Collection[int]) -> None:
        """Count up the watermarks of these buckets without moving them.

        A process beside this one knows nothing of what this transaction stages. It can then commit nothing there, and
        joins again. Raises `Fenced` when another process was first. Call `fenced_rivals` once it is committed.
        """
        rows = tables.watermarks
        for bucket in sorted(buckets):
            counted = rows.update().where(
                *self._scope.of_log(rows), rows.c.bucket == bucket, rows.c.replays == self._replays[bucket]
            )
            done = await connection.execute(counted.values(replays=rows.c.replays + 1))
            self._check((bucket,), done.rowcount)

    def fenced_rivals(self, buckets: Collection[int]) -> None:
        """Know that `fence_rivals` was committed."""
        for bucket in buckets:
            self._replays[bucket] += 1

    def fenced_others(self) -> None:
        """Know that this process itself has counted the watermarks up, as a replay does, so that code that was at work
        before it can commit nothing any more."""
        self._replays = {bucket: times + 1 for bucket, times in self._replays.items()}

    def _check(self, buckets: Collection[int], found: int) -> None:
        if found != len(buckets):
            raise Fenced(
                f"service {self._scope.service!r}: another process moved {len(buckets) - found} of the watermarks of "
                f"buckets {sorted(buckets)}, or a replay was asked for, or an event skipped; this group was rolled "
                "back. Are two processes of the service active at once? Stop one: on a bus in memory a service is one "
                "process"
            )


async def lock_service(connection: AsyncConnection, service: str, log: UUID) -> None:
    """Keep a resizing and every group of the service from committing before this transaction ends. What they have
    committed so far is read after this. Rows are locked in the order in which groups lock them, so that neither waits
    for the other for ever."""
    layout, rows = tables.partitions, tables.watermarks
    await connection.execute(sa.select(layout.c.epoch).where(layout.c.service == service).with_for_update())
    ours = sa.select(rows.c.bucket).where(rows.c.service == service, rows.c.log == str(log))
    await connection.execute(ours.order_by(rows.c.bucket).with_for_update())


async def lower(connection: AsyncConnection, service: str, log: UUID, to: int) -> int:
    """Lower the watermarks and floors of a service that are above the position, and return the number of watermarks.
    Receipts that have something above it begin anew. `lock_service` goes before."""
    rows, floors = tables.watermarks, tables.floors
    ours = (rows.c.service == service, rows.c.log == str(log))
    await connection.execute(rows.update().where(*ours, rows.c.receipt_at > to).values(receipt_at=-1, receipt=""))
    lowered = await connection.execute(rows.update().where(*ours, rows.c.position > to).values(position=to))
    proofs = tables.proofs
    proved = (proofs.c.service == service, proofs.c.log == str(log), proofs.c.position > to)
    await connection.execute(proofs.delete().where(*proved))
    of_log = (floors.c.service == service, floors.c.log == str(log), floors.c.position > to)
    receipted = sa.case((floors.c.receipted == floors.c.position, to), else_=-2)
    await connection.execute(floors.update().where(*of_log).values(position=to, receipted=receipted))
    return lowered.rowcount


_MOVES: Final = {
    "of_bucket": sa.Integer,
    "from_position": sa.BigInteger,
    "to_position": sa.BigInteger,
    "at_replays": sa.Integer,
    "to_receipt_at": sa.BigInteger,
    "to_receipt": sa.Text,
}


def _changed(position: Any, receipt_at: Any, receipt: Any) -> dict[str, Any]:
    """Return the new values of a row. A receipt never goes back: what has gone by may have been written meanwhile."""
    rows = tables.watermarks
    further = receipt_at >= rows.c.receipt_at
    return {
        "position": position,
        "receipt_at": sa.case((further, receipt_at), else_=rows.c.receipt_at),
        "receipt": sa.case((further, receipt), else_=rows.c.receipt),
    }


def _move_all(scope: Scope) -> sa.Update:
    """Return the statement that moves many watermarks of PostgreSQL at once: each bound parameter is a list. It locks
    their rows in one order, so that no two processes wait for each other."""
    rows = tables.watermarks
    lists: list[sa.BindParameter[Any]] = [sa.bindparam(name, type_=ARRAY(kind)) for name, kind in _MOVES.items()]
    moves = (
        sa.func.unnest(*lists).table_valued(*(sa.column(name, kind) for name, kind in _MOVES.items())).render_derived()
    )
    ours = scope.of_log(rows)
    stand = (rows.c.bucket == moves.c.of_bucket, rows.c.position == moves.c.from_position)
    locked = (
        sa.select(rows.c.bucket, moves.c.to_position, moves.c.to_receipt_at, moves.c.to_receipt)
        .where(*ours, *stand, rows.c.replays == moves.c.at_replays)
        .order_by(rows.c.bucket)
        .with_for_update(of=rows)
        .cte("locked")
    )
    these = rows.update().where(*ours, rows.c.bucket == locked.c.bucket)
    values = _changed(locked.c.to_position, locked.c.to_receipt_at, locked.c.to_receipt)
    return these.values(values).returning(rows.c.bucket)
