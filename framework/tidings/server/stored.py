"""What the server once stored in the log, read back: anybody may have written there since. It reads no log itself."""

from __future__ import annotations

from dataclasses import MISSING, fields
from typing import Any, TypeVar

from tidings.server.refusals import shown
from tidings.server.wire import Malformed

__all__ = ["entries_of", "restored"]

T = TypeVar("T")


def entries_of(document: dict[str, Any], name: str) -> list[Any]:
    """Return the list with this name; an empty one for anything else."""
    value = document.get(name)
    return value if isinstance(value, list) else []


def restored(kind: type[T], entry: object) -> T:
    """Return the dataclass whose fields the entry has: texts, numbers, yes or no, and tuples of texts. What it does not
    know is left out. Raises `Malformed` for an entry that no server has written."""
    if not isinstance(entry, dict):
        raise Malformed(f"it is {shown(repr(entry))}")
    values: dict[str, Any] = {}
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in entry and field.default is not MISSING:
            continue
        value = entry.get(field.name)
        expected = str(field.type)
        if expected.startswith("tuple"):
            sound = isinstance(value, list | tuple) and all(type(each) is str for each in value)
            value = tuple(value) if sound and value else ()
        else:
            sound = type(value).__name__.replace("NoneType", "None") in expected.split(" | ")
        if not sound:
            raise Malformed(f"its {field.name} is {shown(repr(entry.get(field.name)))}")
        values[field.name] = value
    return kind(**values)
