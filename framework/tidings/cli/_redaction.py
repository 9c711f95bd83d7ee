"""Replaces personal values in events that leave production, each value everywhere by one of the same shape.

Replacements are random, so that nobody can compute a value from its replacement. A field is named as it is in JSON, at
any depth. If its value also occurs elsewhere, as a whole word of a text or as a stream's id, it is replaced there, too.
"""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Sequence
from datetime import date, timedelta
from typing import Any, Final

__all__ = ["Redaction"]

WORD: Final = 3
"""Characters that a value must have to be replaced inside other texts. A shorter one could occur there by chance."""
TRIES: Final = 100
"""Attempts at a replacement that is not used elsewhere."""
_UUID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_DATE: Final = re.compile(r"\d{4}-\d{2}-\d{2}(?=$|[T ])")


class Redaction:
    """The replacements of one file. Call `learn` with every document before the first is replaced."""

    def __init__(self, fields: Sequence[str]) -> None:
        self._fields = frozenset(fields)
        self._met: set[str] = set()
        self._texts: dict[str, str] = {}
        self._numbers: dict[int | float, int | float] = {}
        self._words: re.Pattern[str] | None = None

    @property
    def missing(self) -> list[str]:
        """Fields that no document has."""
        return sorted(self._fields - self._met)

    def learn(self, document: Any) -> None:
        """Find the values to replace."""
        if isinstance(document, dict):
            for name, value in document.items():
                if name in self._fields:
                    self._met.add(name)
                    self._take(value)
                else:
                    self.learn(value)
        elif isinstance(document, list):
            for value in document:
                self.learn(value)

    def document(self, document: Any) -> Any:
        """Return a JSON document with its personal values replaced."""
        if isinstance(document, dict):
            return {
                name: self._replaced(value) if name in self._fields else self.document(value)
                for name, value in document.items()
            }
        if isinstance(document, list):
            return [self.document(value) for value in document]
        return self.text(document) if isinstance(document, str) else document

    def text(self, text: str) -> str:
        """Return a text with each personal value in it replaced."""
        if text in self._texts:
            return self._texts[text]
        if self._words is None:
            known = self._texts | {str(number): str(new) for number, new in self._numbers.items()}
            found = sorted((word for word in known if len(word) >= WORD), key=len, reverse=True)
            self._words = re.compile("|".join(rf"(?<!\w){re.escape(word)}(?!\w)" for word in found) or r"(?!)")
            self._known = known
        return self._words.sub(lambda match: self._known[match[0]], text)

    def stream(self, stream: str) -> str:
        """Return a stream's name with its id replaced, if that is a personal value."""
        category, dash, name = stream.partition("-")
        if name.isdecimal() and name not in self._texts and int(name) in self._numbers:
            return f"{category}{dash}{self._numbers[int(name)]}"
        return f"{category}{dash}{self.text(name)}"

    def _take(self, value: Any) -> None:
        if isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                self._take(one)
        elif isinstance(value, str):
            if value not in self._texts:
                self._texts[value] = _other(value, _text_like, set(self._texts.values()) | set(self._texts))
        elif isinstance(value, int | float) and not isinstance(value, bool) and value not in self._numbers:
            taken = set(self._numbers.values()) | set(self._numbers)
            self._numbers[value] = _other(value, _number_like, taken)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._replaced(one) for name, one in value.items()}
        if isinstance(value, list):
            return [self._replaced(one) for one in value]
        if isinstance(value, str):
            return self._texts[value]
        if isinstance(value, int | float) and not isinstance(value, bool):
            return self._numbers[value]
        return value


def _other(value: Any, like: Any, taken: set[Any]) -> Any:
    """Return a replacement that is not used elsewhere, if a random one is found within `TRIES`."""
    new = like(value)
    for _ in range(TRIES):
        if new not in taken and new != value:
            break
        new = like(value)
    return new


def _text_like(text: str) -> str:
    if _UUID.fullmatch(text):  # the version and the variant stay, so that it is a UUID of the same kind
        return "".join(one if at in (14, 19) else _character(one, hexadecimal=True) for at, one in enumerate(text))
    moment = _DATE.match(text)
    if moment is not None:
        try:
            day = date.fromisoformat(moment[0]) - timedelta(days=1 + secrets.randbelow(3650))
            return day.isoformat() + text[moment.end() :]
        except (ValueError, OverflowError):
            pass
    first = next((at for at, one in enumerate(text) if one.isdecimal()), -1)
    return "".join(_character(one, leading=at == first) for at, one in enumerate(text))


def _character(one: str, *, hexadecimal: bool = False, leading: bool = False) -> str:
    """Return another character of the same kind. A leading digit stays 0, or other than 0."""
    if hexadecimal and one in string.hexdigits:
        new = secrets.choice("0123456789abcdef")
        return new.upper() if one.isupper() else new
    if one.isdecimal():
        if leading:
            return "0" if one == "0" else secrets.choice("123456789")
        return secrets.choice(string.digits)
    if one.isalpha():
        return secrets.choice(string.ascii_uppercase if one.isupper() else string.ascii_lowercase)
    return one


def _number_like(number: int | float) -> int | float:
    text = repr(number)
    first = next(at for at, one in enumerate(text) if one.isdecimal())
    return type(number)(
        "".join(_character(one, leading=at == first) if one.isdecimal() else one for at, one in enumerate(text))
    )
