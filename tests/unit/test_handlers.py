"""Declaring handlers: what is injected, what is refused and how it is named, how long a retry waits."""

from __future__ import annotations

import functools
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from tidings.errors import ConfigurationError
from tidings.hosting.runtime import Runtime
from tidings.modelling.context import Context
from tidings.modelling.events import Event
from tidings.modelling.handlers import Handler, Hold, Inject, Retry, declare
from tidings.service import Service
from tidings.settings import Settings
from tidings.stores import RecordedEvent

pytestmark = pytest.mark.lower_bounds

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForChecking


class Placed(Event):
    pass


class Cancelled(Event):
    pass


class Special(Placed):
    pass


class Gateway:
    pass


def declared(
    function: Callable[..., Any], *events: type[Event], name: str | None = None, timeout: float = 1
) -> Handler:
    return declare(function, events or (Placed,), name=name, retry=Retry(), timeout=timeout)


def wanted(handler: Handler) -> dict[str, Inject | type]:
    return dict(handler.parameters)


# ---- injection -----------------------------------------------------------------------


def test_everything_that_can_be_injected_is_found_by_annotation() -> None:
    async def handle(event: Placed, how: Context, to: AsyncSession, at: AsyncConnection, *, by: Gateway) -> None: ...

    handler = declared(handle)
    assert wanted(handler) == {
        "event": Inject.EVENT,
        "how": Inject.CONTEXT,
        "to": Inject.SESSION,
        "at": Inject.CONNECTION,
        "by": Gateway,
    }
    assert handler.name == "handle"
    assert handler.transactional
    assert not handler.threaded


def test_a_plain_function_is_threaded_and_not_transactional() -> None:
    def handle(event: Placed) -> None: ...

    handler = declared(handle, name="kept")
    assert (handler.name, handler.threaded, handler.transactional) == ("kept", True, False)


async def _newer(event: Placed | Cancelled) -> None: ...
async def _older(event: Union[Placed, Cancelled]) -> None: ...  # noqa: UP007
async def _any(event: Event) -> None: ...


async def everything(event: RecordedEvent) -> None: ...
async def nothing() -> None: ...


@pytest.mark.parametrize("function", [_newer, _older, _any])
def test_unions_and_base_classes_accept_several_events(function: Callable[..., Any]) -> None:
    assert wanted(declared(function, Placed, Cancelled)) == {"event": Inject.EVENT}


def test_a_base_class_accepts_its_subclasses() -> None:
    async def handle(event: Placed) -> None: ...

    assert wanted(declared(handle, Special)) == {"event": Inject.EVENT}


# ---- what is refused -----------------------------------------------------------------


async def no_event(context: Context) -> None: ...
async def narrow(event: Placed, context: Context) -> None: ...
async def bare(event: Placed, extra) -> None: ...  # type: ignore[no-untyped-def]
async def several(event: Placed, *extra: Gateway) -> None: ...
async def keywords(event: Placed, **extra: Gateway) -> None: ...
async def positional(event: Placed, /) -> None: ...
async def optional(event: Placed, extra: Gateway | None) -> None: ...
async def generic(event: Placed, extra: list[int]) -> None: ...
async def anything(event: Placed, extra: Any) -> None: ...
async def unresolved(event: Placed, extra: OnlyForChecking) -> None: ...
async def maybe(event: Placed | None) -> None: ...
async def missing_attribute(event: Placed, extra: "Gateway.Missing") -> None: ...  # type: ignore[name-defined]  # noqa: UP037
async def yields(event: Placed) -> AsyncIterator[None]:
    yield


def plain_yields(event: Placed) -> Iterator[None]:
    yield


def plain_session(event: Placed, session: AsyncSession) -> None: ...
def plain_connection(event: Placed, connection: AsyncConnection) -> None: ...


REFUSED: list[tuple[Callable[..., Any], str]] = [
    (no_event, "no parameter is annotated with Placed | Cancelled"),
    (narrow, "parameter 'event' does not accept Cancelled"),
    (bare, "parameter 'extra' has no annotation"),
    (several, "parameter 'extra' must be an ordinary"),
    (keywords, "parameter 'extra' must be an ordinary"),
    (positional, "parameter 'event' must be an ordinary"),
    (optional, "parameter 'extra'.*nothing that can be injected"),
    (generic, "parameter 'extra'.*nothing that can be injected"),
    (anything, "parameter 'extra'.*nothing that can be injected"),
    (maybe, "parameter 'event'.*nothing that can be injected"),
    (unresolved, "OnlyForChecking.*TYPE_CHECKING"),
    (missing_attribute, "Missing"),
    (yields, "contains a yield"),
    (plain_yields, "contains a yield"),
    (plain_session, "make it async"),
    (plain_connection, "make it async"),
]


@pytest.mark.parametrize(("function", "says"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_a_signature_that_cannot_be_served_is_refused_by_handler_and_parameter(
    function: Callable[..., Any], says: str
) -> None:
    events = (Placed, Cancelled) if function in (no_event, narrow) else (Placed,)
    with pytest.raises(ConfigurationError, match=says) as refused:
        declared(function, *events)
    assert f"handler '{function.__name__}' ({__name__})" in str(refused.value)


def test_events_must_be_given_and_be_events() -> None:
    with pytest.raises(ConfigurationError, match=r"'narrow'.*name the events"):
        declare(narrow, (), name=None, retry=Retry(), timeout=1)
    for stranger in (Event, Gateway, narrow):
        with pytest.raises(ConfigurationError, match=r"'narrow'.*is not a subclass of tidings.Event"):
            declare(narrow, (stranger,), name=None, retry=Retry(), timeout=1)  # type: ignore[arg-type]


WRONG: list[dict[str, Any]] = [
    {"retry": 3},
    {"retry": 0},
    {"retry": Hold()},
    {"replay": "no"},
    {"name": 7},
    {"timeout": None},
    {"was": "former"},
]


@pytest.mark.parametrize("given", WRONG, ids=str)
def test_what_would_end_the_service_later_is_refused_where_it_is_declared(given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(ConfigurationError, match=f"{name}="):
        Service("stock").on(Placed, **given)(narrow)
    with pytest.raises(ConfigurationError, match=f"{name}="):
        Service("stock").on_any(**given)(everything)


@pytest.mark.parametrize("kind", [Retry, Hold])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("attempts", "3"),
        ("attempts", 2.5),
        ("attempts", True),
        ("delay", "1"),
        ("delay", float("nan")),
        ("factor", float("inf")),
        ("maximum", None),
        ("maximum", 10**400),
    ],
)
def test_a_policy_consists_of_numbers(kind: Any, name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        kind(**{name: value})


@pytest.mark.parametrize(
    "given", [{"hold": 8}, {"hold": True}, {"hold_key": "yes"}, {"permanent": ValueError}], ids=str
)
def test_a_retry_says_what_it_holds(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(given))):
        Retry(**given)


@pytest.mark.parametrize("given", [{"concurrency": "8"}, {"prefetch": 1.5}, {"lifespan": 1}, {"tables": {}}], ids=str)
def test_a_service_is_given_what_it_can_use(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(given))}="):
        Service("stock", **given)


async def without_service() -> AsyncIterator[None]:
    yield


async def undecorated(service: Service) -> AsyncIterator[None]:
    yield


@pytest.mark.parametrize(
    ("lifespan", "said"),
    [
        (asynccontextmanager(without_service), "it is called with the service alone: too many positional arguments"),
        (undecorated, "Decorate it: @contextlib.asynccontextmanager"),
    ],
)
def test_a_lifespan_that_cannot_be_entered_is_refused_where_it_is_declared(lifespan: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        Service("stock", lifespan=lifespan)


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "30", True])
def test_a_timeout_must_be_positive(timeout: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"'narrow'.*must be positive"):
        declared(narrow, timeout=timeout)


# ---- a service's handlers ------------------------------------------------------------


def test_the_decorator_returns_the_function_unchanged_and_registers_every_event() -> None:
    service = Service("stock")
    assert service.on(Placed, Cancelled)(_newer) is _newer
    assert set(service.handlers) == {"Placed", "Cancelled"}
    assert service.view("Placed") is Placed
    assert service.view("Unknown") is None


def test_several_handlers_of_an_event_run_in_the_order_of_their_declaration() -> None:
    service = Service("stock")
    service.on(Placed)(narrow)
    service.on_any(name="all")(everything)
    service.on(Placed, Cancelled, name="other")(_newer)
    assert [handler.name for handler in service.handlers_of("Placed")] == ["narrow", "all", "other"]
    assert [handler.name for handler in service.handlers_of("Cancelled")] == ["all", "other"]
    assert [handler.name for handler in service.handlers_of("Unknown")] == ["all"]
    assert list(service.named) == ["narrow", "all", "other"]


def test_on_any_asks_for_the_recorded_event_and_nothing_else() -> None:
    service = Service("stock")
    with pytest.raises(ConfigurationError, match=r"'narrow'.*on_any hands over RecordedEvent"):
        service.on_any()(narrow)
    with pytest.raises(ConfigurationError, match=r"'nothing'.*no parameter is annotated with RecordedEvent"):
        service.on_any()(nothing)


def test_a_former_name_belongs_to_one_handler() -> None:
    service = Service("stock")
    service.on(Placed, name="old")(narrow)
    with pytest.raises(ConfigurationError, match="'old' is, or was, the name of two handlers"):
        service.on(Placed, name="new", was=("old",))(narrow)


@pytest.mark.parametrize("since", ["begin", -1, 1.5, True, 2**63, 10**30])
def test_where_a_handler_begins_is_start_now_or_a_position(since: Any) -> None:
    with pytest.raises(ConfigurationError, match="since="):
        Service("stock").on(Placed, since=since)(narrow)


def test_a_second_handler_of_a_name_is_refused() -> None:
    service = Service("stock")
    service.on(Placed)(_any)
    with pytest.raises(ConfigurationError, match="two handlers named '_any'"):
        service.on(Cancelled)(_any)


@pytest.mark.parametrize("was", ["old", ("old", ""), ("old", "old"), ("new",), ["old"]], ids=str)
def test_former_names_that_are_none_are_refused(was: Any) -> None:
    service = Service("shop")

    async def new(event: Placed) -> None: ...

    with pytest.raises(ConfigurationError, match=r"handler 'new' .*was="):
        service.on(Placed, was=was)(new)


def test_two_views_of_one_wire_name_are_refused() -> None:
    class Other(Event, name="Placed"):
        pass

    service = Service("stock")
    service.on(Placed)(_any)
    with pytest.raises(ConfigurationError, match="'Placed' is declared twice"):
        service.on(Other, name="b")(_any)


# ---- retry ---------------------------------------------------------------------------


@given(
    st.integers(1, 10_000),
    st.floats(0, 1e6),
    st.one_of(st.floats(1, 1e9), st.integers(1, 10**9)),
    st.floats(0, 1e6),
    st.floats(0, 1, exclude_max=True),
)
def test_waits_are_at_most_the_maximum_and_shortened_by_a_quarter_at_most(
    attempt: int, delay: float, factor: float, maximum: float, chance: float
) -> None:
    retry = Retry(delay=delay, factor=factor, maximum=maximum)
    longest = retry.wait(attempt, lambda: 0.0)
    assert longest <= maximum
    assert longest <= retry.wait(attempt + 1, lambda: 0.0)
    assert longest * 0.75 <= retry.wait(attempt, lambda: chance) <= longest
    if attempt == 1:
        assert longest == min(delay, maximum)


def test_waits_grow_by_the_factor() -> None:
    assert [Retry().wait(n, lambda: 0.0) for n in (1, 2, 3, 7)] == pytest.approx([0.1, 0.2, 0.4, 5.0])


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"delay": -0.1}, {"factor": 0.9}, {"maximum": -1}], ids=str)
def test_a_retry_that_cannot_work_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="attempts must be 1 or more"):
        Retry(**wrong)


# ---- callables that are no functions ----------------------------------------------------


class Greeter:
    def __init__(self, word: str) -> None:
        self.word = word

    async def __call__(self, event: Called, context: Context) -> None:
        pass


class SyncGreeter:
    def __call__(self, event: Called) -> None:
        pass


class Called(Event):
    x: int


async def _greet(event: Called, *, word: str) -> None:
    pass


def test_an_object_with_call_is_a_handler_named_after_its_class() -> None:
    service = Service("callables")
    service.on(Called)(Greeter("hello"))
    service.on(Called)(SyncGreeter())
    service.on(Called)(functools.partial(_greet, word="hello"))
    service.on(Called, name="again")(Greeter("again"))
    by_name = service.named
    assert set(by_name) == {"Greeter", "SyncGreeter", "_greet", "again"}
    assert [by_name[name].threaded for name in ("Greeter", "SyncGreeter", "_greet")] == [False, True, False]
    assert [parameter for parameter, _ in by_name["_greet"].parameters] == ["event"]


@pytest.mark.parametrize(("wrong", "said"), [(Greeter, "is a class: give an instance"), (7, "is no handler")])
def test_what_cannot_be_called_with_an_event_is_refused(wrong: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        Service("callables").on(Called)(wrong)


async def test_a_callable_object_is_called(tmp_path: Path) -> None:
    seen: list[int] = []

    class Keeper:
        async def __call__(self, event: Called) -> None:
            seen.append(event.x)

    service = Service("callables")
    service.on(Called)(Keeper())
    settings = Settings(store=f"memory://{uuid4()}", bus=f"memory://{uuid4()}", database=f"sqlite:///{tmp_path}/c.db")
    async with Runtime(service, settings=settings) as runtime:
        await service.append("called-1", Called(x=3))
        await runtime.settled()
    assert seen == [3]
