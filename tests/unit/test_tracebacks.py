"""The first failure of each kind is logged with its traceback, the next ones in one line, later on one more."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidings._support.tracebacks import AGAIN_SECONDS, KINDS, Kind, Tracebacks


def kind(number: int) -> Kind:
    return Kind("handle", "ValueError", f"app.py:{number}")


@given(st.lists(st.tuples(st.integers(0, 3), st.floats(0, AGAIN_SECONDS)), max_size=60))
def test_each_kind_is_shown_first_and_then_once_per_period(failures: list[tuple[int, float]]) -> None:
    now = 0.0
    tracebacks = Tracebacks(lambda: now)
    shown: dict[int, float] = {}
    untold = dict.fromkeys(range(4), 0)
    for number, pause in failures:
        now += pause
        due = number not in shown or now - shown[number] >= AGAIN_SECONDS
        told = tracebacks.due(kind(number))
        assert told == (untold[number] if due else None)
        untold[number] = 0 if due else untold[number] + 1
        if due:
            shown[number] = now


def test_what_differs_in_handler_error_or_place_is_another_kind() -> None:
    tracebacks = Tracebacks(lambda: 0.0)
    kinds = (Kind("a", "ValueError", "x:1"), Kind("b", "ValueError", "x:1"), Kind("a", "KeyError", "x:1"))
    for one in (*kinds, Kind("a", "ValueError", "x:2")):
        assert tracebacks.due(one) == 0
        assert tracebacks.due(one) is None


def test_endless_kinds_take_no_endless_memory() -> None:
    tracebacks = Tracebacks(lambda: 0.0)
    for number in range(3 * KINDS):
        assert tracebacks.due(kind(number)) == 0
    assert tracebacks.due(kind(3 * KINDS - 1)) is None, "the newest are remembered"
    assert tracebacks.due(kind(0)) == 0, "the oldest was forgotten"
