"""What differs between the events, or rows, that a test expects and those that there are, in words. No I/O."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from difflib import SequenceMatcher
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from tidings.modelling.events import Event, wire_name
from tidings.stores import EventData

__all__ = ["Item", "events_differ", "leaves_differ", "rows_differ"]

WIDTH: Final = 100
"""Characters of a value that are shown, around the first difference."""


class Item(NamedTuple):
    """An event, and its stream if that is known, or is to be compared."""

    stream: str | None
    event: Event | EventData

    def __str__(self) -> str:
        where = f" in {self.stream}" if self.stream else ""
        return f"{self.event!r}{where}"

    @property
    def name(self) -> str:
        return wire_name(self.event) if isinstance(self.event, Event) else self.event.type


def events_differ(expected: Sequence[Item], found: Sequence[Item], what: str) -> str | None:
    """Return a text that names each difference, or None if there is none. `what` begins it."""
    if len(expected) == len(found) and all(_same(*pair) for pair in zip(expected, found, strict=True)):
        return None
    lines = [f"{what} {_count(len(found))}, {_instead_of(len(expected), len(found))}:"]
    for wanted, got in _aligned(expected, found):
        number = f"{len(lines)}."
        if wanted is None:
            lines.append(f"{number} not expected: {got}")
        elif got is None:
            lines.append(f"{number} missing: {wanted}")
        elif _same(wanted, got):
            lines.append(f"{number} as expected: {got}")
        else:
            lines.append("\n".join([f"{number} {got.name} differs:", *_within(wanted, got)]))
    return "\n".join((lines[0], *("\n".join(f"  {line}" for line in each.split("\n")) for each in lines[1:])))


def _count(number: int) -> str:
    return "no event" if number == 0 else f"{number} event{'s' if number > 1 else ''}"


def _instead_of(expected: int, found: int) -> str:
    if expected == found:
        return "but not those expected" if found > 1 else "but not the expected one"
    return f"and {_count(expected)} {'were' if expected > 1 else 'was'} expected"


def _same(wanted: Item, got: Item) -> bool:
    if wanted.stream is not None and wanted.stream != got.stream:
        return False
    return type(wanted.event) is type(got.event) and wanted.event == got.event


def _aligned(expected: Sequence[Item], found: Sequence[Item]) -> Iterator[tuple[Item | None, Item | None]]:
    """Put beside each other what is equal; between that, what has the same name; the rest stands alone."""
    different: list[Item] = []

    def number(item: Item, *, expects: bool) -> int:
        for at, other in enumerate(different):
            if _same(item, other) if expects else _same(other, item):
                return at
        different.append(item)
        return len(different) - 1

    wanted, got = [number(item, expects=True) for item in expected], [number(item, expects=False) for item in found]
    for _, a, b, c, d in SequenceMatcher(None, wanted, got, autojunk=False).get_opcodes():
        yield from _by_name(expected[a:b], found[c:d])


def _by_name(expected: Sequence[Item], found: Sequence[Item]) -> Iterator[tuple[Item | None, Item | None]]:
    names = [item.name for item in expected], [item.name for item in found]
    for tag, a, b, c, d in SequenceMatcher(None, *names, autojunk=False).get_opcodes():
        if tag == "equal":
            yield from zip(expected[a:b], found[c:d], strict=True)
        else:
            yield from ((item, None) for item in expected[a:b])
            yield from ((None, item) for item in found[c:d])


def _within(wanted: Item, got: Item) -> Iterator[str]:
    if wanted.stream is not None and wanted.stream != got.stream:
        yield f"   stream: expected {wanted.stream!r}, was {got.stream!r}"
    if type(wanted.event) is not type(got.event):
        yield f"   class: expected {_path(wanted.event)}, was {_path(got.event)}"
        return
    told = False
    for path, one, other in leaves_differ(wanted.event, got.event):
        yield f"   {path}: expected {one}, was {other}"
        told = True
    if not told and wanted.event != got.event:
        yield "   its fields are equal, but == says that the events are not: look at __eq__ and private attributes"


def _path(event: object) -> str:
    return f"{type(event).__module__}.{type(event).__qualname__}"


_ABSENT: Final = object()


def leaves_differ(wanted: Any, got: Any, path: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield each value within these that differs, as path, what was expected and what was found."""
    if wanted is _ABSENT or got is _ABSENT or type(wanted) is not type(got):
        if wanted is _ABSENT or got is _ABSENT or wanted != got:
            yield path, *_shown(wanted, got)
        return
    pairs = _parts(wanted, got)
    if pairs is None:
        if wanted != got:
            yield path, *_shown(wanted, got)
        return
    for step, one, other in pairs:
        yield from leaves_differ(one, other, f"{path}{step}" if step.startswith("[") or not path else f"{path}.{step}")


def _parts(wanted: Any, got: Any) -> Iterator[tuple[str, Any, Any]] | None:
    if isinstance(wanted, BaseModel):
        names = dict.fromkeys((*type(wanted).model_fields, *(wanted.model_extra or ()), *(got.model_extra or ())))
        return ((name, getattr(wanted, name, _ABSENT), getattr(got, name, _ABSENT)) for name in names)
    if dataclasses.is_dataclass(wanted):
        fields = [field.name for field in dataclasses.fields(wanted)]
        return ((name, getattr(wanted, name), getattr(got, name)) for name in fields)
    if isinstance(wanted, Mapping):
        keys = dict.fromkeys((*wanted, *got))
        return ((f"[{key!r}]", wanted.get(key, _ABSENT), got.get(key, _ABSENT)) for key in keys)
    if isinstance(wanted, list | tuple):
        longer = range(max(len(wanted), len(got)))
        return ((f"[{at}]", _at(wanted, at), _at(got, at)) for at in longer)
    return None


def _at(values: Sequence[Any], at: int) -> Any:
    return values[at] if at < len(values) else _ABSENT


def _shown(wanted: Any, got: Any) -> tuple[str, str]:
    texts = ["nothing" if value is _ABSENT else repr(value) for value in (wanted, got)]
    if type(wanted) is not type(got) and _ABSENT not in (wanted, got):
        texts = [f"{text} ({type(value).__name__})" for text, value in zip(texts, (wanted, got), strict=True)]
    if max(map(len, texts)) <= WIDTH:
        return texts[0], texts[1]
    same = next((at for at, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    begin = max(0, same - WIDTH // 3)
    cut = [
        ("..." if begin else "") + text[begin : begin + WIDTH] + ("..." if len(text) > begin + WIDTH else "")
        for text in texts
    ]
    return cut[0], cut[1]


def rows_differ(
    table: str, keys: Sequence[str], expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]
) -> str | None:
    """Return a text that names each difference between rows, in whatever order, or None. Rows whose primary key `keys`
    is equal are compared column by column."""
    missing = [dict(row) for row in expected]
    extra = []
    for row in found:
        if dict(row) in missing:
            missing.remove(dict(row))
        else:
            extra.append(dict(row))
    if not missing and not extra:
        return None
    lines = [f"table {table} holds other rows than expected:"]
    for row in missing:
        same = [other for other in extra if keys and all(row.get(key) == other.get(key) for key in keys)]
        if not same:
            lines.append(f"  missing: {row}")
            continue
        extra.remove(same[0])
        lines.append(f"  row { ({key: row[key] for key in keys}) } differs:")
        lines += [f"     {path}: expected {one}, was {other}" for path, one, other in _columns(row, same[0])]
    lines += [f"  not expected: {row}" for row in extra]
    return "\n".join(lines)


def _columns(row: dict[str, Any], other: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name in dict.fromkeys((*row, *other)):
        yield from leaves_differ(row.get(name, _ABSENT), other.get(name, _ABSENT), name)
