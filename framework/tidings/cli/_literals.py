"""Writes values as Python source that makes equal ones, with the imports that it needs.

It writes only classes that a test can import: those that a module has under their own name.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections import defaultdict
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, Final
from uuid import UUID

from pydantic import BaseModel

__all__ = ["Imports", "NoLiteral", "literal", "place_of"]

_PLAIN: Final = (type(None), bool, int, str, bytes)
_ALSO_REPR: Final = (date, time, timedelta)


class NoLiteral(Exception):
    """The value cannot be written as source."""


class Imports:
    """The names that a file imports, each from one module."""

    def __init__(self) -> None:
        self._names: dict[str, set[str]] = defaultdict(set)
        self._taken: dict[str, str] = {}
        """By name in the file: the module and name that it stands for."""

    def of(self, module: str, name: str) -> str:
        """Return the expression for `name` of a module. If two modules have the name, the second gets another one."""
        wanted, _, rest = name.partition(".")
        own = f"{module}.{wanted}"
        local, number = wanted, 2
        while self._taken.setdefault(local, own) != own:
            local, number = f"{wanted}_{number}", number + 1
        self._names[module].add(wanted if local == wanted else f"{wanted} as {local}")
        return f"{local}.{rest}" if rest else local

    def reserve(self, *names: str) -> None:
        """Keep names for the file's own use."""
        for name in names:
            self._taken.setdefault(name, "")

    def namespace(self) -> dict[str, Any]:
        """Return the objects that the names stand for."""
        found = {}
        for local, own in self._taken.items():
            module, _, name = own.rpartition(".")
            found[local] = getattr(sys.modules[module], name)
        return found

    def blocks(self) -> list[list[str]]:
        """Return the import lines: the standard library's, then all others."""
        first: list[str] = []
        others: list[str] = []
        for module in sorted(self._names):
            line = f"from {module} import {', '.join(sorted(self._names[module]))}"
            (first if module.partition(".")[0] in sys.stdlib_module_names else others).append(line)
        return [block for block in (first, others) if block]


def place_of(thing: Any) -> tuple[str, str]:
    """Return the module and name with which to import a class or function. Raises `NoLiteral` if there are none."""
    module, name = str(getattr(thing, "__module__", "")), str(getattr(thing, "__qualname__", ""))
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not thing or module in ("", "__main__") or not re.fullmatch(r"[\w.]+", name):
        raise NoLiteral(f"{module}.{name} cannot be imported by its name")
    return module, name


def literal(value: Any, imports: Imports) -> str:
    """Return an expression that makes an equal value of the same type. Raises `NoLiteral`."""
    kind = type(value)
    if isinstance(value, Enum):
        module, name = place_of(kind)
        return f"{imports.of(module, name)}.{value.name}"
    if kind in _PLAIN or (kind is float and value == value and abs(value) != float("inf")):
        return _double_quoted(value) if kind is str else repr(value)
    if kind in (Decimal, UUID):
        return f"{imports.of(kind.__module__, kind.__name__)}({literal(str(value), imports)})"
    if kind is datetime or kind in _ALSO_REPR:
        return _moment(value, imports)
    if kind in (list, tuple, set, frozenset):
        return _collection(value, imports)
    if kind is dict:
        return f"{{{', '.join(f'{literal(key, imports)}: {literal(one, imports)}' for key, one in value.items())}}}"
    if isinstance(value, BaseModel):
        return _model(value, imports)
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
    elif isinstance(value, tuple) and hasattr(kind, "_fields"):
        fields = list(kind._fields)
    else:
        raise NoLiteral(f"a {kind.__module__}.{kind.__qualname__}")
    return _call(kind, {name: getattr(value, name) for name in fields}, imports)


def _model(value: BaseModel, imports: Imports) -> str:
    """Write a model as a call with its fields; one with aliases, a root or private state, from its JSON."""
    kind = type(value)
    fields = kind.model_fields
    aliased = any(field.alias is not None or field.validation_alias is not None for field in fields.values())
    if aliased or "root" in fields or value.model_extra or kind.__private_attributes__:
        module, name = place_of(kind)
        document = value.model_dump_json(by_alias=True)
        return f"{imports.of(module, name)}.model_validate_json({literal(document, imports)})"
    said = {
        name: getattr(value, name)
        for name in fields
        if name in value.model_fields_set or fields[name].default_factory is not None
    }
    return _call(kind, said, imports)


def _call(kind: type, fields: dict[str, Any], imports: Imports) -> str:
    module, name = place_of(kind)
    called = imports.of(module, name)
    return f"{called}({', '.join(f'{field}={literal(value, imports)}' for field, value in fields.items())})"


def _collection(value: Any, imports: Imports) -> str:
    parts = [literal(one, imports) for one in value]
    if isinstance(value, frozenset):
        return f"frozenset({{{', '.join(sorted(parts))}}})" if parts else "frozenset()"
    if isinstance(value, set):
        return f"{{{', '.join(sorted(parts))}}}" if parts else "set()"
    if isinstance(value, list):
        return f"[{', '.join(parts)}]"
    return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"


def _moment(value: date | time | timedelta, imports: Imports) -> str:
    kind = type(value)
    called = imports.of("datetime", kind.__name__)
    zone = value.tzinfo if isinstance(value, datetime | time) else None
    if zone is None:
        return f"{called}({repr(value).partition('(')[2]}"
    if isinstance(value, datetime) and value.utcoffset() == timedelta(0):
        bare = repr(value.replace(tzinfo=None, fold=0)).partition("(")[2]
        return f"{called}({bare[:-1]}, tzinfo={imports.of('datetime', 'UTC')})"
    assert isinstance(value, datetime | time)
    return f"{called}.fromisoformat({literal(value.isoformat(), imports)})"


def _double_quoted(text: str) -> str:
    """Return a string literal in double quotes, as formatters write it. Invisible characters are escaped."""
    shown = repr(text)
    if shown[0] == "'" and text.count('"') <= text.count("'"):
        shown = '"' + shown[1:-1].replace("\\'", "'").replace('"', '\\"') + '"'
    return shown
