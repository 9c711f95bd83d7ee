"""What an aggregate decides, and the checks that a test makes of it. Pure: no store, no event loop."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar
from uuid import uuid4

from tidings.errors import ConfigurationError
from tidings.modelling.aggregate import Aggregate, apply, begin, declared, state_of, stream_of
from tidings.modelling.codec import decode, encode
from tidings.modelling.events import Event, wire_name
from tidings.testing.scenario.context import recorded
from tidings.testing.scenario.differences import Item, events_differ
from tidings.testing.scenario.finding import named
from tidings.testing.scenario.stating import Raw
from tidings.testing.scenario.unchecked import checked, unchecked

__all__ = ["Decided", "check_raised", "loaded"]

A = TypeVar("A", bound=Aggregate)
P = ParamSpec("P")


def loaded(kind: type[A], id: str, events: Sequence[Event | Raw]) -> A:
    """Return an aggregate with these events as its stream: each is written, read back and applied, and the version
    advances with it."""
    aggregate: A = begin(kind, id)
    views = {wire_name(event): event for event in declared(kind).evolutions}
    for version, event in enumerate(events):
        row = recorded(event, stream=stream_of(kind, id), version=version, position=version + 1)  # type: ignore[arg-type]
        view = views.get(row.type)
        if view is None:
            raise ConfigurationError(
                f"given({row.type}): {kind.__qualname__} has no @evolves method for it, so it cannot be in its stream"
            )
        apply(aggregate, decode(row, view, reader=f"aggregate {kind.__qualname__}"))
        state_of(aggregate).version = version
    return aggregate


class Decided(Generic[A]):
    """What came of decisions. Compare it with `then`, `nothing` or `raises`, or look at it; the pytest plugin fails a
    test that does neither."""

    def __init__(self, aggregate: A) -> None:
        self._aggregate = aggregate
        self._error: Exception | None = None
        self._result: Any = None
        self._what = ""
        self._number = 0

    def when(self, decide: Callable[Concatenate[A, P], Any], *args: P.args, **kwargs: P.kwargs) -> Decided[A]:
        """Make another decision, after the last one. `then` compares the events of all of them."""
        self._pass_on()
        self._what = named(decide)
        try:
            self._result = decide(self._aggregate, *args, **kwargs)
        except Exception as error:
            self._error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
        else:
            for event in state_of(self._aggregate).recorded:
                encode(event, id=uuid4())  # raises what appending it would raise
        self._number = unchecked(
            f"nothing was compared with what {self._what} recorded: add .then(...), .nothing() or .raises(...)"
        )
        return self

    # ---- checks ------------------------------------------------------------------------

    def then(self, *events: Event) -> Self:
        """Compare the recorded events with these: all of them, in order, field by field. If the decision raised, its
        exception passes through."""
        __tracebackhide__ = True
        if self._error is not None:
            names = ", ".join(type(event).__name__ for event in events) or "no event"
            self._error.add_note(f"{self._what} raised this in a test that expects it to record {names}")
        expected, found = ([Item(None, event) for event in some] for some in (events, self.events))
        if text := events_differ(expected, found, f"{self._what} recorded"):
            raise AssertionError(text)
        return self

    def nothing(self) -> Self:
        """Compare: it neither recorded an event nor raised."""
        __tracebackhide__ = True
        return self.then()

    def raises(self, error: type[Exception] | tuple[type[Exception], ...], *, match: str | None = None) -> Self:
        """Compare: the last decision raised this exception, and `match`, a regular expression, is found in its text.
        Another exception passes through."""
        __tracebackhide__ = True
        recorded = ", ".join(map(repr, state_of(self._aggregate).recorded)) or "nothing"
        check_raised(self.error, error, match, f"{self._what} raised nothing, and recorded {recorded}")
        return self

    def returns(self, value: object) -> Self:
        """Compare the result of the last decision with `==`. If it raised, its exception passes through."""
        __tracebackhide__ = True
        if self.result != value:
            raise AssertionError(f"{self._what} returned {self.result!r}, and {value!r} was expected")
        return self

    # ---- looking: what the last decision raised passes through, but for `error` ------------

    @property
    def events(self) -> tuple[Event, ...]:
        """The recorded events, oldest first."""
        __tracebackhide__ = True
        self._pass_on()
        return tuple(state_of(self._aggregate).recorded)

    @property
    def aggregate(self) -> A:
        """The aggregate after the decisions."""
        __tracebackhide__ = True
        self._pass_on()
        return self._aggregate

    @property
    def result(self) -> Any:
        """What the last decision returned."""
        __tracebackhide__ = True
        self._pass_on()
        return self._result

    @property
    def error(self) -> Exception | None:
        """What the last decision raised."""
        checked(self._number)
        return self._error

    def _pass_on(self) -> None:
        __tracebackhide__ = True
        checked(self._number)
        if self._error is not None:
            raise self._error


def check_raised(
    raised: BaseException | None,
    expected: type[Exception] | tuple[type[Exception], ...],
    match: str | None,
    otherwise: str,
) -> None:
    """Raise `AssertionError` unless the expected error was raised. Another one passes through."""
    __tracebackhide__ = True
    kinds = expected if isinstance(expected, tuple) else (expected,)
    names = " or ".join(kind.__name__ for kind in kinds)
    if raised is None:
        raise AssertionError(f"{otherwise}; {names} was expected")
    if not isinstance(raised, kinds):
        raised.add_note(f"{names} was expected instead")
        raise raised
    if match is not None and not re.search(match, str(raised)):
        raise AssertionError(f"{type(raised).__name__} says {str(raised)!r}, and not {match!r}") from raised
