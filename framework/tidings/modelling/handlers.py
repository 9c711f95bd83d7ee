"""Handlers as a service knows them: their events, injected parameters and retries. Checked when they are declared."""

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
"""Characters of a handler's name, at most: it is part of keys, whose length PostgreSQL limits."""


FOREVER: Final = 1e9
"""Seconds (about 30 years) that no pause may exceed. Also the limit of the factor between pauses."""
JITTER: Final = 0.25
"""Share of a pause by which it is shortened at random, so that events that failed together do not retry together."""


def _check_times(policy: Retry | Hold) -> None:
    """Raise `ConfigurationError` for values that would crash or block the service at the first failure."""
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
    """What happens after the quick retries: the event is held, and only later events of its partition key wait for it.

    It is tried `attempts` more times, the n-th time `delay * factor**(n-1)` seconds after the previous failure, but
    after `maximum` seconds at most. Each pause is shortened by up to a quarter at random. Then the event is dead.
    """

    attempts: int = 8
    delay: float = 5.0
    factor: float = 2.0
    maximum: float = 600.0

    def __post_init__(self) -> None:
        _check_times(self)

    def wait(self, attempt: int, random: Callable[[], float] = random.random) -> float:
        """Return the seconds until held attempt number `attempt` (from 1)."""
        return nth_pause(attempt, self.delay, self.maximum, factor=self.factor, jitter=JITTER, random=random)


@dataclass(frozen=True, slots=True)
class Retry:
    """What to do when a handler fails. First come quick retries, for which later events of the same bucket wait.

    `attempts` includes the first one. Before attempt n+1 the lane waits `delay * factor**(n-1)` seconds, but `maximum`
    seconds at most. Each pause is shortened by up to a quarter at random. Exceptions listed in `permanent` skip
    further attempts: the event is dead at once. After the quick attempts, `hold` says how the event is held; with None
    it is dead at once. While an event is dead, later events of its partition key wait until an operator retries or
    drops it; with `hold_key=False` they go on, which gives up their order.
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
        """Return the seconds to wait after failed attempt number `attempt` (from 1)."""
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
    """One decorated function. `name` is part of the ids of its emitted events: keep it when the function is renamed, or
    list the former names in `was`."""

    name: str
    function: Callable[..., Awaitable[None] | None]
    events: tuple[type[Event], ...]
    parameters: tuple[tuple[str, Inject | type], ...]
    """Pairs of parameter name and what is injected. A type stands for a resource of the service's lifespan."""
    retry: Retry
    timeout: float
    """Seconds that an attempt may take."""
    threaded: bool
    """Whether it is a plain function, which runs in a thread."""
    transactional: bool = False
    """Whether it writes to the service's database, inside the transaction that moves the watermark."""
    replay: bool = True
    """Whether a replay runs it again. False is for effects outside the service's database."""
    was: tuple[str, ...] = ()
    """Its former names, oldest first. Events emitted under any of them are not emitted again."""
    since: Since = None
    """Where it begins if it is added to a service that has settled events before."""
    line: str = ""
    """Name of its own line, in which later events of a key wait for those that it holds."""
    first_of: frozenset[str] = frozenset()
    """Wire names of the events for which it is the first handler."""

    @property
    def names(self) -> frozenset[str]:
        """Its present and former names."""
        return frozenset((self.name, *self.was))

    def line_of(self, kind: str) -> str:
        """Return the line in which events of this wire name wait for each other: its own, or "", which the first
        handlers of all events share."""
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
    """Make a handler of a function, from its signature. Raises `ConfigurationError`, which names handler and parameter.

    With `every`, the handler takes every event of the log, declared or not, as a `RecordedEvent`.
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
    _check_options(where, since, retry, replay, timeout)
    for event in events:
        if not (isinstance(event, type) and issubclass(event, Event)) or not wire_name(event):
            raise ConfigurationError(f"{where}: {event!r} is not a subclass of tidings.Event")
    if inspect.isgeneratorfunction(body) or inspect.isasyncgenfunction(body):
        raise ConfigurationError(f"{where}: it contains a yield, so that calling it would run nothing; remove it")
    try:
        hints = get_type_hints(body)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        raise ConfigurationError(
            f"{where}: an annotation cannot be resolved ({error}); import what it names outside 'if TYPE_CHECKING'"
        ) from error
    parameters = tuple(_parameters(where, function, events, hints))
    # A plain wrapper around an async function returns its coroutine, which is awaited, too.
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


def _check_options(where: str, since: object, retry: object, replay: object, timeout: object) -> None:
    if not (since in (None, "start", "now") or (type(since) is int and 0 <= since <= MAX_POSITION)):
        raise ConfigurationError(
            f"{where}: since={since!r}: give 'start', 'now', or a position of the log, from 0 to {MAX_POSITION}"
        )
    if not isinstance(retry, Retry):
        raise ConfigurationError(f"{where}: retry={retry!r}: give tidings.Retry(...), as in retry=Retry(attempts=3)")
    if type(replay) is not bool:
        raise ConfigurationError(f"{where}: replay={replay!r}: give True or False")
    if not _is_number(timeout) or not timeout > 0:
        raise ConfigurationError(f"{where}: timeout={timeout!r}: it must be positive, a number of seconds")


def _body(function: Any) -> Callable[..., Any]:
    """Return what a call of the handler runs: an object's method `__call__`, a `partial`'s function."""
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
