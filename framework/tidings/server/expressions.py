"""Regular expressions that clients send, searched without backtracking: their cost grows with the text, never faster.

EventStoreDB's expressions are .NET's, which `dialect` rewrites. google-re2 runs them where it is installed. Clients
leave events out by a look-ahead at the beginning, which becomes a search of its own. google-re2 refuses what it does
not know. Without it, Python's `re` runs expressions whose shape cannot backtrack far; others are refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import import_module
from typing import Any, Final, NamedTuple, Protocol

from tidings.server.dialect import end_of_set, for_re, for_re2
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
    parts = _without_look_aheads(text)
    if _RE2 is not None:
        try:
            return tuple((wanted, _by_re2(part)) for wanted, part in parts), LOOKED_AT
        except _RE2.error as error:
            says = error.args[0] if error.args else ""
            reason = says.decode("utf-8", "replace") if isinstance(says, bytes) else str(says)
            raise Malformed(
                f"google-re2 does not run the filter's regular expression: {reason[:200]}. It knows no back "
                "references, and look-aheads only right behind the '^' that begins the whole expression."
            ) from None
    try:
        return tuple((wanted, _by_re(part)) for wanted, part in parts), LOOKED_AT_BY_RE
    except (re.error, RecursionError, OverflowError) as error:
        raise Malformed(f"The filter's regular expression cannot be read: {str(error)[:200]}") from None


def _by_re2(text: str) -> _Searching:
    options = _RE2.Options()
    options.log_errors = False
    options.never_capture = True  # or what it finds costs more than finding it
    options.max_mem = MEMORY
    found: _Searching = _RE2.compile(for_re2(text), options)
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
            at = end_of_set(text, at) - 1
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


# ---- Python's own engine -----------------------------------------------------------

STEPS: Final = 65_536
"""Steps that one search may take on Python's `re`: a millisecond, in which nothing else in the process runs."""
_SINGLE: Final = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "CATEGORY")


def _by_re(text: str) -> _Searching:
    """Raises `re.error`, and `Malformed` for an expression that may take more than `STEPS`."""
    parser: Any = import_module("re._parser")
    text = for_re(text)
    if _steps(parser.parse(text)) > STEPS:
        raise Malformed(
            "Python's re may take for ever with the filter's regular expression, which is therefore not run: install "
            "google-re2 beside the server, or begin the expression with '^' and repeat one single character at most."
        )
    return re.compile(text)


def _steps(parsed: Any) -> int:
    """The steps of a search at worst: from each place where it may begin, each way through the expression, and for each
    length of its repetition all that follows. Raises `re.error`."""
    cost = _of_all(parsed)
    if cost.repetitions > 1:
        return STEPS + 1
    anchored = len(parsed) > 0 and str(parsed[0][0]) == "AT" and "BEGINNING" in str(parsed[0][1])
    places = (1 if anchored else LOOKED_AT_BY_RE) * (LOOKED_AT_BY_RE if cost.repetitions else 1)
    return places * cost.ways * max(cost.width, 1)


class _Cost(NamedTuple):
    repetitions: int
    """Repetitions of one character on one way through it; 2 for what has no bound."""
    ways: int
    """Ways through it: each alternative is one, and those that follow each other multiply."""
    width: int
    """Characters that a way looks at, without its repetition."""


_UNBOUNDED: Final = _Cost(2, 1, 1)


def _of_all(parsed: Any) -> _Cost:
    repetitions, ways, width = 0, 1, 0
    for code, argument in parsed:
        one = _of_one(str(code), argument)
        repetitions, ways, width = repetitions + one.repetitions, min(ways * one.ways, STEPS + 1), width + one.width
    return _Cost(repetitions, ways, width)


def _of_one(code: str, argument: Any) -> _Cost:
    if code in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        least, most, body = argument
        if int(most) == 1:
            once = _of_all(body)
            return once._replace(ways=once.ways + 1)
        if len(body) != 1 or str(body[0][0]) not in _SINGLE:
            return _UNBOUNDED
        return _Cost(0, 1, int(most)) if least == most else _Cost(1, 1, int(least))
    if code == "BRANCH":
        costs = [_of_all(each) for each in argument[1]]
        ways = sum(cost.ways for cost in costs)
        return _Cost(max(cost.repetitions for cost in costs), ways, max(cost.width for cost in costs))
    if code in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _of_all(argument[-1])
    if code == "ATOMIC_GROUP":
        return _of_all(argument)
    return _Cost(0, 1, 1) if code in (*_SINGLE, "AT") else _UNBOUNDED
