"""Regular expressions as .NET reads them, which is how EventStoreDB does, rewritten for the engine that runs them here.

What reads the same in both stays as it is. What .NET knows and the engine does not, the engine refuses. What the engine
would read as something else is refused here, because it would let other events through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

from tidings.server.wire import Malformed

__all__ = ["end_of_set", "for_re", "for_re2"]

_FOR_RE2: Final = {
    "w": r"\p{L}\p{Mn}\p{Nd}\p{Pc}",
    "d": r"\p{Nd}",
    "s": r"\t-\r\x{85}\p{Z}",
    "Z": r"(?:\n?\z)",
}
r"""By the letter behind the backslash; the first three are members of a set. .NET's `\w`, `\d` and `\s` know all
scripts, google-re2's only ASCII. In .NET, `\Z` also stands before the line feed that ends a text."""
_FOR_RE: Final = {"z": r"\Z", "Z": r"(?:\n?\Z)"}
_SETS: Final = "wds"
_CODE: Final = re.compile(r"\\(?:\\|u([0-9a-fA-F]{4}))")


def for_re2(text: str) -> str:
    """Return the expression for google-re2. Raises `Malformed`."""
    rewritten = "".join(_rewritten(text, _FOR_RE2, "(?<"))
    return _CODE.sub(lambda code: rf"\x{{{code[1]}}}" if code[1] else code[0], rewritten)


def for_re(text: str) -> str:
    """Return the expression for Python's `re`. Raises `Malformed`."""
    return "".join(_rewritten(text, _FOR_RE, "(?P<"))


def _rewritten(text: str, escapes: Mapping[str, str], named: str) -> Iterator[str]:
    at = 0
    while at < len(text):
        if text[at] == "\\":
            yield _escape(text[at : at + 2], escapes, in_set=False)
            at += 2
        elif text[at] == "[":
            end = end_of_set(text, at)
            end = len(text) if end < 0 else end
            yield from _set(text[at:end], escapes)
            at = end
        elif text.startswith("(?'", at):
            name, quote, _ = text[at + 3 :].partition("'")
            if not quote:
                raise Malformed("The name of a group in the filter's regular expression has no end.")
            yield f"{named}{name}>"
            at += len(name) + 4
        elif text.startswith("(?<", at) and text[at + 3 : at + 4] not in ("=", "!"):
            yield named
            at += 3
        else:
            yield text[at]
            at += 1


def _escape(escape: str, escapes: Mapping[str, str], *, in_set: bool) -> str:
    letter = escape[1:]
    members = escapes.get(letter.lower(), "") if letter.lower() in _SETS else ""
    if not members:
        return escape if in_set else escapes.get(letter, escape)
    if letter in _SETS:
        return members if in_set else f"[{members}]"
    if in_set:
        raise Malformed(f"The filter's regular expression has {escape} within [ ]: write it without, as [^...].")
    return f"[^{members}]"


def end_of_set(text: str, at: int) -> int:
    """Return where the text goes on behind the set that begins here with `[`; -1 if the set has no end."""
    at += 2 if text[at + 1 : at + 2] == "^" else 1
    first = True  # a bracket that comes first is a member
    while at < len(text):
        if text[at] == "]" and not first:
            return at + 1
        at += 2 if text[at] == "\\" else 1
        first = False
    return -1


def _set(text: str, escapes: Mapping[str, str]) -> Iterator[str]:
    yield "["
    at = 1
    while at < len(text):
        if text[at] == "\\":
            yield _escape(text[at : at + 2], escapes, in_set=True)
            at += 2
        elif text.startswith("-[", at):
            raise Malformed("The filter's regular expression takes one set from another, as in [a-z-[aeiou]].")
        else:
            yield r"\[" if text[at] == "[" else text[at]  # or `[:alpha:]` would be more than these signs
            at += 1
