"""Which rows of a service's database are meant. It runs no statement."""

from __future__ import annotations

from typing import Any, Final
from uuid import UUID

import sqlalchemy as sa

from tidings.database import tables

__all__ = ["PER_STATEMENT", "AnyScope", "Conditions", "Scope", "in_parts"]

PER_STATEMENT: Final = 1000
"""Values that one statement asks for at most, because databases limit the number of its parameters."""

Conditions = tuple[sa.ColumnElement[bool], ...]


class Scope:
    """The rows of one service, about one log, of one range of buckets."""

    __slots__ = ("buckets", "log", "own", "service")

    def __init__(self, service: str, log: UUID, buckets: range) -> None:
        self.service = service
        self.log = log
        self.buckets = buckets
        self.own: dict[str, Any] = {"service": service, "log": str(log)}
        """The columns that say so in a new row."""

    def of_log(self, table: Any) -> Conditions:
        """The service's rows about the log, of all buckets."""
        return table.c.service == self.service, table.c.log == self.own["log"]

    def in_range(self, table: Any) -> Conditions:
        """The rows of the range."""
        return *self.of_log(table), table.c.bucket.between(self.buckets.start, self.buckets.stop - 1)

    def of_floor(self) -> Conditions:
        """The range's one row in the table of floors."""
        first, last = tables.floors.c.first_bucket, tables.floors.c.last_bucket
        return *self.of_log(tables.floors), first == self.buckets.start, last == self.buckets.stop - 1


class AnyScope:
    """A scope whose values are parameters, so that a statement that takes milliseconds to make is made once per
    process. It is executed with `values_of` the scope that is meant."""

    def of_log(self, table: Any) -> Conditions:
        """See `Scope.of_log`."""
        return table.c.service == sa.bindparam("scope_service"), table.c.log == sa.bindparam("scope_log")

    def in_range(self, table: Any) -> Conditions:
        """See `Scope.in_range`."""
        between = table.c.bucket.between(sa.bindparam("scope_first"), sa.bindparam("scope_last"))
        return *self.of_log(table), between

    @staticmethod
    def values_of(scope: Scope) -> dict[str, Any]:
        """Return the parameters that stand for a scope."""
        first, last = scope.buckets.start, scope.buckets.stop - 1
        return {
            "scope_service": scope.service,
            "scope_log": scope.own["log"],
            "scope_first": first,
            "scope_last": last,
        }


def in_parts(values: list[Any]) -> list[list[Any]]:
    """Cut a list into lists that one statement can ask for each."""
    return [values[start : start + PER_STATEMENT] for start in range(0, len(values), PER_STATEMENT)]
