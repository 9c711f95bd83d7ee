"""Hypothesis strategies for events, made from their classes. It needs hypothesis, which the extra `testing` brings.

Hypothesis alone (`st.builds(OrderCreated)`) knows only limits such as `Field(gt=0)`: of patterns, multiples, digits of
decimals and finite numbers it makes values that pydantic refuses. So a strategy follows the schema that pydantic
validates by, and what is left to validators is tried and thrown away.
"""

from __future__ import annotations

import decimal
import string
from collections.abc import Callable, Mapping
from datetime import UTC
from typing import Any, Final, TypeVar
from uuid import UUID

from pydantic import ValidationError

from tidings.errors import ConfigurationError, SchemaError
from tidings.modelling.codec import encode
from tidings.modelling.events import Event, is_exact

try:
    from hypothesis import reject
    from hypothesis import strategies as st
    from hypothesis.strategies import SearchStrategy
except ImportError as error:
    raise ImportError("tidings.testing.strategies needs hypothesis: pip install 'tidings[testing]'") from error

__all__ = ["events"]

E = TypeVar("E", bound=Event)

Node = Mapping[str, Any]
Names = Mapping[str, Node]

MANY: Final = 5
"""Elements of a collection, at most, unless the class asks for more: events stay readable."""


def events(kind: type[E], /, **fields: Any) -> SearchStrategy[E]:
    """Return a strategy for events of a class. Each of them could be appended and read back.

    `fields` are strategies, or values, for some of the fields: `events(OrderCreated, order_id=st.just("1"))`. Raises
    `ConfigurationError` for a field without a strategy whose type cannot be made up.
    """
    if not (isinstance(kind, type) and issubclass(kind, Event)):
        raise ConfigurationError(
            f"events({kind!r}): give the class of the events, events({type(kind).__name__})"
            if isinstance(kind, Event)
            else f"events({kind!r}): that is no class of events. Give one, as in events(OrderCreated)"
        )
    is_exact(kind)  # raises for a class that is not complete
    strangers = fields.keys() - kind.model_fields.keys()
    if strangers:
        raise ConfigurationError(f"events({kind.__name__}): it has no field {', '.join(sorted(strangers))}")
    chosen = {name: value if isinstance(value, SearchStrategy) else st.just(value) for name, value in fields.items()}
    whole = _Maker(kind.__name__).of(kind.__pydantic_core_schema__, "", chosen)

    @st.composite
    def made(draw: st.DrawFn) -> E:
        data = draw(whole)
        try:
            event = kind.model_validate(data)
            encode(event, id=UUID(int=1))
        except (ValidationError, SchemaError):
            reject()
        return event

    return made()


class _Maker:
    """Makes strategies for the nodes of one schema."""

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._names: dict[str, Node] = {}
        self._made: dict[str, SearchStrategy[Any]] = {}

    def of(self, node: Node, path: str, chosen: Mapping[str, SearchStrategy[Any]] | None = None) -> SearchStrategy[Any]:
        """Return a strategy for what a node validates. `chosen` are those of the fields of the outermost model."""
        match node["type"]:
            case "definitions":
                self._names |= {found["ref"]: found for found in node["definitions"]}
                return self.of(node["schema"], path, chosen)
            case "definition-ref":
                return self._named(node["schema_ref"], path, chosen)
            case "model" | "dataclass" | "default" | "function-before" | "function-after" | "function-wrap":
                return self.of(node["schema"], path, chosen)
            case "model-fields" | "typed-dict" | "dataclass-args":
                return self._fields(node["fields"], path, chosen or {})
            case "nullable":
                return st.none() | self.of(node["schema"], path)
            case "union" | "tagged-union":
                return self._union(node["choices"], path)
            case "list" | "set" | "frozenset":
                items = node.get("items_schema", _ANY)
                if node["type"] == "list":
                    return st.lists(self.of(items, f"{path}[]"), **_sizes(node))
                # Duplicates are one element, so more are made than are needed.
                return st.lists(self.of(items, f"{path}[]"), **_sizes(node), unique=True).map(tuple)
            case "tuple":
                return self._tuple(node, path)
            case "dict":
                keys, values = node.get("keys_schema", _ANY), node.get("values_schema", _ANY)
                return st.dictionaries(self.of(keys, f"{path} (a key)"), self.of(values, f"{path}[]"), **_sizes(node))
            case kind if (leaf := _LEAVES.get(kind)) is not None:
                return leaf(node)
        raise ConfigurationError(
            f"events({self._kind}): no values of field {path!r} can be made up, for pydantic calls its type "
            f"{node['type']!r}. Give a strategy: events({self._kind}, {path.split('.')[0].rstrip('[]')}=...)"
        )

    def _named(self, ref: str, path: str, chosen: Mapping[str, SearchStrategy[Any]] | None) -> SearchStrategy[Any]:
        if chosen:
            return self.of(self._names[ref], path, chosen)
        if ref not in self._made:
            # A model may hold others of its kind.
            self._made[ref] = st.deferred(lambda: self.of(self._names[ref], path))
        return self._made[ref]

    def _fields(self, given: Any, path: str, chosen: Mapping[str, SearchStrategy[Any]]) -> SearchStrategy[Any]:
        fields = dict(given) if isinstance(given, Mapping) else {field["name"]: field for field in given}
        made: dict[str, SearchStrategy[Any]] = {}
        for name, field in fields.items():
            alias = field.get("validation_alias")
            key = alias if isinstance(alias, str) else name
            made[key] = chosen[name] if name in chosen else self.of(field["schema"], f"{path}.{name}".lstrip("."))
        return st.fixed_dictionaries(made)

    def _union(self, choices: Any, path: str) -> SearchStrategy[Any]:
        nodes = choices.values() if isinstance(choices, Mapping) else choices
        return st.one_of([self.of(node[0] if isinstance(node, tuple) else node, path) for node in nodes])

    def _tuple(self, node: Node, path: str) -> SearchStrategy[Any]:
        items = [self.of(item, f"{path}[]") for item in node["items_schema"]]
        many = node.get("variadic_item_index")
        if many is None:
            return st.tuples(*items)
        before, after = st.tuples(*items[:many]), st.tuples(*items[many + 1 :])
        inner = st.lists(items[many], **_sizes(node, less=len(items) - 1)).map(tuple)
        return st.tuples(before, inner, after).map(lambda parts: (*parts[0], *parts[1], *parts[2]))


def _sizes(node: Node, less: int = 0) -> dict[str, Any]:
    smallest = max(0, node.get("min_length", 0) - less)
    largest = node.get("max_length", max(MANY, smallest) + less) - less
    return {"min_size": smallest, "max_size": min(largest, max(MANY, smallest))}


# ---- values ------------------------------------------------------------------------------


def _whole(node: Node) -> SearchStrategy[int]:
    step = node.get("multiple_of", 1)
    smallest, largest = node.get("ge"), node.get("le")
    if "gt" in node:
        smallest = node["gt"] + 1
    if "lt" in node:
        largest = node["lt"] - 1
    if step == 1:
        return st.integers(smallest, largest)
    lowest = None if smallest is None else -(-smallest // step)
    highest = None if largest is None else largest // step
    return st.integers(lowest, highest).map(lambda times: times * step)


def _number(node: Node) -> SearchStrategy[float]:
    above, below = "gt" in node, "lt" in node
    made = st.floats(
        node.get("gt", node.get("ge")),
        node.get("lt", node.get("le")),
        exclude_min=above,
        exclude_max=below,
        allow_nan=False,
        allow_infinity=False,
    )
    step = node.get("multiple_of")
    return made if step is None else st.integers(-1000, 1000).map(lambda times: times * step)


def _decimal(node: Node) -> SearchStrategy[decimal.Decimal]:
    places = node.get("decimal_places", 4)
    digits = node.get("max_digits", 12)
    places = min(places, digits)
    smallest = decimal.Decimal(1).scaleb(-places)
    most = decimal.Decimal(10) ** (digits - places) - smallest
    low = max(-most, node.get("ge", -most), node.get("gt", -most - smallest) + smallest)
    high = min(most, node.get("le", most), node.get("lt", most + smallest) - smallest)
    made = st.decimals(low, high, places=places, allow_nan=False, allow_infinity=False)
    step = node.get("multiple_of")
    return made if step is None else st.integers(-1000, 1000).map(lambda times: times * decimal.Decimal(step))


def _text(node: Node) -> SearchStrategy[str]:
    pattern = node.get("pattern")
    if pattern is not None:
        return st.from_regex(pattern, alphabet=st.characters(exclude_categories=["Cs"]))
    # Mostly letters, so that a failure is easy to read; every character that UTF-8 can write is made, too.
    letters = st.sampled_from(string.ascii_letters)
    characters = letters | st.characters(exclude_categories=["Cs"])
    smallest = node.get("min_length", 0)
    return st.text(characters, min_size=smallest, max_size=node.get("max_length", max(20, smallest)))


def _moment(node: Node) -> SearchStrategy[Any]:
    zones = {"aware": st.just(UTC), "naive": st.none()}
    wanted = node.get("tz_constraint")
    kept = zones[wanted] if isinstance(wanted, str) else st.none() | st.just(UTC)
    made = st.datetimes(timezones=kept)
    return made.filter(lambda value: _within(value, node)) if _LIMITS & node.keys() else made


def _limited(make: Callable[[], SearchStrategy[Any]]) -> Callable[[Node], SearchStrategy[Any]]:
    def made(node: Node) -> SearchStrategy[Any]:
        bounds = {"min_value": node.get("ge", node.get("gt")), "max_value": node.get("le", node.get("lt"))}
        given = {name: value for name, value in bounds.items() if value is not None}
        return make(**given).filter(lambda value: _within(value, node))

    return made


_LIMITS: Final = {"gt", "ge", "lt", "le"}


def _within(value: Any, node: Node) -> bool:
    return (
        ("gt" not in node or value > node["gt"])
        and ("ge" not in node or value >= node["ge"])
        and ("lt" not in node or value < node["lt"])
        and ("le" not in node or value <= node["le"])
    )


_ANY: Final[Node] = {"type": "any"}
_LEAVES: Final[dict[str, Callable[[Node], SearchStrategy[Any]]]] = {
    "any": lambda _: st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(string.ascii_letters),
    "none": lambda _: st.none(),
    "bool": lambda _: st.booleans(),
    "int": _whole,
    "float": _number,
    "decimal": _decimal,
    "str": _text,
    "bytes": lambda node: st.text(
        string.ascii_letters, min_size=node.get("min_length", 0), max_size=node.get("max_length", 20)
    ).map(str.encode),
    "uuid": lambda _: st.uuids(),
    "date": _limited(st.dates),
    "time": lambda _: st.times(),
    "datetime": _moment,
    "timedelta": _limited(st.timedeltas),
    "enum": lambda node: st.sampled_from(node["members"]),
    "literal": lambda node: st.sampled_from(node["expected"]),
}
