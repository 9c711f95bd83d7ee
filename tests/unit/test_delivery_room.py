"""The measures of the room `delivery`: no class that one cannot hold in mind, and one table of an event's states."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import tidings.delivery
from tidings.delivery.inflight import TRANSITIONS, InFlight, State
from tidings.modelling.handlers import Handler, Retry
from tidings.stores import RecordedEvent

ROOM = Path(tidings.delivery.__file__).parent
ATTRIBUTES, METHODS, PARAMETERS, LINES = 12, 15, 6, 450


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for path in sorted(ROOM.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                yield f"{path.stem}.{node.name}", node


CLASSES = dict(classes())


def functions(of: ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in of.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def attributes(of: ast.ClassDef) -> set[str]:
    """Declared in the class's body, or assigned to `self` anywhere in it."""
    found = {
        node.target.id for node in of.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }
    return found | {
        node.attr
        for node in ast.walk(of)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_stays_within_the_measures(name: str) -> None:
    made = CLASSES[name]
    parameters = [
        len(function.args.posonlyargs + function.args.args + function.args.kwonlyargs) - 1
        for function in functions(made)
        if function.name == "__init__"
    ]
    assert len(attributes(made)) <= ATTRIBUTES, sorted(attributes(made))
    assert len(functions(made)) <= METHODS, [function.name for function in functions(made)]
    assert max(parameters, default=0) <= PARAMETERS


@pytest.mark.parametrize("path", sorted(ROOM.glob("*.py")), ids=lambda path: path.name)
def test_a_module_is_one_idea_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LINES


def test_what_is_measured_is_there() -> None:
    assert {"pipeline.Pipeline", "gate.Gate", "commits.Commits", "inflight.InFlight"} <= CLASSES.keys()
    assert "state" in attributes(CLASSES["inflight.InFlight"])


def flying(state: State) -> InFlight:
    handler = Handler("handle", lambda: None, (), (), Retry(), 1.0, threaded=True)
    item = InFlight(RecordedEvent(7, "s", 0, "T", b"{}", b"", True, bytes(16), 0), 1, handler)
    item.state = state
    return item


@pytest.mark.parametrize("before", State)
@pytest.mark.parametrize("after", State)
def test_an_event_in_flight_takes_only_the_ways_of_the_table(before: State, after: State) -> None:
    item = flying(before)
    if after in TRANSITIONS[before]:
        item.to(after)
        assert item.state is after
    else:
        with pytest.raises(
            RuntimeError, match=f"position 7, handler 'handle': from {before.name} to {after.name} is no"
        ):
            item.to(after)
        assert item.state is before


def test_every_state_is_reached_and_two_are_the_end() -> None:
    reached, new = {State.WAITING}, [State.WAITING]
    while new:
        more = TRANSITIONS[new.pop()] - reached
        reached |= more
        new += more
    assert reached == set(State)
    assert {state for state in State if not TRANSITIONS[state]} == {State.LEFT, State.COMMITTED}


def states_set_outside_the_table() -> Iterator[str]:
    for path in sorted(ROOM.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and node.attr == "state":
                yield f"{path.name}:{node.lineno}"


def test_nobody_else_moves_an_event() -> None:
    assert {found.partition(":")[0] for found in states_set_outside_the_table()} == {"inflight.py"}
