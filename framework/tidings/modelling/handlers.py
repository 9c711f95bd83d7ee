"""Handlers as a service knows them: which events, what to inject, how to retry. Checked when they are declared."""

from __future__ import annotations

import inspect
import random
import types
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Final, Literal, TypeGuard, Union, get_args, get_origin, get_type_hints

from tidings._support.backoff import nth_pause
from tidings.errors import ConfigurationError
from tidings.modelling.context import Context
from tidings.modelling.events import Event, wire_name
from tidings.stores import MAX_POSITION, RecordedEvent

__all__ = ["NAME_LENGTH", "Handler", "Hold", "Inject", "Retry", "Since", "declare"]

NAME_LENGTH: Final = 150
"""Characters of a handler's name at most: it is a part of keys, whose length PostgreSQL limits."""


FOREVER: Final = 1e9
"""Seconds, some 30 years, that no pause reaches; it also bounds the factor between pauses."""
JITTER: Final = 0.25
"""Share of a pause by which it is shortened at random, so that events that failed together do not retry together."""


def _check_times(policy: Retry | Hold) -> None:
    """Raises `ConfigurationError` for what would end the service, or never end, at the first failure."""
    if type(policy.attempts) is not int:
        raise ConfigurationError(f"{policy}: attempts must be a whole number")
    for name in ("delay", "factor", "maximum"):
        value: object = getattr(policy, name)
        if not _is_number(value) or not value <= FOREVER:
            raise ConfigurationError(f"{policy}: {name} must be a number, at most {FOREVER:g}")
    if policy.attempts < 1 or policy.delay < 0 or policy.factor < 1 or policy.maximum < 0:
        raise ConfigurationError(f"{policy}: attempts must be 1 or more, factor 1 or more, delays not negative")


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class Hold:
    """What follows quick retries: the event is held, and only later events of its own partition key wait for it.

    It is tried `attempts` times more, the n-th time `delay * factor**(n-1)` seconds after the failure before,
    `maximum` at most, each shortened by up to a quarter at random; then it is dead.
    """

    attempts: int = 8
    delay: float = 5.0
    factor: float = 2.0
    maximum: float = 600.0

    def __post_init__(self) -> None:
        _check_times(self)

    def wait(self, attempt: int, random: Callable[[], float] = random.random) -> float:
        """Seconds until held attempt number `attempt` (from 1)."""
        return nth_pause(attempt, self.delay, self.maximum, factor=self.factor, jitter=JITTER, random=random)


@dataclass(frozen=True, slots=True)
class Retry:
    """What to do when a handler fails. Quick retries come first: later events of the same bucket wait meanwhile.

    `attempts` counts the first one. Before attempt n+1 the lane waits `delay * factor**(n-1)` seconds, `maximum` at
    most, each shortened by up to a quarter at random. `permanent` lists further exceptions that skip retries. `hold`
    says how it goes on after them; with None the event is dead at once. `hold_key`: while an event is dead, later
    events of its partition key wait until somebody retries or drops it; with False they go on, which gives up order.
    """

    attempts: int = 5
    delay: float = 0.1
    factor: float = 2.0
    maximum: float = 5.0
    permanent: tuple[type[BaseException], ...] = ()
    hold: Hold | None = Hold()
    hold_key: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.permanent, tuple) or not all(
            isinstance(kind, type) and issubclass(kind, BaseException) for kind in self.permanent
        ):
            raise ConfigurationError(f"Retry(permanent={self.permanent!r}): give a tuple of exception classes")
        if self.hold is not None and not isinstance(self.hold, Hold):
            raise ConfigurationError(f"Retry(hold={self.hold!r}): give tidings.Hold(...), or None to hold nothing")
        if type(self.hold_key) is not bool:
            raise ConfigurationError(f"Retry(hold_key={self.hold_key!r}): give True or False")
        _check_times(self)

    def wait(self, attempt: int, random: Callable[[], float] = random.random) -> float:
        """Seconds to wait after failed attempt number `attempt` (from 1)."""
        return nth_pause(attempt, self.delay, self.maximum, factor=self.factor, jitter=JITTER, random=random)


Since = Literal["start", "now"] | int | None


class Inject(Enum):
    """What a handler's parameter asks for, other than a resource."""

    EVENT = "event"
    RECORDED = "recorded event"
    CONTEXT = "context"
    SESSION = "session"
    CONNECTION = "connection"


@dataclass(frozen=True, slots=True)
class Handler:
    """One decorated function. `name` is part of the ids of what it emits: keep it when the function is renamed, or
    say what it `was`."""

    name: str
    function: Callable[..., Awaitable[None] | None]
    events: tuple[type[Event], ...]
    parameters: tuple[tuple[str, Inject | type], ...]
    """Parameter name to what is injected; a type stands for a resource of the service's lifespan."""
    retry: Retry
    timeout: float
    """Seconds per attempt."""
    threaded: bool
    """A plain function: it runs in a thread."""
    transactional: bool = False
    """It works on the service's database: inside the transaction that moves the watermark."""
    replay: bool = True
    """A replay runs it again; False for one with effects outside of the service's database."""
    was: tuple[str, ...] = ()
    """Its former names, the oldest first: what was emitted under any of them is not emitted again."""
    since: Since = None
    """Where it begins when it is new in a service that has settled events before."""
    line: str = ""
    """Its own line, by its name: in it, later events of a key wait for those that it holds."""
    first_of: frozenset[str] = frozenset()
    """Wire names of the events whose first handler it is."""

    @property
    def names(self) -> frozenset[str]:
        """Those that it has, or had."""
        return frozenset((self.name, *self.was))

    def line_of(self, kind: str) -> str:
        """Return the line in which events of this wire name wait for each other: "", which the first handlers of all
        events share, or its own."""
        return "" if kind in self.first_of else self.line


_SQLALCHEMY: Final = {"AsyncSession": Inject.SESSION, "AsyncConnection": Inject.CONNECTION}


def declare(
    function: Callable[..., Awaitable[None] | None],
    events: tuple[type[Event], ...],
    *,
    name: str | None,
    retry: Retry,
    timeout: float,
    replay: bool = True,
    was: tuple[str, ...] = (),
    since: Since = None,
    every: bool = False,
) -> Handler:
    """Read the signature. Raises `ConfigurationError` that names handler and parameter.

    `every`: the handler takes every event of the log, declared or not, as a `RecordedEvent`.
    """
    body = _body(function)
    if name is not None and not isinstance(name, str):
        raise ConfigurationError(f"a handler's name={name!r}: give a text")
    name = name or str(
        getattr(body, "__name__", body) if body is not type(function).__call__ else type(function).__name__
    )
    where = f"handler {name!r} ({getattr(body, '__module__', '?')})"
    if len(name) > NAME_LENGTH:
        raise ConfigurationError(
            f"handler {name[:40]!r}...: its name has {len(name)} characters, and {NAME_LENGTH} is the limit: the "
            "service's database finds held events by it. Give it a shorter one with name=..."
        )
    _check_former(where, name, was)
    if not events and not every:
        raise ConfigurationError(f"{where}: name the events: @service.on(OrderCreated)")
    if not (since in (None, "start", "now") or (type(since) is int and 0 <= since <= MAX_POSITION)):
        raise ConfigurationError(
            f"{where}: since={since!r}: give 'start', 'now', or a position of the log, from 0 to {MAX_POSITION}"
        )
    if not isinstance(retry, Retry):
        raise ConfigurationError(f"{where}: retry={retry!r}: give tidings.Retry(...), as in retry=Retry(attempts=3)")
    if type(replay) is not bool:
        raise ConfigurationError(f"{where}: replay={replay!r}: give True or False")
    for event in events:
        if not (isinstance(event, type) and issubclass(event, Event)) or not wire_name(event):
            raise ConfigurationError(f"{where}: {event!r} is not a subclass of tidings.Event")
    if not _is_number(timeout) or not timeout > 0:
        raise ConfigurationError(f"{where}: timeout={timeout!r}: it must be positive, a number of seconds")
    if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
        raise ConfigurationError(f"{where}: it contains a yield, so that calling it would run nothing; remove it")
    try:
        hints = get_type_hints(body)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise ConfigurationError(
            f"{where}: an annotation cannot be resolved ({error}); import what it names outside 'if TYPE_CHECKING'"
        ) from error
    parameters = tuple(_parameters(where, function, events, hints))
    # A plain wrapper around an async function returns its coroutine, which is awaited all the same.
    threaded = not inspect.iscoroutinefunction(inspect.unwrap(body))
    wanted = {want for _, want in parameters}
    transactional = not wanted.isdisjoint((Inject.SESSION, Inject.CONNECTION))
    if threaded and transactional:
        raise ConfigurationError(f"{where}: a plain function runs in a thread and cannot use a session; make it async")
    if every and Inject.RECORDED not in wanted:
        raise ConfigurationError(f"{where}: no parameter is annotated with RecordedEvent, as on_any hands them over")
    if not every and Inject.EVENT not in wanted:
        raise ConfigurationError(f"{where}: no parameter is annotated with {' | '.join(e.__name__ for e in events)}")
    return Handler(name, function, events, parameters, retry, timeout, threaded, transactional, replay, was, since)


def _body(function: Any) -> Callable[..., Any]:
    """What runs when the handler is called: of an object with `__call__` that method, of a `partial` its function."""
    if isinstance(function, partial):
        return _body(function.func)
    if isinstance(function, type):
        raise ConfigurationError(
            f"a handler is called with the event, but {function.__qualname__} is a class: give an instance of it"
        )
    if not callable(function):
        raise ConfigurationError(f"{function!r} is no handler: give a function, or an object with an async __call__")
    return function if inspect.isroutine(function) else type(function).__call__


def _check_former(where: str, name: str, was: tuple[str, ...]) -> None:
    if not isinstance(was, tuple) or not all(isinstance(former, str) and former for former in was):
        raise ConfigurationError(f"{where}: was={was!r} is no tuple of names: write was=('former_name',)")
    if name in was or len(set(was)) < len(was):
        raise ConfigurationError(f"{where}: was={was!r} holds a name twice, or the handler's present name; remove it")


def _parameters(
    where: str, function: Callable[..., Any], events: tuple[type[Event], ...], hints: dict[str, Any]
) -> list[tuple[str, Inject | type]]:
    found: list[tuple[str, Inject | type]] = []
    bound = function.keywords if isinstance(function, partial) else {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name in bound:
            continue
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigurationError(f"{where}: parameter {parameter.name!r} must be an ordinary, annotated one")
        hint = hints.get(parameter.name)
        if hint is None:
            raise ConfigurationError(f"{where}: parameter {parameter.name!r} has no annotation to inject by")
        found.append((parameter.name, _injected(where, parameter.name, hint, events)))
    return found


def _injected(where: str, parameter: str, hint: Any, events: tuple[type[Event], ...]) -> Inject | type:
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if all(isinstance(choice, type) and issubclass(choice, Event) for choice in choices):
        if not events:
            raise ConfigurationError(f"{where}: parameter {parameter!r}: on_any hands over RecordedEvent, not {hint}")
        strangers = [event.__name__ for event in events if not issubclass(event, choices)]
        if strangers:
            raise ConfigurationError(f"{where}: parameter {parameter!r} does not accept {', '.join(strangers)}")
        return Inject.EVENT
    if hint is Context:
        return Inject.CONTEXT
    if hint is RecordedEvent:
        return Inject.RECORDED
    if isinstance(hint, type) and hint is not Any:
        if hint.__module__.startswith("sqlalchemy.ext.asyncio") and hint.__name__ in _SQLALCHEMY:
            return _SQLALCHEMY[hint.__name__]
        if hint.__module__.startswith("sqlalchemy.orm"):
            raise ConfigurationError(
                f"{where}: parameter {parameter!r}: handlers get an AsyncSession, no {hint.__name__}"
            )
        if hint.__module__ == "builtins":
            raise ConfigurationError(
                f"{where}: parameter {parameter!r}: nothing of type {hint.__name__} can be injected"
            )
        return hint
    raise ConfigurationError(f"{where}: parameter {parameter!r}: {hint!r} is nothing that can be injected")
