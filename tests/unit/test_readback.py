"""What is appended reads back equal, or is refused: when its class is declared, or when it is appended."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from ipaddress import IPv4Address
from math import inf, nan
from pathlib import PurePosixPath
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar, Union
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import (
    AliasChoices,
    AliasPath,
    Base64Bytes,
    BaseModel,
    ConfigDict,
    Field,
    FutureDate,
    FutureDatetime,
    HttpUrl,
    Json,
    PlainSerializer,
    PrivateAttr,
    RootModel,
    Secret,
    SecretBytes,
    SecretStr,
    TypeAdapter,
    computed_field,
    create_model,
    field_validator,
)
from pydantic.alias_generators import to_camel
from typing_extensions import TypedDict

from tests.unit.test_codec import ID, stored
from tidings import Service
from tidings.errors import ConfigurationError, SchemaError
from tidings.modelling.codec import decode, encode, read_metadata
from tidings.modelling.events import Event, is_exact, upcaster, wire_name

BERLIN = ZoneInfo("Europe/Berlin")
T = TypeVar("T")


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Tint(enum.StrEnum):
    RED = "red"


class Size(enum.IntEnum):
    ONE = 1


class Grade(enum.Enum):
    ONE = 1
    TEXT = "1"
    PAIR = (1, 2)


class Right(enum.Flag):
    READ = 1
    WRITE = 2


class Line(BaseModel):
    sku: str


class Gift(Line):
    card: str


class Reading(BaseModel):
    celsius: float


class Failed(BaseModel):
    code: int = 0


class Node(BaseModel):
    next: Node | None = None


@dataclasses.dataclass
class Point:
    x: float


@dataclasses.dataclass
class Point3(Point):
    z: float = 0.0


class Pair(NamedTuple):
    left: int
    right: str


class Row(TypedDict):
    name: str


def field(annotation: Any, default: Any = ..., **options: Any) -> type[Event]:
    """Declare an event class with one field, `x`."""
    return create_model("Made", __base__=Event, __cls_kwargs__=options, x=(annotation, default))


def of(container: Any, *kinds: Any) -> Any:
    """Return `container[kinds]`, for kinds that are only known when the test runs."""
    return container[kinds if len(kinds) > 1 else kinds[0]]


def read_back(event: Event) -> Event:
    return decode(stored(encode(event, id=ID)), type(event))


def chain(depth: int) -> Node:
    node = Node()
    for _ in range(depth):
        node = Node(next=node)
    return node


# ---- classes ------------------------------------------------------------------------------

HOPELESS = {
    "exclude": (str, Field(exclude=True)),
    "exclude with a default": (str, Field("", exclude=True)),
    "SecretStr": (SecretStr, ...),
    "SecretBytes": (SecretBytes | None, None),
    "Secret[int]": (list[Secret[int]], ...),
    "Json": (Json, ...),
    "Json[...]": (Json[list[int]] | None, ...),
    "an iterator": (Iterable[int], ...),
    "a date that must lie ahead": (FutureDate, ...),
    "a moment that must lie ahead": (FutureDatetime | None, None),
    "a function": (Callable[[], int], ...),
    "a class": (type[int], ...),
    "written under another name": (str, Field(serialization_alias="orderId")),
    "read under another name": (str, Field(validation_alias="orderId")),
    "read under other names": (str, Field(validation_alias=AliasChoices("orderId", "id"))),
    "read from a path": (str, Field(validation_alias=AliasPath("order", "id"))),
    "read from deeper paths": (str, Field(validation_alias=AliasChoices(AliasPath("x", 0), "y"))),
}


@pytest.mark.parametrize("what", HOPELESS)
def test_a_field_that_can_never_be_read_back_is_refused_with_what_to_write_instead(what: str) -> None:
    with pytest.raises(ConfigurationError, match=r"Made: field 'x' would not be read back as it was written: .{20}"):
        field(*HOPELESS[what])


@pytest.mark.parametrize("what", HOPELESS)
@pytest.mark.parametrize(
    "around",
    [
        lambda kind: kind,
        lambda kind: of(list, kind),
        lambda kind: of(dict, str, of(tuple, kind, ...)),
        lambda kind: int | kind,
        lambda kind: kind | None,
    ],
)
def test_so_is_one_in_whatever_the_event_holds(what: str, around: Callable[[Any], Any]) -> None:
    inner = create_model("Inner", x=HOPELESS[what])
    with pytest.raises(ConfigurationError, match=r"field 'x\.x' would not be read back"):
        field(around(inner))


@pytest.mark.parametrize("value", [Decimal("1.5"), UUID(int=1), date(2026, 1, 1), (1, 2), b"x"], ids=repr)
def test_an_enum_of_what_json_does_not_have_is_refused_unless_it_makes_its_members(value: Any) -> None:
    kind: Any = enum.Enum("kind", {"ONE": value})
    for annotation in (kind, kind | None, list[kind], dict[str, kind], dict[kind, int]):
        with pytest.raises(ConfigurationError, match=type(value).__name__):
            field(annotation)

    class Making(enum.Enum):
        ONE = Decimal("1.5")

        @classmethod
        def _missing_(cls, value: object) -> Making | None:
            return cls.ONE if value == "1.5" else None

    event = field(Making)(x=Making.ONE)
    assert read_back(event) == event


@pytest.mark.parametrize("value", [1, 1.5, None])
def test_numbers_of_an_enum_are_no_keys_but_values(value: Any) -> None:
    kind: Any = enum.Enum("kind", {"ONE": value})
    with pytest.raises(ConfigurationError, match=r"field 'x'.*StrEnum or an IntEnum"):
        field(dict[kind, int])
    event = field(kind)(x=kind["ONE"])
    assert read_back(event) == event


def test_so_is_one_in_a_dataclass_and_in_a_typed_dictionary() -> None:
    @dataclasses.dataclass
    class Login:
        token: SecretStr

    class Session(TypedDict):
        token: SecretStr

    for kind in (Login, Session):
        with pytest.raises(ConfigurationError, match=r"'x\.token'.*asterisks"):
            field(kind)


def test_aliases_of_a_whole_model_must_agree() -> None:
    with pytest.raises(ConfigurationError, match=r"'order_id' .*written as 'orderId', and read from 'order_id'"):

        class ByName(Event):
            model_config = ConfigDict(validate_by_alias=False, validate_by_name=True)
            order_id: str = Field(alias="orderId")

    with pytest.raises(ConfigurationError, match=r"'b' .*'a' is written as 'id' too"):

        class Twice(Event):
            a: str = Field(alias="id")
            b: str = Field(alias="id")


@pytest.mark.parametrize("extra", ["forbid", "allow"])
def test_a_computed_field_that_the_class_reads_as_another_one_is_refused(extra: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"'double'.*plain property"):

        class Summed(Event):
            model_config = ConfigDict(extra=extra)
            a: int

            @computed_field  # type: ignore[prop-decorator]
            @property
            def double(self) -> int:
                return 2 * self.a


def test_a_computed_field_is_written_for_others_and_ignored_when_it_is_read() -> None:
    class Summed(Event):
        a: int

        @computed_field  # type: ignore[prop-decorator]
        @property
        def double(self) -> int:
            return 2 * self.a

    assert json.loads(encode(Summed(a=1), id=ID).data) == {"a": 1, "double": 2}
    assert read_back(Summed(a=1)) == Summed(a=1)


def test_a_secret_that_tells_itself_when_it_is_written_is_the_users_decision() -> None:
    told = Annotated[SecretStr, PlainSerializer(lambda secret: secret.get_secret_value(), when_used="json")]
    event = field(told)(x=SecretStr("s3cret"))
    assert read_back(event) == event


class Early(Event):
    x: Later


class EarlySecret(Event):
    x: LaterSecret


class Later(BaseModel):
    n: float


class LaterSecret(BaseModel):
    token: SecretStr


def test_a_class_that_names_a_type_of_later_is_judged_when_it_is_used() -> None:
    assert read_back(Early(x=Later(n=1))) == Early(x=Later(n=1))
    with pytest.raises(SchemaError, match=r"x\.n"):
        encode(Early(x=Later(n=nan)), id=ID)
    with pytest.raises(ConfigurationError, match=r"'x\.token'"):
        encode(EarlySecret(x=LaterSecret(token="a")), id=ID)
    with pytest.raises(ConfigurationError, match=r"'x\.token'"):
        Service("any").on(EarlySecret)(handle)


async def handle(event: EarlySecret) -> None:
    """Do nothing."""


def test_a_class_that_names_a_type_of_never_is_refused_where_it_is_used() -> None:
    class Endless(Event):
        x: Never  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(ConfigurationError, match="names a type that is not defined"):
        is_exact(Endless)


@pytest.mark.parametrize(
    ("kind", "exact"),
    [
        (str, True),
        (int | None, True),
        (tuple[str, ...], True),
        (list[tuple[UUID, bool]], True),
        (Colour, True),
        (Size, True),
        (Literal["a", "b"], True),
        (Annotated[str, Field(min_length=1)], True),
        (float, True),
        (Decimal, True),
        (datetime, True),
        (dict[str, str], True),
        (Grade, True),
        (Right, True),
        (Line, True),
        (tuple[Line, ...], True),
        (Node, True),
        (Point, True),
        (Any, False),
        (object, False),
        (int | str, False),
        (list[Reading | Failed], False),
        (Sequence[int], False),
        (HttpUrl, False),
    ],
)
def test_equal_values_have_equal_types_where_the_class_says_which(kind: Any, exact: bool) -> None:
    assert is_exact(field(kind)) is exact


# ---- values -------------------------------------------------------------------------------


def changed(event: Any, value: Any) -> Any:
    event.x.append(value)
    return event


REFUSED: dict[str, Callable[[], Event]] = {
    "NaN in a nested model": lambda: field(Reading)(x=Reading(celsius=nan)),
    "infinity in a list of models": lambda: field(list[Reading])(x=[Reading(celsius=-inf)]),
    "NaN in a dataclass": lambda: field(Point)(x=Point(nan)),
    "NaN in Any": lambda: field(Any)(x={"ratio": [nan]}),
    "infinity in Any": lambda: field(dict[str, Any])(x={"ratio": inf}),
    "NaN in an optional number": lambda: field(float | None).model_construct(x=nan),
    "NaN put into a list later": lambda: changed(field(list[float])(x=[1.0]), nan),
    "another type put into a list later": lambda: changed(field(list[str])(x=["a"]), 1),
    "NaN by model_copy": lambda: field(float)(x=1).model_copy(update={"x": nan}),
    "Decimal NaN": lambda: field(Decimal).model_construct(x=Decimal("sNaN")),
    "NaN in a union of models": lambda: field(Reading | Failed)(x=Reading(celsius=nan)),
    "a text for a number": lambda: field(int).model_construct(x="x"),
    "a number for a text": lambda: field(str).model_construct(x=1),
    "a value that a constraint refuses": lambda: field(Annotated[int, Field(gt=0)]).model_construct(x=-1),
    "nothing for a field": lambda: field(str).model_construct(),
    "another literal": lambda: field(Literal["a"]).model_construct(x="b"),
    "another enum's member": lambda: field(Colour).model_construct(x=Grade.ONE),
    "nested 220 deep": lambda: field(Node)(x=chain(218)),
    "nested too deep for anybody": lambda: field(Node)(x=chain(600)),
    "an integer of 5000 digits": lambda: field(int)(x=10**4999),
    "an integer of 5000 digits in Any": lambda: field(Any)(x=[10**4999]),
    "keys that are tuples": lambda: field(dict[tuple[int, int], int])(x={(1, 2): 3}),
    "None as a key": lambda: field(dict[int | None, int])(x={None: 1}),
    "None as a key beside texts": lambda: field(dict[int | str | None, int])(x={None: 1}),
    "1 and '1' as keys": lambda: field(dict[int | str, int])(x={1: 1, "1": 2}),
    "1 as a key in Any": lambda: field(Any)(x={1: 1}),
    "numbers of an enum as keys": lambda: field(dict[Grade, int])(x={Grade.ONE: 1}),
    "numbers of a literal as keys": lambda: field(dict[Literal[1, 2], int])(x={1: 1}),
    "a lone surrogate": lambda: field(Any).model_construct(x="\ud800"),
    "a lone surrogate in a key": lambda: field(dict[str, int]).model_construct(x={"\ud800": 1}),
    "bytes that are no UTF-8": lambda: field(bytes)(x=b"\xff"),
    "bytes in Any": lambda: field(Any)(x=b"x"),
    "a tuple in Any": lambda: field(Any)(x=(1, 2)),
    "a set in Any": lambda: field(Any)(x={1}),
    "a Decimal in Any": lambda: field(Any)(x=Decimal("1.5")),
    "a moment in Any": lambda: field(dict[str, object])(x={"at": datetime(2026, 1, 1)}),
    "an enum of texts in Any": lambda: field(Any)(x=Tint.RED),
    "an enum of numbers in Any": lambda: field(Any)(x=[Size.ONE]),
    "an enum beside str": lambda: field(str | Colour)(x=Colour.RED),
    "a model in Any": lambda: field(Any)(x=Line(sku="1")),
    "a tuple in a Sequence": lambda: field(Sequence[int])(x=(1, 2)),
    "an instance of a subclass": lambda: field(Line)(x=Gift(sku="1", card="happy birthday")),
    "instances of a subclass in a list": lambda: field(list[Line])(x=[Line(sku="1"), Gift(sku="1", card="x")]),
    "an instance of a dataclass's subclass": lambda: field(Point)(x=Point3(1.0, 2.0)),
    "seconds in an offset": lambda: field(datetime)(x=datetime(1890, 1, 1, tzinfo=BERLIN)),
    "seconds in the offset of a time": lambda: field(time)(x=time(1, tzinfo=timezone(timedelta(seconds=3599)))),
    "a namedtuple in Any": lambda: field(Any)(x=Pair(1, "a")),
    "an enum's tuple": lambda: field(Grade)(x=Grade.PAIR),
    "itself": lambda: changed(field(list[Any])(x=[]), []),
}


def _round(value: list[Any]) -> list[Any]:
    value.append(value)
    return value


REFUSED["itself"] = lambda: field(list[Any]).model_construct(x=_round([]))


@pytest.mark.parametrize("what", REFUSED)
def test_a_value_that_would_not_be_read_back_is_refused(what: str) -> None:
    event = REFUSED[what]()
    with pytest.raises(SchemaError, match=r"event 'Made' (would not be read back|cannot become JSON)"):
        encode(event, id=ID)


def test_the_error_names_the_place_and_no_value() -> None:
    event = field(list[Line])(x=[Line(sku="1"), Gift(sku="2", card="hush")])
    with pytest.raises(SchemaError, match=r"x\[1\]: a Gift is read back as a Line") as refused:
        encode(event, id=ID)
    assert "hush" not in str(refused.value)
    with pytest.raises(SchemaError, match=r"x\.celsius: Input should be a valid number"):
        encode(field(Reading)(x=Reading(celsius=nan)), id=ID)


def test_a_validator_that_makes_something_else_of_what_it_made_is_refused() -> None:
    class Shouted(Event):
        text: str

        @field_validator("text")
        @classmethod
        def shout(cls, text: str) -> str:
            return text + "!"

    with pytest.raises(SchemaError, match="text: its value is another one"):
        encode(Shouted(text="a"), id=ID)


def test_a_validator_that_fails_when_it_is_read_is_refused_by_its_name() -> None:
    class Once(Event):
        x: int

        @field_validator("x")
        @classmethod
        def fails(cls, x: int) -> int:
            if x:
                raise LookupError("hush")
            return x + 1

    with pytest.raises(SchemaError, match="reading it raises LookupError"):
        encode(Once(x=0), id=ID)


def test_private_attributes_are_refused_unless_they_are_as_when_it_is_read() -> None:
    class Cached(Event):
        a: int
        _note: str = PrivateAttr("")

    assert read_back(Cached(a=1)) == Cached(a=1)
    noted = Cached(a=1)
    object.__setattr__(noted, "__pydantic_private__", {"_note": "x"})
    with pytest.raises(SchemaError, match="_note"):
        encode(noted, id=ID)


def test_a_model_that_compares_by_its_id_alone_hides_no_change() -> None:
    class Loose(Line):
        more: Line | None = None

        def __eq__(self, other: object) -> bool:
            return isinstance(other, Loose) and self.sku == other.sku

    assert read_back(field(Loose)(x=Loose(sku="1", more=Line(sku="2")))) is not None
    with pytest.raises(SchemaError, match=r"x\.more: a Gift is read back as a Line"):
        encode(field(Loose)(x=Loose(sku="1", more=Gift(sku="2", card="x"))), id=ID)


def test_infinity_that_pydantic_alone_would_read_back_is_refused_as_services_refuse_it() -> None:
    class Constant(Event):
        model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="constants")
        x: float

    with pytest.raises(SchemaError, match="NaN or Infinity, which JSON does not have"):
        encode(Constant(x=inf), id=ID)


def test_infinity_that_is_written_as_a_text_reads_back() -> None:
    class Text(Event):
        model_config = ConfigDict(allow_inf_nan=True, ser_json_inf_nan="strings")
        x: float

    assert read_back(Text(x=-inf)) == Text(x=-inf)
    with pytest.raises(SchemaError, match="x: its value is another one"):
        encode(Text(x=nan), id=ID)


READ: dict[str, tuple[Any, Any]] = {
    "a zone": (datetime, datetime(2026, 7, 1, 12, tzinfo=BERLIN)),
    "the first of an hour that a zone has twice": (datetime, datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN)),
    "the second of them": (datetime, datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1)),
    "an hour that a zone has not": (datetime, datetime(2026, 3, 29, 2, 30, tzinfo=BERLIN)),
    "such an hour in a list": (list[datetime], [datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1)]),
    "an integer of 3900 digits": (int, 10**3900),
    "texts longer than any integer": (str, "1" * 10_000),
    "depth that can be read": (Node, chain(190)),
    "a default of another type": (Decimal, 0),
    "a defaultdict": (defaultdict[str, int], defaultdict(int, a=1)),
    "a defaultdict in Any": (Any, defaultdict(int, a=1)),
    "a deque": (deque[int], deque([1, 2])),
    "a namedtuple": (Pair, Pair(1, "a")),
    "a typed dictionary": (Row, {"name": "a"}),
    "a frozenset": (frozenset[Colour], frozenset(Colour)),
    "flags": (Right, Right.READ | Right.WRITE),
    "keys that are enums": (dict[Colour, int], {Colour.RED: 1}),
    "keys that are moments": (dict[date, int], {date(2026, 1, 1): 1}),
    "keys that are UUIDs": (dict[UUID, int], {ID: 1}),
    "an address": (IPv4Address, IPv4Address("127.0.0.1")),
    "a path": (PurePosixPath, PurePosixPath("a/b")),
    "a URL": (HttpUrl, HttpUrl("https://example.org/")),
    "base64": (Base64Bytes, b"\x00\xff"),
    "a model of one value": (RootModel[list[int]], RootModel[list[int]]([1])),
    "nothing": (None, None),
    "a period": (timedelta, timedelta(days=-3, seconds=1, microseconds=7)),
    "a union with its exact type": (int | str, "1"),
    "a number among texts": (int | str, 1),
    "one of two models": (list[Reading | Failed], [Failed(code=1), Reading(celsius=1.5)]),
    "JSON in Any": (Any, {"a": [1, 1.5, "x", None, True, {"b": {}}]}),
}


@pytest.mark.parametrize("what", READ)
def test_what_reads_back_is_not_refused(what: str) -> None:
    kind, value = READ[what]
    made = field(kind).model_construct(x=value)
    assert read_back(made) is not None
    if what != "a default of another type":
        event = TypeAdapter(field(kind)).validate_python(
            {"x": made.__dict__["x"] if kind is not Base64Bytes else b"AP8="}
        )
        data = [json.loads(encode(each, id=ID).data) for each in (event, made)]
        if what == "a frozenset":  # equal sets may be iterated in different orders
            data = [sorted(document["x"]) for document in data]
        assert data[0] == data[1]


def test_camel_case_aliases_read_back() -> None:
    class Camel(Event, key="order_id"):
        model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True)
        order_id: str

    data = encode(Camel(order_id="1"), id=ID)
    assert json.loads(data.data) == {"orderId": "1"}
    assert decode(stored(data), Camel) == Camel(order_id="1")
    assert read_metadata(stored(data))["partitionKey"] == "1"


def test_a_field_may_be_read_under_its_old_name_too() -> None:
    class Renamed(Event):
        fee: str = Field(validation_alias=AliasChoices("fee", "amount"))

    assert read_back(Renamed(fee="1")) == Renamed(fee="1")


# ---- metadata ------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [(1, 2), {1: "a"}, {None: 1}, Size.ONE, [Tint.RED], chain])
def test_metadata_that_would_be_read_back_as_something_else_is_refused(value: object) -> None:
    with pytest.raises(SchemaError, match="metadata of event 'Made'"):
        encode(field(str)(x="a"), id=ID, metadata={"actor": value})


def test_metadata_nested_too_deep_to_be_read_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(210):
        deep = [deep]
    with pytest.raises(SchemaError, match="metadata of event 'Made'"):
        encode(field(str)(x="a"), id=ID, metadata={"many": deep})


def test_metadata_that_is_json_is_kept_whole() -> None:
    mine = {"actor": "é", "tags": ["a", {"n": 1.5}], "none": None, "yes": True}
    metadata = read_metadata(stored(encode(field(str)(x="a"), id=ID, metadata=mine)))
    assert {name: metadata[name] for name in mine} == mine


# ---- generic events -------------------------------------------------------------------------


class OrderEvent(Event, Generic[T], name="Ordered", version=2, key="order_id"):
    order_id: str
    payload: T

    @staticmethod
    @upcaster(1)
    def payload_was_called_body(data: dict[str, Any]) -> dict[str, Any]:
        return {"payload": data.pop("body"), **data}


def test_a_generic_event_keeps_name_version_key_and_upcasters() -> None:
    data = encode(OrderEvent[int](order_id="1", payload=2), id=ID)
    assert (data.type, wire_name(OrderEvent[int])) == ("Ordered", "Ordered")
    assert read_metadata(stored(data))["schemaVersion"] == 2
    assert read_metadata(stored(data))["partitionKey"] == "1"
    assert decode(stored(data), OrderEvent[int]) == OrderEvent[int](order_id="1", payload=2)
    old = stored(data)._replace(data=b'{"order_id":"1","body":3}', metadata=b'{"schemaVersion":1}')
    assert decode(old, OrderEvent[int]).payload == 3
    assert decode(old, OrderEvent[Decimal]).payload == Decimal(3)


def test_a_generic_event_is_judged_with_its_parameter() -> None:
    assert is_exact(OrderEvent[int])
    assert not is_exact(OrderEvent[Any])
    with pytest.raises(ConfigurationError, match=r"'payload'.*asterisks"):
        OrderEvent[SecretStr]


# ---- whatever the type ----------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
moments = st.datetimes(timezones=st.none() | st.timezones() | st.builds(timezone, st.timedeltas(
    timedelta(hours=-23), timedelta(hours=23))))  # fmt: skip
scalars: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (str, texts),
    (int, st.integers()),
    (bool, st.booleans()),
    (float, st.floats()),
    (Decimal, st.decimals(allow_nan=False, allow_infinity=False)),
    (UUID, st.uuids()),
    (date, st.dates()),
    (datetime, moments),
    (time, st.times()),
    (timedelta, st.timedeltas()),
    (bytes, st.binary(max_size=4)),
    (Colour, st.sampled_from(Colour)),
    (Tint, st.sampled_from(Tint)),
    (Size, st.sampled_from(Size)),
    (Grade, st.sampled_from(Grade)),
    (Right, st.sampled_from([Right.READ, Right.READ | Right.WRITE])),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
    (Literal[1, "1", True], st.sampled_from([1, "1", True])),
    (None, st.none()),
    (Line, st.builds(Line, sku=texts) | st.builds(Gift, sku=texts, card=texts)),
    (Reading, st.builds(Reading, celsius=st.floats())),
    (Failed, st.builds(Failed, code=st.integers())),
    (Point, st.builds(Point, st.floats()) | st.builds(Point3, st.floats(), st.floats())),
    (Pair, st.builds(Pair, st.integers(), texts)),
    (Row, st.builds(dict, name=texts)),
    (IPv4Address, st.ip_addresses(v=4)),
]
loose = st.one_of(*(values for _, values in scalars))
scalars.append((Any, st.recursive(loose, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
    loose.filter(lambda key: key.__hash__ is not None and not isinstance(key, Point | BaseModel | dict)),
    inner, max_size=2) | st.tuples(inner), max_leaves=3)))  # fmt: skip


def larger(inner: st.SearchStrategy[tuple[Any, Any]]) -> st.SearchStrategy[tuple[Any, Any]]:
    def around(one: tuple[Any, Any], other: tuple[Any, Any]) -> st.SearchStrategy[tuple[Any, Any]]:
        (kind, values), (kind2, values2) = one, other
        made: list[tuple[Any, Any]] = [
            (of(list, kind), st.lists(values, max_size=3)),
            (of(tuple, kind, ...), st.lists(values, max_size=3).map(tuple)),
            (of(tuple, kind, kind2), st.tuples(values, values2)),
            (of(Sequence, kind), st.lists(values, max_size=2) | st.lists(values, max_size=2).map(tuple)),
            (of(Union, kind, kind2), values | values2),
            (of(dict, str, kind), st.dictionaries(texts, values, max_size=2)),
            (of(Mapping, str, kind), st.dictionaries(texts, values, max_size=2)),
        ]
        if kind in {found for found, _ in scalars[:19]}:
            made += [
                (of(set, kind), st.sets(values, max_size=3)),
                (of(frozenset, kind), st.frozensets(values, max_size=3)),
                (of(dict, kind, kind2), st.dictionaries(values, values2, max_size=2)),
            ]
        return st.sampled_from(made)

    return st.tuples(inner, inner).flatmap(lambda pair: around(*pair))


kinds = st.recursive(st.sampled_from(scalars), larger, max_leaves=4)
classes: dict[str, type[Event]] = {}


def class_for(kind: Any) -> type[Event]:
    if repr(kind) not in classes:
        classes[repr(kind)] = field(kind)
    return classes[repr(kind)]


def shown(value: Any) -> str:
    """An independent oracle: compare everything that a reader can distinguish. A time zone may come back as its
    offset."""
    match value:
        case BaseModel():
            return f"{type(value).__name__}({ {name: shown(v) for name, v in vars(value).items()} })"
        case Point():
            return f"{type(value).__name__}({ {name: shown(v) for name, v in vars(value).items()} })"
        case dict():
            return f"dict({sorted((shown(k), shown(v)) for k, v in value.items())})"
        case set() | frozenset():
            return f"{type(value).__name__}({sorted(map(shown, value))})"
        case list() | tuple():
            return f"{type(value).__name__}({[shown(v) for v in value]})"
        case time():
            return f"time {value.replace(fold=0)!r}"
        case datetime():
            return f"datetime {value.replace(tzinfo=None, fold=0)!r} {value.utcoffset()}"
        case _:
            return f"{type(value).__name__} {value!r}"


def same_or_refused(event: Event) -> bool:
    try:
        data = encode(event, id=ID)
    except SchemaError:
        return False
    assert shown(decode(stored(data), type(event))) == shown(event)
    return True


@settings(max_examples=400, deadline=None)
@given(kinds.flatmap(lambda found: st.tuples(st.just(found[0]), found[1])))
def test_an_event_of_any_type_reads_back_the_same_or_is_refused(case: tuple[Any, Any]) -> None:
    kind, value = case
    made = class_for(kind)
    try:
        event = made(x=value)
    except ValueError:
        return
    same_or_refused(event)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(scalars), kinds.flatmap(lambda found: found[1]))
def test_so_does_one_whose_value_came_past_the_validation(declared: tuple[Any, Any], value: Any) -> None:
    for kind in (declared[0], of(list, declared[0]), of(tuple, declared[0], ...)):
        made = class_for(kind)
        for given_value in (value, [value], (value,)):
            event = made.model_construct(x=given_value)
            with_equal_numbers(event)


def with_equal_numbers(event: Event) -> None:
    """Without validation, a field may hold an equal value of another type, such as True for 1."""
    try:
        data = encode(event, id=ID)
    except SchemaError:
        return
    back = decode(stored(data), type(event))
    assert back == event or shown(back) == shown(event)


@settings(max_examples=200, deadline=None)
@given(
    st.fixed_dictionaries(
        {
            "a": texts,
            "b": st.integers(),
            "c": st.booleans(),
            "d": st.uuids(),
            "e": st.sampled_from(Colour),
            "f": st.none() | st.decimals(allow_nan=False, allow_infinity=False),
            "g": st.datetimes(timezones=st.just(UTC)),
            "h": st.lists(st.builds(Line, sku=texts), max_size=3).map(tuple),
            "i": st.dates(),
            "j": st.floats(allow_nan=False, allow_infinity=False),
        }
    )
)
def test_what_events_usually_hold_is_never_refused(values: dict[str, Any]) -> None:
    assert same_or_refused(Usual(**values))


class Usual(Event, key="d"):
    a: str
    b: int
    c: bool
    d: UUID
    e: Colour
    f: Decimal | None
    g: datetime
    h: tuple[Line, ...]
    i: date
    j: float
