"""The breaker opens when everything fails, lets probes through ever more rarely, and closes at the first success."""

from __future__ import annotations

from tidings.breaker import FAILURES, KEYS, PAUSES, Breaker


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def opened() -> tuple[Breaker, Clock]:
    clock = Clock()
    breaker = Breaker(clock)
    answers = [breaker.failed(str(n % KEYS), "down") for n in range(FAILURES)]
    assert answers == [False] * (FAILURES - 1) + [True]
    return breaker, clock


def test_a_few_bad_keys_never_opens_it() -> None:
    breaker = Breaker(Clock())
    assert not any(breaker.failed(str(n % (KEYS - 1)), "bad") for n in range(10 * FAILURES))
    assert breaker.admits()


def test_a_success_among_failures_begins_the_count_anew() -> None:
    breaker = Breaker(Clock())
    for _ in range(5):
        assert not any(breaker.failed(str(n), "bad") for n in range(FAILURES - 1))
        assert not breaker.succeeded(), "it was closed"
    assert breaker.opened_at is None


def test_open_it_admits_one_probe_at_a_time_and_ever_more_rarely() -> None:
    breaker, clock = opened()
    pause, longest = PAUSES
    for _ in range(8):
        assert not breaker.admits()
        clock.now += pause - 0.1
        assert not breaker.admits()
        clock.now += 0.1
        assert breaker.admits()
        assert not breaker.admits(), "one at a time"
        assert not breaker.failed("1", "still down"), "it was open already"
        pause = min(2 * pause, longest)
    assert pause == longest
    assert breaker.reason == "still down"


def test_a_probe_that_was_no_attempt_makes_room_for_another() -> None:
    breaker, clock = opened()
    clock.now += PAUSES[0]
    assert breaker.admits()
    breaker.passed_by()
    assert breaker.admits()


def test_the_first_success_closes_it_and_forgets_everything() -> None:
    breaker, clock = opened()
    clock.now += PAUSES[0]
    assert breaker.admits()
    assert breaker.succeeded()
    assert breaker.admits()
    assert breaker.admits()
    assert not any(breaker.failed(str(n), "bad") for n in range(FAILURES - 1))
