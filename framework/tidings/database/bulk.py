"""An UPDATE of many rows at once that counts what it changed. It knows nothing of any table."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

from sqlalchemy import Update
from sqlalchemy.ext.asyncio import AsyncConnection

__all__ = ["BulkUpdate"]


class BulkUpdate:
    """An UPDATE that is compiled once and run for many rows.

    SQLAlchemy makes a dictionary of every parameter for each row, which takes longer than the row itself takes in
    SQLite. The statement has at least two bound parameters, of types that the driver takes as they are: texts and
    numbers.
    """

    def __init__(self, statement: Update) -> None:
        self._statement = statement
        self._compiled: Any = None

    async def run(self, connection: AsyncConnection, rows: Sequence[dict[str, Any]]) -> int:
        """Return how many rows of the table it changed; `rows`, one or more, give its bound parameters."""
        dialect = connection.dialect
        if dialect.name == "sqlite":
            if self._compiled is None:
                self._compiled = self._statement.compile(dialect=dialect)
                assert len(self._compiled.positiontup) > 1
            fixed, pick = self._compiled.params, itemgetter(*self._compiled.positiontup)
            result = await connection.exec_driver_sql(self._compiled.string, [pick(fixed | row) for row in rows])
            return result.rowcount
        if len(rows) == 1 or dialect.supports_sane_multi_rowcount:
            return (await connection.execute(self._statement, rows)).rowcount
        changed = 0
        for row in rows:
            changed += (await connection.execute(self._statement, row)).rowcount
        return changed
