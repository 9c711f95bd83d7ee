"""The past of handlers that are behind: what is read, given and said to be done, with the log and the lanes by hand."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

from tidings.delivery.catchup import CatchUp
from tidings.delivery.inflight import Step
from tidings.delivery.log_reader import PROGRESS_SECONDS
from tidings.modelling.handlers import Handler, Retry
from tidings.modelling.roster import BEHIND, Roster, Span
from tidings.protocol.position import BUCKETS, Accepted
from tidings.stores import RecordedEvent

HEAD = 6
LATE = Handler("late", lambda: None, (), (), Retry(), 1.0, threaded=True)


def behind(after: int) -> list[Span]:
    return [Span(bucket, "late", BEHIND, after, -1) for bucket in range(BUCKETS)]


class Lanes:
    """What admission is told, and what it says of taking over."""

    full = False

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.breakers: Any = SimpleNamespace(open={})
        self.given: list[int] = []
        self.caught: list[int] = []

    def knows_newer_than(self, generation: int) -> bool:
        return True

    def submit_late(self, event: RecordedEvent, *rest: Any) -> None:
        self.given.append(event.position)

    def settle(self, step: Step) -> None:
        self.caught.append(step.caught)

    def end_span(self, span: Span) -> None: ...


class Log:
    """A store that calls `at` before it yields the event at a position."""

    def __init__(self, at: dict[int, Any]) -> None:
        self._at = at

    async def head(self) -> int:
        return HEAD

    async def read_all(self, *, after: int, **rest: Any) -> AsyncIterator[RecordedEvent]:
        for position in range(after + 1, HEAD + 1):
            for do in self._at.get(position, ()):
                do()
            yield RecordedEvent(position, f"s-{position}", 0, "T", b"{}", b"{}", True, bytes(16), 1)


def catching_up(store: Any, lanes: Any, clock: Callable[[], float] = time.monotonic) -> CatchUp:
    site: Any = SimpleNamespace(service=SimpleNamespace(name="s"), store=store, clock=clock)
    return CatchUp(site, Accepted(range(BUCKETS), 100, {}), lanes, lanes, lanes.roster, lanes.breakers)


async def test_what_a_paused_handler_has_not_come_to_stays_in_the_log_but_for_one_event_to_try() -> None:
    roster = Roster(lambda kind: (LATE,), {})
    roster.read({}, behind(-1))
    lanes: Any = Lanes(roster)
    store: Any = Log({3: [lambda: lanes.breakers.open.update(late=None)]})
    catching = catching_up(store, lanes)
    catching._generation = roster.generation
    reached = await catching._read(-1, HEAD)
    assert (lanes.given, reached) == ([0, 1, 2], 2)
    reached = await catching._read(reached, HEAD)
    assert (lanes.given, reached) == ([0, 1, 2, 3], 3), "one more, for a trial"
    lanes.breakers.open.clear()
    assert await catching._read(reached, HEAD) == HEAD
    assert lanes.given == [0, 1, 2, 3, 4, 5, 6]


async def test_a_handler_that_is_not_paused_catches_up_beside_one_that_is() -> None:
    roster = Roster(lambda kind: (LATE,), {})
    roster.read({}, [*behind(-1), Span(0, "other", BEHIND, -1, -1)])
    lanes: Any = Lanes(roster)
    lanes.breakers.open["late"] = None
    catching = catching_up(Log({}), lanes)
    catching._generation = roster.generation
    assert await catching._read(-1, HEAD) == HEAD
    assert lanes.given == [0, 1, 2, 3, 4, 5, 6]


async def catch_up(*at: tuple[int, Any]) -> tuple[list[int], list[int]]:
    """Read once. Every event takes long enough for its progress to be noted."""
    roster, seconds = Roster(lambda kind: (LATE,), {}), [0.0]
    roster.read({}, behind(-1))

    def take_time() -> None:
        seconds[0] += PROGRESS_SECONDS

    doing: dict[int, list[Any]] = {position: [take_time] for position in range(HEAD + 1)}
    for position, do in at:
        doing[position].append(partial(do, roster))
    lanes = Lanes(roster)
    store: Any = Log(doing)
    catching = catching_up(store, lanes, clock=lambda: seconds[0])
    catching._generation = roster.generation
    reached = await catching._read(-1, HEAD)
    assert (reached == HEAD) is (not catching._is_stale)
    return lanes.given, lanes.caught


async def test_everything_is_given_and_said_to_be_done_in_order() -> None:
    assert await catch_up() == ([0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6])


async def test_nothing_is_said_to_be_done_once_another_process_may_have_been_at_work() -> None:
    assert await catch_up((3, lambda roster: roster.renew({}))) == ([0, 1, 2], [0, 1, 2])


async def test_nothing_is_given_or_said_to_be_done_of_spans_that_were_read_anew() -> None:
    assert await catch_up((3, lambda roster: roster.read({}, behind(1)))) == ([0, 1, 2], [0, 1, 2])
