"""How far apart the looks through all held events are."""

from __future__ import annotations

import pytest

from tidings._support.timers import Timers
from tidings.delivery.due import LONGEST, MANY, Due
from tidings.delivery.keys import Keys


@pytest.mark.parametrize(
    ("lines", "rows_of_each", "pauses"),
    [(0, 0, 1.0), (MANY, 1, 1.0), (3 * MANY, 1, 3.0), (1, 3 * MANY, 3.0), (1, 100 * MANY, LONGEST)],
)
def test_looks_through_all_held_events_are_further_apart_the_more_are_held(
    lines: int, rows_of_each: int, pauses: float
) -> None:
    keys = Keys()
    due = Due(keys, Timers())
    keys.read({3: {(f"key-{line}", ""): rows_of_each for line in range(lines)}}, ())
    assert due.pauses == pauses
    keys.read({}, ())
    assert due.pauses == 1.0
