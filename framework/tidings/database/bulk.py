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

    def __init__(self, statement: Update, names: Sequence[str]) -> None:
        """`names` are those of the bound parameters that rows give."""
        self._statement = statement
        self._names = tuple(names)
        self._compiled: Any = None

    async def run(self, connection: AsyncConnection, values: Sequence[tuple[Any, ...]]) -> int:
        """Return how many rows of the table it changed; `values`, one or more, give its bound parameters, in the order
        of their names."""
        dialect = connection.dialect
        if dialect.name == "sqlite":
            if self._compiled is None:
                self._compiled = self._statement.compile(dialect=dialect)
                assert len(self._compiled.positiontup) > 1
            fixed = {name: value for name, value in self._compiled.params.items() if name not in self._names}
            places = {name: place for place, name in enumerate((*self._names, *fixed))}
            pick, rest = itemgetter(*map(places.__getitem__, self._compiled.positiontup)), tuple(fixed.values())
            result = await connection.exec_driver_sql(self._compiled.string, [pick(row + rest) for row in values])
            return result.rowcount
        rows = [dict(zip(self._names, row, strict=True)) for row in values]
        if len(rows) == 1 or dialect.supports_sane_multi_rowcount:
            return (await connection.execute(self._statement, rows)).rowcount
        changed = 0
        for row in rows:
            changed += (await connection.execute(self._statement, row)).rowcount
        return changed
