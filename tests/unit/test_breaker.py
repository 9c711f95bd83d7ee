"""A handler's breaker opens when it always fails, wants trials ever more rarely, and closes at the first success."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from tidings.delivery.breaker import FAILURES, KEYS, PAUSES, Breaker, Breakers


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


def test_a_few_bad_keys_never_open_it() -> None:
    breaker = Breaker(Clock())
    assert not any(breaker.failed(str(n % (KEYS - 1)), "bad") for n in range(10 * FAILURES))
    assert not breaker.open


def test_a_success_among_failures_begins_the_count_anew() -> None:
    breaker = Breaker(Clock())
    for _ in range(5):
        assert not any(breaker.failed(str(n), "bad") for n in range(FAILURES - 1))
        assert not breaker.succeeded(), "it was closed"
    assert not breaker.open


def test_open_it_wants_one_trial_at_a_time_and_ever_more_rarely() -> None:
    breaker, clock = opened()
    pause, longest = PAUSES
    for nth in range(8):
        assert breaker.takes_newest == (nth % 2 == 0), "the newest key and the one that is due longest take turns"
        assert not breaker.wants_trial
        clock.now += pause - 0.1
        assert not breaker.wants_trial
        clock.now += 0.1
        assert breaker.wants_trial
        breaker.begin_trial()
        assert not breaker.wants_trial, "one at a time"
        assert not breaker.failed("1", "still down", trial=True), "it was open already"
        pause = min(2 * pause, longest)
    assert pause == longest
    assert breaker.reason == "still down"


def test_an_attempt_that_began_before_it_opened_puts_no_trial_off() -> None:
    breaker, clock = opened()
    clock.now += PAUSES[0]
    breaker.begin_trial()
    assert not breaker.failed("late", "down")
    assert breaker.trying, "the trial is still under way"
    assert breaker.wait == 0


def test_a_trial_that_was_no_attempt_makes_room_for_another() -> None:
    breaker, clock = opened()
    clock.now += PAUSES[0]
    breaker.begin_trial()
    breaker.end_trial()
    assert breaker.wants_trial


def test_the_first_success_closes_it_and_forgets_everything() -> None:
    breaker, clock = opened()
    clock.now += PAUSES[0]
    breaker.begin_trial()
    assert breaker.succeeded()
    assert not breaker.open
    assert not any(breaker.failed(str(n), "bad") for n in range(FAILURES - 1))


@given(
    st.lists(st.tuples(st.sampled_from(("bad", "good", "moody")), st.integers(0, 9), st.booleans()), max_size=200),
)
def test_what_one_handler_does_never_opens_another_ones_breaker(attempts: list[tuple[str, int, bool]]) -> None:
    breakers, alone = Breakers(Clock()), {name: Breaker(Clock()) for name in ("bad", "good", "moody")}
    streak: Counter[str] = Counter()
    for name, key, succeeds in attempts:
        if succeeds or name == "good":
            assert breakers.succeeded(name) == alone[name].succeeded()
            streak[name] = 0
        else:
            assert breakers.failed(name, str(key), "bad") == alone[name].failed(str(key), "bad")
            streak[name] += 1
        assert set(breakers.open) == {name for name, breaker in alone.items() if breaker.open}
        assert all(streak[name] >= FAILURES for name in breakers.open)
