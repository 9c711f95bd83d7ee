"""So many unreadable messages are kept, and no more, until the hour is over."""

from __future__ import annotations

from tidings.delivery.allowance import KEPT, KEPT_BYTES, WINDOW_SECONDS, Allowance


def test_a_number_and_so_many_bytes_are_kept_in_each_window() -> None:
    now = 0.0
    allowance = Allowance(lambda: now)
    for _ in range(2):
        assert [allowance.take(1) for _ in range(KEPT + 2)] == [True] * KEPT + [False] * 2
        now += WINDOW_SECONDS
    assert allowance.take(KEPT_BYTES - 1)
    assert not allowance.take(2)
    assert allowance.take(1)
