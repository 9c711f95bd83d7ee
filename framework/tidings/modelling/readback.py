"""Whether an event reads back as it was written. It looks at classes when they are declared, and compares values with
what was read back of them; it never changes either.

A class is judged by its pydantic core schema, which shows everything that writes and reads it, nested models too. What
can never be read back is refused. What depends on the value is read back at every append and compared: with `==` where
the class says which type each value has, else type by type (`Any`, unions, validators and serializers may make one type
of another).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import datetime, time
from decimal import Decimal
from enum import Enum
from typing import Any, Final, NamedTuple

from pydantic import BaseModel

from tidings.errors import ConfigurationError

__all__ = ["difference", "fields_of", "prove"]


_EXACT: Final = frozenset(
    {"none", "bool", "int", "float", "decimal", "str", "bytes", "uuid", "date", "time", "datetime", "timedelta", "enum"}
)
"""Kinds of pydantic schemas whose values have one type."""
_CONTAINERS: Final = frozenset({"nullable", "list", "tuple", "set", "frozenset", "dict"})
_MODELS: Final = frozenset({"model", "dataclass", "typed-dict"})
_CONFIG: Final = frozenset(
    {
        "title", "frozen", "extra", "allow_inf_nan", "defer_build", "alias_generator", "arbitrary_types_allowed",
        "from_attributes", "hide_input_in_errors", "json_schema_extra", "model_title_generator",
        "field_title_generator", "populate_by_name", "validate_by_name", "validate_by_alias", "protected_namespaces",
        "use_attribute_docstrings", "validate_assignment", "serialize_by_alias", "ignored_types", "plugin_settings",
    }
)  # fmt: skip
"""Settings of a model that change nothing in how values are written and read."""

_HOPELESS: Final = {
    "json": "Json[...] is read from a text, and written as what was in it. Write the type inside the brackets: an "
    "event is JSON anyway",
    "generator": "an iterator is used up when it is written. Write tuple[...] or list[...]",
    "callable": "a function cannot be written as JSON. Keep its name, as a str",
    "is-subclass": "a class cannot be written as JSON. Keep its name, as a str",
}


class _Place(NamedTuple):
    """Where in an event class the walk is."""

    where: str
    path: str
    names: Mapping[str, Any]
    """Definitions by reference."""

    def at(self, name: str) -> _Place:
        return self._replace(path=f"{self.path}.{name}" if self.path else name)

    def refuse(self, why: str) -> ConfigurationError:
        return ConfigurationError(f"{self.where}: field {self.path!r} would not be read back as it was written: {why}")


def fields_of(cls: type[BaseModel]) -> Mapping[str, Any]:
    """Return a model's fields by name, also where one of them is called `model_fields`."""
    found: Mapping[str, Any] | None = getattr(cls, "__pydantic_fields__", None)
    return cls.model_fields if found is None else found  # pydantic before 2.10


def prove(event: type[BaseModel], where: str) -> bool:
    """Judge a class that pydantic has completed: return whether equal events of it have equal types throughout.

    Raises `ConfigurationError`, beginning with `where`, for a field that can never be read back as it was written.
    """
    return _judge(event.__pydantic_core_schema__, _Place(where, "", {}), frozenset())


def _judge(node: Any, place: _Place, within: frozenset[str]) -> bool:
    kind = node["type"]
    ref = node.get("ref")
    if ref is not None:
        within |= {ref}
    if "serialization" in node:
        return _serialized(node["serialization"], place)
    if kind in _HOPELESS:
        raise place.refuse(_HOPELESS[kind])
    if node.get("now_op") == "future":
        raise place.refuse(
            "what lies ahead when it is written is past when it is read. Write date or datetime, and check it where "
            "the event is made"
        )
    if kind == "enum" and _is_strange(node, (str, int, float, type(None))):
        raise place.refuse(
            f"JSON has no {_values_of(node)}, so no member of {node['cls'].__name__} would be recognised. Give the "
            "enum texts or numbers as values, or a _missing_ that makes members of texts"
        )
    if kind == "dict" and _is_strange(node.get("keys_schema"), (str, bool)):
        keys = node["keys_schema"]
        raise place.refuse(
            f"JSON's keys are texts, and the values of {keys['cls'].__name__}, a {_values_of(keys)} each, are none. "
            "Use a StrEnum or an IntEnum as the key"
        )
    if kind in _EXACT:
        return True
    if kind == "literal":
        return all(type(value) is str for value in node["expected"])
    if kind == "definition-ref":
        target = node["schema_ref"]
        return target in within or (target in place.names and _judge(place.names[target], place, within))
    if kind == "definitions":
        names = {**place.names, **{found["ref"]: found for found in node["definitions"]}}
        return _judge(node["schema"], place._replace(names=names), within)
    if kind in _MODELS:
        return _model(node, place, within)
    parts = [_judge(part, place, within) for part in _parts(node)]  # all of them, for what they refuse
    return _keeps_types(node) and all(parts)


def _is_strange(node: Any, known: tuple[type, ...]) -> bool:
    """It is an enum without a single member whose value is read back as one of the `known` types."""
    if not isinstance(node, Mapping) or node["type"] != "enum" or node.get("sub_type"):
        return False
    makes_members = node["cls"]._missing_.__func__ is not Enum.__dict__["_missing_"].__func__
    return not makes_members and not any(isinstance(member.value, known) for member in node["members"])


def _values_of(node: Mapping[str, Any]) -> str:
    return " or ".join(sorted({type(member.value).__name__ for member in node["members"]}))


def _keeps_types(node: Mapping[str, Any]) -> bool:
    """A node that only contains others adds no doubt about types."""
    kind = node["type"]
    if kind == "default":
        return bool(node.get("on_error", "raise") == "raise")
    return kind in _CONTAINERS or (kind == "tagged-union" and isinstance(node["discriminator"], str))


def _parts(node: object) -> Iterator[Mapping[str, Any]]:
    """The schemas inside a node, whatever its kind."""
    if isinstance(node, Mapping):
        inside = [value for name, value in node.items() if name not in ("metadata", "config", "serialization")]
    else:
        inside = list(node) if isinstance(node, list | tuple) else []
    for value in inside:
        kind = value.get("type") if isinstance(value, Mapping) else None
        # A function is described like a schema, but is none.
        if isinstance(kind, str) and kind not in ("no-info", "with-info"):
            yield value
        else:
            yield from _parts(value)


def _serialized(serialization: Mapping[str, Any], place: _Place) -> bool:
    function = serialization.get("function")
    if getattr(function, "__module__", "") == "pydantic.types" and "secret" in getattr(function, "__name__", ""):
        raise place.refuse(
            "a secret is written as asterisks, and lost for ever. Do not put it into an event (the log keeps it for "
            "ever), or write str, or give the field a serializer that tells it"
        )
    return False


# ---- models ------------------------------------------------------------------------------


def _model(node: Mapping[str, Any], place: _Place, within: frozenset[str]) -> bool:
    cls = node.get("cls")
    config: Mapping[str, Any] = getattr(cls, "model_config", None) or getattr(cls, "__pydantic_config__", None) or {}
    exact = _compares_fields(cls) and config.keys() <= _CONFIG and config.get("extra") != "allow"
    if any(node.get(name) for name in ("custom_init", "post_init", "root_model")):
        exact = False
    inner = node
    while inner["type"] not in ("model-fields", "dataclass-args", "typed-dict"):
        if inner["type"] not in _MODELS:
            exact = False  # a validator of the whole model
        below = inner["schema"]
        if not _leads_to_fields(below):
            return _judge(below, place, within) and exact
        inner = below
    given = inner["fields"]
    fields = dict(given) if isinstance(given, Mapping) else {field["name"]: field for field in given}
    written: dict[str, str] = {}
    for name, field in fields.items():
        _check_field(name, field, config, place.at(name))
        _only_one(written, field.get("serialization_alias", name), name, place)
        exact = _judge(field["schema"], place.at(name), within) and exact
    for field in inner.get("computed_fields", ()):
        _check_computed(field, config, place)
        _only_one(written, field.get("alias", field["property_name"]), field["property_name"], place)
    return exact


def _leads_to_fields(node: object) -> bool:
    while isinstance(node, Mapping):
        if node.get("type") in ("model-fields", "dataclass-args"):
            return True
        node = node.get("schema")
    return False


def _compares_fields(cls: Any) -> bool:
    """`==` of two instances says whether all of their fields are equal."""
    if cls is None:
        return True
    if issubclass(cls, BaseModel):
        return cls.__eq__ is BaseModel.__eq__
    return bool("__eq__" in vars(cls) and cls.__dataclass_params__.eq)


def _check_field(name: str, field: Mapping[str, Any], config: Mapping[str, Any], place: _Place) -> None:
    if field.get("serialization_exclude"):
        raise place.refuse("exclude=True leaves it out when the event is written. Remove it, or the field")
    alias = field.get("validation_alias")
    written = field.get("serialization_alias", name)
    by_name = alias is None or config.get("populate_by_name") or config.get("validate_by_name")
    read: set[str] = set()
    if alias is not None and config.get("validate_by_alias", True):
        paths = [[alias]] if isinstance(alias, str) else alias if isinstance(alias[0], list) else [alias]
        read |= {path[0] for path in paths if len(path) == 1}
    if by_name:
        read.add(name)
    if written not in read:
        names = " or ".join(map(repr, sorted(read))) or "another place"
        raise place.refuse(
            f"it is written as {written!r}, and read from {names}. Give both the same name, as Field(alias=...) does"
        )


def _check_computed(field: Mapping[str, Any], config: Mapping[str, Any], place: _Place) -> None:
    if config.get("extra") in ("forbid", "allow"):
        raise place.at(field["property_name"]).refuse(
            f"a computed field is written, and extra={config['extra']!r} "
            + ("refuses it when it is read" if config["extra"] == "forbid" else "keeps it as another field")
            + ". Make it a plain property, or use extra='ignore'"
        )


def _only_one(written: dict[str, str], wire: str, name: str, place: _Place) -> None:
    if written.setdefault(wire, name) != name:
        raise place.at(name).refuse(f"{written[wire]!r} is written as {wire!r} too. Give one of them another alias")


# ---- values ------------------------------------------------------------------------------


def difference(written: Any, read: Any, path: str = "") -> str | None:
    """Say where two values differ, and how, without telling the values; None when they are the same.

    Types count, as far as a handler could notice: an enum is not its value, a tuple no list. A subclass of the type
    that is read is the same when it is equal; a model or dataclass is not, because it may have more fields.
    """
    kind = type(read)
    if isinstance(read, BaseModel) or (dataclasses.is_dataclass(kind) and not isinstance(read, Enum)):
        return _other_kind(written, read, path) if type(written) is not kind else _fields_differ(written, read, path)
    if isinstance(read, AbstractSet) and isinstance(written, AbstractSet):
        there = {item: item for item in read}
        if len(written) != len(there) or any(item not in there for item in written):
            return f"{path}: its members differ"
        return next((found for item in written if (found := difference(item, there[item], f"{path}[...]"))), None)
    if isinstance(read, Mapping) and isinstance(written, Mapping):
        return _mappings_differ(written, read, path)
    if isinstance(read, list | tuple) or kind.__name__ == "deque":
        if not isinstance(written, kind):
            return _other_kind(written, read, path)
        if len(written) != len(read):
            return f"{path}: it has {len(written)} items, and {len(read)} when it is read back"
        pairs = enumerate(zip(written, read, strict=True))
        return next((found for at, (a, b) in pairs if (found := difference(a, b, f"{path}[{at}]"))), None)
    return _leaves_differ(written, read, path)


def _fields_differ(written: Any, read: Any, path: str) -> str | None:
    sides: list[list[Mapping[str, Any]]] = []
    for side in (written, read):
        if isinstance(side, BaseModel):
            fields = {name: side.__dict__.get(name, _ABSENT) for name in fields_of(type(side))}
            sides.append([fields, side.__pydantic_extra__ or {}, side.__pydantic_private__ or {}])
        else:
            own = {field.name: getattr(side, field.name, _ABSENT) for field in dataclasses.fields(side)}
            sides.append([own])
    for mine, other in zip(*sides, strict=True):
        if mine.keys() != other.keys():
            return f"{path + '.' if path else ''}{min(map(str, mine.keys() ^ other.keys()))}: it is on one side only"
        for name, value in mine.items():
            if found := difference(value, other[name], f"{path}.{name}" if path else name):
                return found
    return None


def _mappings_differ(written: Mapping[Any, Any], read: Mapping[Any, Any], path: str) -> str | None:
    names = {name: name for name in read}
    for name, value in written.items():
        if name not in names:
            return f"{path}: a key of type {type(name).__name__} comes back as another one, or not at all"
        if found := _leaves_differ(name, names[name], f"{path} (a key)"):
            return found
        if found := difference(value, read[name], f"{path}[...]"):
            return found
    if not isinstance(written, type(read)):
        return _other_kind(written, read, path)
    return None if len(written) == len(read) else f"{path}: it has {len(written)} keys, and {len(read)} when it is read"


def _leaves_differ(written: Any, read: Any, path: str) -> str | None:
    kind = type(read)
    same_kind = type(written) is kind or (
        isinstance(written, kind) and not isinstance(written, Enum) and type(written) is not bool
    )
    if not same_kind and not (type(written) is int and kind in (float, Decimal)):
        return _other_kind(written, read, path)
    if isinstance(read, datetime | time) and written.utcoffset() == read.utcoffset():
        # Moments in an hour that a zone has twice are never equal to one in another zone.
        written, read = written.replace(tzinfo=None, fold=0), read.replace(tzinfo=None, fold=0)
    return None if written == read else f"{path}: its value is another one when it is read back"


def _other_kind(written: Any, read: Any, path: str) -> str:
    return f"{path}: a {type(written).__name__} is read back as a {type(read).__name__}"


_ABSENT: Final = object()
