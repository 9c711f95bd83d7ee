"""A filter of `read_all` as SQL for PostgreSQL. It runs nothing."""

from __future__ import annotations

from collections.abc import Iterable

from tidings.stores import Filter, check_text

__all__ = ["Condition", "condition_of"]

Condition = tuple[str, tuple[object, ...]]
"""SQL to follow a WHERE that has conditions, and its parameters."""


def condition_of(filter: Filter, first: int) -> Condition:
    """Return a filter as SQL and its parameters, of which the first has the number `first`.

    Names are bytes of UTF-8 in the table, so a prefix is a range of bytes, whatever collation the database has.
    """
    for text in (*filter.types, *filter.stream_prefixes, *filter.exclude_stream_prefixes):
        check_text(text)
    values: list[object] = []

    def parameter(value: object) -> str:
        values.append(value)
        return f"${first + len(values) - 1}"

    def ranges(prefixes: Iterable[str]) -> str:
        parts = []
        for prefix in map(str.encode, prefixes):
            low = f"stream >= {parameter(prefix)}"
            # UTF-8 has no byte 255, so the last byte can always be counted up.
            high = f" AND stream < {parameter(prefix[:-1] + bytes([prefix[-1] + 1]))}" if prefix else ""
            parts.append(low + high)
        return " OR ".join(parts)

    sql = ""
    if filter.types:
        sql += f" AND type = ANY ({parameter([name.encode() for name in filter.types])}::bytea[])"
    if filter.stream_prefixes:
        sql += f" AND ({ranges(filter.stream_prefixes)})"
    if filter.exclude_stream_prefixes:
        sql += f" AND NOT ({ranges(filter.exclude_stream_prefixes)})"
    return sql, tuple(values)
