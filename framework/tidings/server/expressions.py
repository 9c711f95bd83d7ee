"""Regular expressions that clients send, searched without backtracking: their cost grows with the text, never faster.

EventStoreDB's expressions are .NET's. google-re2 runs them where it is installed. Clients leave events out by a
look-ahead at the beginning, which becomes a search of its own. What google-re2 cannot run, or everything without it,
runs on Python's `re` if its shape cannot backtrack far, and is refused otherwise.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module
from typing import Any, Final, Protocol

from tidings.server.wire import Malformed

__all__ = ["Expression", "engine"]

LONGEST: Final = 16 * 1024
"""Characters of an expression."""
LOOKED_AT: Final = 4096
"""Characters of a name in which an expression is searched for; it does not see what is behind them."""
LOOKED_AT_BY_RE: Final = 512
"""The same on Python's `re`, whose cost may grow with their square."""
MEMORY: Final = 512 * 1024
"""Bytes that google-re2 may use for one expression."""


class _Searching(Protocol):
    def search(self, text: str, /) -> object | None: ...


def _installed() -> Any:
    try:
        return import_module("re2")
    except ImportError:
        return None


_RE2: Final[Any] = _installed()


def engine() -> str:
    """What runs the expressions here."""
    return "re" if _RE2 is None else "google-re2"


class Expression:
    """One expression. Two with the same text are equal."""

    def __init__(self, text: str) -> None:
        """Raises `Malformed` for one that cannot be read, or whose cost has no bound."""
        if len(text) > LONGEST:
            raise Malformed(f"The filter's regular expression is longer than {LONGEST} characters.")
        self.pattern = text
        self._conditions, self._longest = _compiled(text)

    def search(self, name: str) -> bool:
        """Whether it occurs in the name, anywhere unless it says where."""
        name = name[: self._longest]
        return all((found.search(name) is not None) is wanted for wanted, found in self._conditions)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.pattern == other.pattern

    def __hash__(self) -> int:
        return hash(self.pattern)

    def __repr__(self) -> str:
        return f"Expression({self.pattern!r})"


_Conditions = tuple[tuple[bool, _Searching], ...]


@lru_cache(maxsize=256)
def _compiled(text: str) -> tuple[_Conditions, int]:
    if _RE2 is not None:
        parts = _without_look_aheads(text)
        try:
            return tuple((wanted, _by_re2(part)) for wanted, part in parts), LOOKED_AT
        except _RE2.error:
            pass  # perhaps something that only a backtracking engine knows
    try:
        bounded = _is_bounded(text)
        found = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise Malformed(f"The filter's regular expression cannot be read: {str(error)[:200]}") from None
    if not bounded:
        advice = "" if _RE2 is not None else ": install google-re2 beside the server, which runs more of them"
        raise Malformed(f"The filter's regular expression may take for ever, and is not run{advice}.")
    return ((True, found),), LOOKED_AT_BY_RE


def _by_re2(text: str) -> _Searching:
    options = _RE2.Options()
    options.log_errors = False
    options.never_capture = True  # or what it finds costs more than finding it
    options.max_mem = MEMORY
    found: _Searching = _RE2.compile(text, options)
    return found


# ---- look-aheads at the beginning --------------------------------------------------


def _without_look_aheads(text: str) -> list[tuple[bool, str]]:
    """Searches that together say the same: `^(?!a)b` is found where `^(?:a)` is not and `^(?:b)` is."""
    parts: list[tuple[bool, str]] = []
    rest = text
    if not rest.startswith("^(?"):
        return [(True, text)]
    rest = rest[1:]
    while rest.startswith(("(?!", "(?=")):
        end, _ = _scanned(rest)
        if end < 0:
            return [(True, text)]
        parts.append((rest[2] == "=", f"^(?:{rest[3:end]})"))
        rest = rest[end + 1 :]
    if not parts or _scanned(f"({rest})")[1]:
        return [(True, text)]  # in `^(?!a)b|c` the look-ahead is part of one alternative only
    return [*parts, (True, f"^(?:{rest})")] if rest else parts


def _scanned(text: str) -> tuple[int, bool]:
    """Where the group that begins the text ends, -1 for nowhere; and whether it has alternatives on its first level."""
    depth, at, alternatives = 0, 0, False
    while at < len(text):
        sign = text[at]
        if sign == "\\":
            at += 1
        elif sign == "[":
            at += 2 if text[at + 1 : at + 2] == "^" else 1
            at = text.find("]", at + 1)  # one that comes first is a member
            while at > 0 and _is_escaped(text, at):
                at = text.find("]", at + 1)
            if at < 0:
                return -1, alternatives
        elif sign == "(":
            depth += 1
        elif sign == ")":
            depth -= 1
            if not depth:
                return at, alternatives
        elif sign == "|" and depth == 1:
            alternatives = True
        at += 1
    return -1, alternatives


def _is_escaped(text: str, at: int) -> bool:
    before = text[:at]
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


# ---- Python's own engine -----------------------------------------------------------


def _is_bounded(text: str) -> bool:
    """Whether searching takes no more steps than the square of the text's length, times `_WAYS`: one repetition of a
    single character at most on each way through it, and nothing that refers back. Raises `re.error`."""
    parser: Any = import_module("re._parser")
    repetitions, ways = _counted(parser.parse(text))
    return repetitions <= 1 and ways <= _WAYS


_WAYS: Final = 1000
"""Ways through an expression: each alternative is one, and those that follow each other multiply."""
_SINGLE: Final = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "CATEGORY")
_UNBOUNDED: Final = (2, 1)


def _counted(parsed: Any) -> tuple[int, int]:
    """The repetitions on one way through the expression, and the ways."""
    repetitions, ways = 0, 1
    for code, argument in parsed:
        more, times = _of_one(str(code), argument)
        repetitions, ways = repetitions + more, min(ways * times, _WAYS + 1)
    return repetitions, ways


def _of_one(code: str, argument: Any) -> tuple[int, int]:
    if code in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, body = argument
        if int(most) == 1:
            repetitions, ways = _counted(body)
            return repetitions, ways + 1
        if len(body) != 1 or str(body[0][0]) not in _SINGLE:
            return _UNBOUNDED
        return (0 if least == most else 1), 1
    if code == "BRANCH":
        alternatives = [_counted(each) for each in argument[1]]
        return max(more for more, _ in alternatives), sum(ways for _, ways in alternatives)
    if code in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _counted(argument[-1])
    if code == "ATOMIC_GROUP":
        return _counted(argument)
    return (0, 1) if code in (*_SINGLE, "AT") else _UNBOUNDED
