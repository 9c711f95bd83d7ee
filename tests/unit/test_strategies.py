"""Events made up from their classes, and aggregates against plain models."""

from __future__ import annotations

import subprocess
import sys
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from typing import Annotated, Any, Literal, cast
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, Phase, find, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, NaiveDatetime, field_validator
from pydantic.dataclasses import dataclass

import services.inventory.events
import services.order.events
import services.payment.events
import services.shipping.events
from tidings import Aggregate, Event, evolves
from tidings.errors import ConfigurationError
from tidings.modelling.codec import encode
from tidings.testing.machines import AggregateMachine, aggregate_machine
from tidings.testing.strategies import events


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Tree(BaseModel):
    name: Annotated[str, Field(min_length=1, max_length=3)]
    below: tuple[Tree, ...] = ()


@dataclass(frozen=True)
class Box:
    wide: int
    high: int = 2


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]
    age: int


def even(value: int) -> int:
    if value % 2:
        raise ValueError("odd")
    return value


class Everything(Event, key="id"):
    model_config = ConfigDict(validate_by_name=True)

    id: str
    code: str = Field(pattern=r"^[A-Z]{3}\d$")
    price: Decimal = Field(gt=0, max_digits=6, decimal_places=2)
    any_decimal: Decimal
    tens: int = Field(multiple_of=10, gt=5, lt=1000)
    share: float = Field(ge=0, lt=1)
    number: float
    colour: Colour
    word: Literal["a", "b"]
    lines: tuple[Tree, ...] = Field(min_length=1, max_length=2)
    pair: tuple[int, str]
    numbers: frozenset[int] = Field(min_length=2)
    names: dict[str, int]
    at: AwareDatetime
    local: NaiveDatetime
    any_moment: datetime
    day: date = Field(ge=date(2020, 1, 1))
    lasts: timedelta = Field(ge=timedelta(0), le=timedelta(days=1))
    uuid: UUID
    note: str | None = None
    box: Box
    animal: Cat | Dog = Field(discriminator="kind")
    either: int | Tree
    twos: Annotated[int, AfterValidator(even)]
    renamed: int = Field(alias="re-named")
    flags: list[bool]
    raw: bytes
    free: Any = None


class Upper(Event):
    word: str

    @field_validator("word")
    @classmethod
    def _upper(cls, value: str) -> str:
        return value.upper()


@given(events(Everything))
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_whatever_is_made_up_could_be_appended(event: Everything) -> None:
    assert encode(event, id=uuid4()).type == "Everything"
    assert Everything.model_validate_json(event.model_dump_json(by_alias=True)) == event
    assert event.id
    assert len(event.numbers) >= 2


@given(events(Upper))
def test_validators_have_their_say(event: Upper) -> None:
    assert event.word == event.word.upper()


OF_SERVICES = [
    kind
    for module in (
        services.order.events,
        services.inventory.events,
        services.payment.events,
        services.shipping.events,
    )
    for kind in vars(module).values()
    if isinstance(kind, type) and issubclass(kind, Event) and kind is not Event
]


@pytest.mark.parametrize("kind", OF_SERVICES, ids=lambda kind: f"{kind.__module__.split('.')[1]}.{kind.__name__}")
def test_every_event_of_the_services_can_be_made_up(kind: type[Event]) -> None:
    assert isinstance(
        find(events(kind), lambda _: True, settings=settings(database=None, phases=[Phase.generate])), kind
    )


def test_fields_can_be_given_as_strategies_or_values() -> None:
    @given(events(Everything, id="7", tens=st.sampled_from([10, 20]), note=None))
    @settings(max_examples=10, suppress_health_check=list(HealthCheck))
    def check(event: Everything) -> None:
        assert (event.id, event.note) == ("7", None)
        assert event.tens in (10, 20)

    check()


class Bounded(Event):
    whole: int = Field(gt=5, le=20, multiple_of=5)
    price: Decimal = Field(gt=0, lt=1, decimal_places=2)
    share: float = Field(ge=0, lt=1)


@pytest.mark.parametrize(
    ("field", "limit"),
    [("whole", 10), ("whole", 20), ("price", Decimal("0.01")), ("price", Decimal("0.99")), ("share", 0.0)],
)
def test_limits_are_reached_and_not_passed(field: str, limit: object) -> None:
    quick = settings(max_examples=2000, database=None)
    assert getattr(find(events(Bounded), lambda event: getattr(event, field) == limit, settings=quick), field) == limit


def test_a_type_that_cannot_be_made_up_is_named_with_the_remedy() -> None:
    class Odd(Event):
        host: st.SearchStrategy[int] | None = None  # type: ignore[type-arg, unused-ignore]

        model_config = ConfigDict(arbitrary_types_allowed=True)

    class Plain(Event): ...

    with pytest.raises(ConfigurationError, match=r"no values of field 'host' can be made up.*events\(Odd, host="):
        events(Odd)
    with pytest.raises(ConfigurationError, match=r"give the class of the events, events\(Plain\)"):
        events(cast("Any", Plain()))
    with pytest.raises(ConfigurationError, match=r"'Odd'\): that is no class of events"):
        events(cast("Any", "Odd"))
    with pytest.raises(ConfigurationError, match="has no field colour"):
        events(Upper, colour=1)


@pytest.mark.parametrize("module", ["strategies", "machines"])
def test_without_hypothesis_the_error_says_what_to_install(module: str) -> None:
    code = f"import sys; sys.modules['hypothesis'] = None; import tidings.testing.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"ImportError: tidings.testing.{module} needs hypothesis" in done.stderr
    assert "pip install 'tidings[testing]'" in done.stderr


# ---- machines ----------------------------------------------------------------------------


class Added(Event):
    pieces: int


class Full(Exception): ...


class Basket(Aggregate):
    def __init__(self) -> None:
        self.pieces = 0
        self.last = 0

    def add(self, pieces: int) -> None:
        if self.pieces + pieces > 10:
            raise Full
        self.record(Added(pieces=pieces))

    @evolves(Added)
    def _added(self, event: Added) -> None:
        self.pieces += event.pieces
        self.last = event.pieces


class Forgetful(Basket):
    def add(self, pieces: int) -> None:
        super().add(pieces)
        self.last = 0  # without an event


class Lenient(Basket):
    def add(self, pieces: int) -> None:
        self.record(Added(pieces=pieces))


class Late(Basket):
    def add(self, pieces: int) -> None:
        self.record(Added(pieces=pieces))
        if self.pieces > 10:
            raise Full


class Wrong(Basket):
    @evolves(Added)
    def _added(self, event: Added) -> None:
        self.pieces = event.pieces
        self.last = event.pieces


class Model:
    def __init__(self) -> None:
        self.pieces = 0

    def add(self, pieces: int) -> None:
        if self.pieces + pieces > 10:
            raise Full
        self.pieces += pieces


def machine(kind: type[Basket], **options: Any) -> type[AggregateMachine]:
    return aggregate_machine(kind, Model, {kind.add: {"pieces": st.integers(1, 6)}}, **options)


FEW = settings(max_examples=60, stateful_step_count=8, database=None, deadline=None)

TestBasket = machine(Basket).TestCase
TestBasket.settings = FEW


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Forgetful, "read back from its events, the aggregate has another state"),
        (Lenient, r"add: the model raises Full\(\), and the aggregate refuses nothing"),
        (Late, r"add recorded \[Added\(pieces=\d\)\], and then refused: Full\(\)"),
        (Wrong, r"pieces: the model has \d+, and the aggregate \d"),
    ],
)
def test_an_aggregate_that_is_wrong_is_found_out(kind: type[Basket], says: str) -> None:
    with pytest.raises(AssertionError, match=says):
        run_state_machine_as_test(machine(kind), settings=FEW)


def test_what_is_compared_can_be_said() -> None:
    with pytest.raises(AssertionError, match="returned False"):
        run_state_machine_as_test(machine(Basket, compare=lambda basket, model: basket.last < 3), settings=FEW)
    run_state_machine_as_test(machine(Forgetful, state=lambda basket: basket.pieces), settings=FEW)


def test_a_machine_is_made_of_methods_that_both_have() -> None:
    with pytest.raises(ConfigurationError, match="is no method of Basket"):
        aggregate_machine(Basket, Model, {Lenient.add: {}})
    with pytest.raises(ConfigurationError, match="object has no method 'add'"):
        aggregate_machine(Basket, object, {Basket.add: {}})
