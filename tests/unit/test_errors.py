"""The tree of errors: drawn as it is, and each one telling what to do."""

from __future__ import annotations

import inspect
import re
from uuid import UUID

import pytest

from tidings import errors
from tidings.errors import TidingsError

CLASSES = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}


def drawn() -> dict[str, str | None]:
    """Return name to parent, read from the tree in the module's docstring."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        found = re.fullmatch(r"    ((?:[│ ] {3})*(?:[├└]── )?)(\w+)", line)
        if found is not None:
            depth = len(found[1]) // 4
            path[depth:] = [found[2]]
            parents[found[2]] = path[depth - 1] if depth else None
    return parents


def test_the_drawing_is_the_tree() -> None:
    tree = {name: kind.__mro__[1].__name__ for name, kind in CLASSES.items()}
    assert drawn() == tree | {"TidingsError": None}


def test_every_error_is_on_offer_and_documented() -> None:
    assert set(errors.__all__) == set(CLASSES)
    assert all(inspect.getdoc(kind) for kind in CLASSES.values())


@pytest.mark.parametrize("kind", CLASSES.values(), ids=CLASSES)
def test_every_error_is_a_tidings_error(kind: type[Exception]) -> None:
    assert issubclass(kind, TidingsError)


MADE = [
    (errors.WrongExpectedVersion("order-1", "no stream", 4), ["'order-1'", "no stream", "4", "Load the stream again"]),
    (errors.WrongExpectedVersion("order-1", "version 3", -1), ["it has no events"]),
    (errors.StreamNotFound("order-1"), ["'order-1'", "Check its name"]),
    (errors.StreamDeleted("order-1"), ["'order-1'", "another stream"]),
    (errors.StreamDeleted("order-1", tombstoned=False), ["'order-1'", "NO_STREAM"]),
    (errors.EventTooLarge("order-1", 7, 5), ["'order-1'", "7 bytes", "5", "Split"]),
    (
        errors.LogChanged("service 'a'", UUID(int=1), UUID(int=2)),
        ["'a'", str(UUID(int=1)), str(UUID(int=2)), "TIDINGS_STORE"],
    ),
    (errors.LogBehind("service 'a'", UUID(int=1), 5, 9), ["'a'", "5", "9", "Restore"]),
    (errors.Unroutable("tidings.events", "m-1"), ["m-1", "'tidings.events'", "Start a service"]),
    (errors.PublishRejected("m-1", "too large"), ["m-1", "too large"]),
    (errors.HandlerTimeout("reserve", 30.0), ["'reserve'", "30 s", "timeout="]),
    (
        errors.RepetitionDiffers("k-1", "order-1", "Paid", "1f", ["pence"]),
        ["'k-1'", "'order-1'", "Paid", "pence", "key"],
    ),
    (
        errors.DatabaseMoved("/var/a.db", replaced=False),
        ["/var/a.db", "moved or deleted", "Put the file back", "start"],
    ),
    (errors.TransactionMisuse("commit"), ["commit()", "begin_nested"]),
]


@pytest.mark.parametrize(("error", "says"), MADE, ids=lambda value: type(value).__name__)
def test_each_says_to_what_it_happened_and_what_to_do(error: TidingsError, says: list[str]) -> None:
    assert all(part in str(error) for part in says), str(error)
