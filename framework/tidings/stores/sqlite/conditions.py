"""A filter of `read_all` as SQL. It runs nothing."""

from __future__ import annotations

from tidings.stores import Filter

__all__ = ["condition_of"]


def condition_of(filter: Filter) -> tuple[str, tuple[str, ...]]:
    """A filter as SQL and its parameters. The unary plus keeps SQLite from leaving the order of positions."""
    parts: list[str] = []
    values: list[str] = []
    if filter.types:
        parts.append(f"type IN ({', '.join('?' * len(filter.types))})")
        values += filter.types
    for prefixes, word in ((filter.stream_prefixes, ""), (filter.exclude_stream_prefixes, "NOT ")):
        ranges = []
        for prefix in prefixes:
            above = _after_prefix(prefix)
            ranges.append("+stream >= ? AND +stream < ?" if above else "+stream >= ?")
            values += (prefix, above) if above else (prefix,)
        if ranges:
            parts.append(f"{word}({' OR '.join(ranges)})")
    return "".join(f" AND {part}" for part in parts), tuple(values)


def _after_prefix(prefix: str) -> str:
    """The first string above all that begin with `prefix`; "" when there is none. SQLite orders by code point."""
    while prefix and prefix[-1] == "\U0010ffff":
        prefix = prefix[:-1]
    if not prefix:
        return ""
    following = ord(prefix[-1]) + 1
    return prefix[:-1] + chr(0xE000 if following == 0xD800 else following)
