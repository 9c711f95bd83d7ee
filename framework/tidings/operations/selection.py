"""Selects held events or dead letters: by handler, error, type, key, stream, time. It reads nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

import sqlalchemy as sa

from tidings.database.tables import dead

__all__ = ["EVERYTHING", "Selection"]


@dataclass(frozen=True, slots=True)
class Selection:
    """Conditions that must all hold; None is no condition."""

    handler: str | None = None
    error: str | None = None
    """A part of the reason in any case: an error's type, or words of its message."""
    type: str | None = None
    key: str | None = None
    stream: str | None = None
    since: float | None = None
    """Held or dead since this moment or later, in seconds since 1970."""
    until: float | None = None
    """Held or dead since before this moment, in seconds since 1970."""

    def where(self, table: sa.Table) -> list[sa.ColumnElement[bool]]:
        """Return the conditions for the table of held events or of dead letters."""
        found: list[sa.ColumnElement[bool]] = [
            table.c[name] == value
            for name in ("handler", "type", "key", "stream")
            if (value := getattr(self, name)) is not None
        ]
        if self.error is not None:
            found.append(table.c.reason.icontains(self.error, autoescape=True))
        if table is dead:
            moments = [None if at is None else datetime.fromtimestamp(at, UTC) for at in (self.since, self.until)]
            column: sa.ColumnElement[object] = table.c.died_at
        else:
            moments = [self.since, self.until]  # type: ignore[list-item]
            # Rows of older versions do not have it: take when the event was recorded.
            column = sa.func.coalesce(table.c.since, table.c.ticks / sa.literal(1e7, sa.Double))
        if moments[0] is not None:
            found.append(column >= moments[0])
        if moments[1] is not None:
            found.append(column < moments[1])
        return found


EVERYTHING = Selection()
