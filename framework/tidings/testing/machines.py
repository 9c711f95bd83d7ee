"""A stateful test of an aggregate against a plain model, by hypothesis, which the extra `testing` brings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Final, NamedTuple, TypeVar

from tidings.errors import ConfigurationError
from tidings.modelling.aggregate import Aggregate, begin, state_of
from tidings.testing.scenario.decided import loaded

try:
    from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
    from hypothesis.strategies import SearchStrategy
except ImportError as error:
    raise ImportError("tidings.testing.machines needs hypothesis: pip install 'tidings[testing]'") from error

__all__ = ["AggregateMachine", "aggregate_machine"]

A = TypeVar("A", bound=Aggregate)
M = TypeVar("M")


def aggregate_machine(
    aggregate: type[A],
    model: Callable[[], M],
    decisions: Mapping[Callable[..., Any], Mapping[str, SearchStrategy[Any]]],
    *,
    id: str = "1",
    compare: Callable[[A, M], object] | None = None,
    state: Callable[[A], Any] | None = None,
) -> type[AggregateMachine]:
    """Return a state machine that makes random decisions of an aggregate, and the same of a plain model.

        TestBasket = aggregate_machine(Basket, Model, {Basket.add: {"sku": st.text()}, Basket.pay: {}}).TestCase

    `model` makes the model. It has a method for each decision, with the same name and parameters, which raises the same
    class of exception when the aggregate should refuse. After each step these must hold:

    * Both refused with the same class of exception, or neither did. A refusal records nothing and changes nothing.
    * Each public attribute of the model equals the aggregate's, or `compare(aggregate, model)` raises nothing and
      returns anything but False.
    * What was recorded can be appended, and an aggregate that is read back from it is the same: a decision changed the
      state only by way of its events. `state(aggregate)` is what is compared, by default all attributes.
    """
    rules: dict[str, Any] = {}
    for decide, strategies in decisions.items():
        name = getattr(decide, "__name__", "")
        if getattr(aggregate, name, None) is not decide:
            raise ConfigurationError(f"aggregate_machine: {decide!r} is no method of {aggregate.__qualname__}")
        if not callable(getattr(model, name, None)) and isinstance(model, type):
            raise ConfigurationError(f"aggregate_machine: {model.__qualname__} has no method {name!r} to compare with")
        declare: Any = rule(**dict[str, Any](strategies))
        rules[name] = declare(_step(name))
    subject = _Subject(aggregate, id, model, compare or _by_attributes, state or _attributes)
    return type(f"{aggregate.__name__}Machine", (AggregateMachine,), {"subject": subject, **rules, "__doc__": None})


class _Subject(NamedTuple):
    """What a machine tests, and how it compares."""

    kind: type[Aggregate]
    id: str
    model: Callable[[], Any]
    compare: Callable[[Any, Any], object]
    state: Callable[[Any], Any]


def _step(name: str) -> Callable[..., None]:
    def step(self: AggregateMachine, **arguments: Any) -> None:
        self.decide(name, arguments)

    step.__name__ = name
    return step


def _attributes(aggregate: Aggregate) -> dict[str, Any]:
    return {name: value for name, value in vars(aggregate).items() if name != "__tidings__"}


_NONE: Final = object()


def _by_attributes(aggregate: Aggregate, model: object) -> None:
    for name, wanted in vars(model).items():
        if not name.startswith("_"):
            found = getattr(aggregate, name, _NONE)
            assert found == wanted, f"{name}: the model has {wanted!r}, and the aggregate {_shown(found)}"


def _shown(found: object) -> str:
    return "no such attribute" if found is _NONE else repr(found)


class AggregateMachine(RuleBasedStateMachine):
    """The base class of what `aggregate_machine` returns; a rule of your own may call `decide`."""

    subject: ClassVar[_Subject]

    def __init__(self) -> None:
        super().__init__()
        self.aggregate: Any = begin(self.subject.kind, self.subject.id)
        self.model: Any = self.subject.model()

    def decide(self, name: str, arguments: Mapping[str, Any]) -> None:
        """Make a decision of both, and compare whether they refuse."""
        before, state = list(state_of(self.aggregate).recorded), repr(self.subject.state(self.aggregate))
        found = _raised(getattr(self.aggregate, name), arguments)
        wanted = _raised(getattr(self.model, name), arguments)
        if type(found) is not type(wanted):
            told = f"{name}: the model {_ended(wanted)}, and the aggregate {_ended(found)}"
            raise AssertionError(told) from (found or wanted)
        if found is not None:
            recorded = state_of(self.aggregate).recorded[len(before) :]
            assert not recorded, f"{name} recorded {recorded}, and then refused: {found!r}"
            assert repr(self.subject.state(self.aggregate)) == state, (
                f"{name} changed the state, and then refused: {found!r}"
            )

    @invariant()
    def agrees_with_the_model(self) -> None:
        assert self.subject.compare(self.aggregate, self.model) is not False, "compare(aggregate, model) returned False"

    @invariant()
    def reads_back_the_same(self) -> None:
        again = loaded(self.subject.kind, self.subject.id, state_of(self.aggregate).recorded)
        wanted, found = self.subject.state(self.aggregate), self.subject.state(again)
        assert found == wanted, (
            f"read back from its events, the aggregate has another state: {found!r}, and not {wanted!r}. Does a "
            "decision change an attribute without recording an event?"
        )


def _raised(decide: Callable[..., Any], arguments: Mapping[str, Any]) -> Exception | None:
    try:
        decide(**arguments)
    except Exception as error:
        return error
    return None


def _ended(error: Exception | None) -> str:
    return "refuses nothing" if error is None else f"raises {error!r}"
