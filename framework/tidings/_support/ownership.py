"""Errors that remember which object raised them. The mark is kept through threads, groups and `raise ... from`."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["mark", "owner_of", "related"]


def mark(error: BaseException, owner: object) -> None:
    """Say which object raised the error; whoever said so first is right."""
    if getattr(error, "_owner", None) is None:
        error._owner = owner  # type: ignore[attr-defined]


def owner_of(error: BaseException) -> object:
    """The object that said that it raised the error; None where none did."""
    return getattr(error, "_owner", None)


def related(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from or while handling, and the members of exception groups among these."""
    seen, left = set[int](), [error]
    while left:
        each = left.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        yield each
        before = each.__cause__ or (None if each.__suppress_context__ else each.__context__)
        if before is not None:
            left.append(before)
        if isinstance(each, BaseExceptionGroup):
            left.extend(reversed(each.exceptions))
