"""Lanes that take back what was finished too early, events that may share a transaction, and deadlocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from tidings._support.timers import Timers
from tidings.delivery.batch import Pending
from tidings.delivery.contention import FIRST_SECONDS, Contention
from tidings.delivery.crashes import Caution
from tidings.delivery.failure_memory import FailureMemory
from tidings.delivery.fitness import Fitness
from tidings.delivery.inflight import InFlight, Role, State
from tidings.delivery.lanes import EventLanes
from tidings.delivery.slow_handlers import SLOW_SECONDS, SlowHandlers
from tidings.modelling.handlers import Handler, Retry
from tidings.stores import RecordedEvent

HANDLER = Handler("handle", lambda: None, (), (), Retry(), 1.0, threaded=False, transactional=True)


def event(position: int, bucket: int = 1, role: Role = Role.PLAIN) -> InFlight:
    recorded = RecordedEvent(position, "s", position, "T", b"{}", b"", True, bytes(16), 0)
    return InFlight(recorded, bucket, HANDLER, role)


class Gate:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.taken: list[InFlight] = []
        self.caution = Caution(time.monotonic)
        self.room = 100

    def shut(self) -> float:
        return 0.0 if len(self.taken) < self.room else 5.0

    def take(self, item: InFlight) -> None:
        self.taken.append(item)

    def take_all(self, items: Sequence[InFlight]) -> None:
        self.taken.extend(items)

    def positions(self) -> list[int]:
        taken, self.taken = self.taken, []
        return [item.event.position for item in taken]


@pytest.fixture
def lanes() -> tuple[EventLanes, Gate]:
    made, gate = EventLanes(Timers()), Gate()
    for item in (event(1), event(2), event(3), event(4), event(10, 7)):
        made.add(item)
    made.open(gate)
    return made, gate


def finish(lanes: EventLanes, item: InFlight) -> None:
    item.to(State.RUNNING)
    item.to(State.DONE)
    lanes.finish(item)


def test_what_was_undone_comes_again_in_its_order_and_before_what_is_behind_it(lanes: tuple[EventLanes, Gate]) -> None:
    made, gate = lanes
    one, other = gate.taken
    finish(made, one)
    two = gate.taken[-1]
    finish(made, two)
    three = gate.taken[-1]
    assert gate.positions() == [1, 10, 2, 3]
    made.undo([one, two], [three], ())
    assert gate.positions() == [1], "three was given out, and waits behind the others again"
    for expected in (2, 3, 4):
        finish(made, one)
        assert gate.positions() == [expected]
        one = {2: two, 3: three}.get(expected, one)
    assert made.under_way == 5 - 1 + 1, "four of this bucket, whose commits nobody has said, and the other one"
    assert other.state is State.TAKEN


async def test_what_rests_behind_an_undone_event_comes_after_it_and_is_given_out_once(
    lanes: tuple[EventLanes, Gate],
) -> None:
    made, gate = lanes
    one, _ = gate.taken
    finish(made, one)
    two = gate.taken[-1]
    two.to(State.RUNNING)
    two.to(State.RESTING)
    made.rest(two, 0.001)
    assert (made.resting, gate.positions()) == (1, [1, 10, 2])
    made.undo([one], [], ())
    assert (made.resting, gate.positions()) == (0, [1])
    await asyncio.sleep(0.01)  # its pause would be over
    assert gate.positions() == []
    finish(made, one)
    assert gate.positions() == [2]


def test_a_parked_bucket_gives_nothing_before_it_is_free_and_holds_up_no_other(lanes: tuple[EventLanes, Gate]) -> None:
    made, gate = lanes
    one, other = gate.taken
    gate.taken.clear()
    made.park(one)
    assert (one.state, made.under_way) == (State.WAITING, 1)
    made.pump()
    finish(made, other)
    assert gate.positions() == []
    made.unpark([1])
    assert gate.positions() == [1]


def test_what_is_ready_waits_for_a_puller_at_work_and_for_no_other(lanes: tuple[EventLanes, Gate]) -> None:
    made, gate = lanes
    one, other = gate.taken
    gate.taken.clear()
    made.puller = puller = SimpleNamespace(led=True)
    finish(made, one)
    finish(made, other)
    assert gate.positions() == []
    made.pump()  # the puller has nothing left
    assert gate.positions() == [2]
    puller.led = False
    made.add(event(11, 7))
    made.flow()
    assert gate.positions() == [11]


async def test_a_careful_gate_is_given_events_one_by_one_until_it_is_shut() -> None:
    timers = Timers()
    made, gate = EventLanes(timers), Gate()
    for item in (event(1), event(10, 7), event(20, 8)):
        made.add(item)
    gate.caution.notes.taken(99, 3)
    gate.room = 2
    made.open(gate)
    timers.close()
    assert gate.positions() == [1, 10]


class Stage:
    def __init__(self) -> None:
        self.why = None
        self.memory, self.pending = FailureMemory(), Pending()
        self.caution, self.progress = SimpleNamespace(alert=False), SimpleNamespace(spans={})
        site = SimpleNamespace(memory=self.memory)
        joined: Any = SimpleNamespace(site=site, caution=self.caution)
        hindrances: Any = SimpleNamespace(of=lambda item: self.why)
        progress: Any = self.progress
        self.fitness = Fitness(joined, hindrances, self.pending, progress)


@pytest.mark.parametrize(
    "against",
    ["nothing", "suspected", "condemned", "crashed", "alert", "spans", "hindered", "replayed"],
)
def test_an_event_of_which_anything_is_suspected_shares_no_transaction(against: str) -> None:
    stage, item = Stage(), event(5)
    marks: dict[str, Any] = {
        "nothing": lambda: None,
        "suspected": lambda: stage.memory.suspected.add(item.turn),
        "condemned": lambda: stage.memory.condemned.update({item.turn: None}),  # type: ignore[dict-item]
        "crashed": lambda: stage.memory.skip([5]),
        "alert": lambda: vars(stage.caution).update(alert=True),
        "spans": lambda: stage.progress.spans.update(late=1),
        "hindered": lambda: vars(stage).update(why="waits behind an earlier event"),
        "replayed": lambda: setattr(item, "replayed", True),
    }
    marks[against]()
    assert stage.fitness.of(item) is (against == "nothing")


@pytest.mark.parametrize("role", Role)
def test_only_new_events_that_move_the_watermark_do(role: Role) -> None:
    assert Stage().fitness.of(event(5, role=role)) is (role in (Role.PLAIN, Role.SHARED))


async def test_after_a_deadlock_one_transaction_is_under_way_at_a_time_for_a_while() -> None:
    now = 100.0
    contention = Contention(lambda: now)

    async def second_waits() -> bool:
        async with contention.room():
            second = asyncio.create_task(contention.room().__aenter__())
            await asyncio.sleep(0)
            waits = not second.done()
        await second
        return waits

    assert not await second_waits()
    contention.notice()
    contention.notice()
    assert await second_waits()
    now += FIRST_SECONDS
    contention = Contention(lambda: now)
    assert not await second_waits()


def test_deadlocks_that_go_on_make_it_longer() -> None:
    now = 100.0
    contention = Contention(lambda: now)
    contention.notice()
    now += FIRST_SECONDS
    assert not contention.noticed_lately
    contention.notice()
    now += FIRST_SECONDS
    assert contention.noticed_lately
    now += FIRST_SECONDS
    assert not contention.noticed_lately
    now += 1000
    contention.notice()
    now += FIRST_SECONDS
    assert not contention.noticed_lately


def test_a_bucket_is_claimed_until_the_commit_that_has_it_is_done() -> None:
    pending, item = Pending(), event(5)
    pending.finish(item)
    pending.parked.add(1)
    assert pending.claims(1)
    pending.take()
    assert pending.claims(1)
    assert pending.freed() == set()
    pending.committed()
    assert not pending.claims(1)
    assert pending.freed() == {1}
    assert pending.freed() == set()


def test_a_handler_is_alone_while_it_is_slow_and_named_once() -> None:
    slow = SlowHandlers("audit")
    with capture_logs() as logs:
        for _ in range(2):
            slow.took("handle", 2 * SLOW_SECONDS)
            assert "handle" in slow
            slow.took("other", SLOW_SECONDS / 2)
            assert "handle" in slow, "another one was quick"
            slow.took("handle", SLOW_SECONDS / 2)
            assert "handle" not in slow
    assert [(entry["event"], entry["handler"]) for entry in logs] == [("handler.holds_writer", "handle")]


def test_the_bucket_of_an_event_that_failed_is_claimed_until_the_commit_that_looks_at_it() -> None:
    """Else its next attempt could be committed by a group, and would look like another process's doing."""
    pending, item = Pending(), event(5)
    pending.doubt(item)
    assert pending.claims(item.bucket)
    assert not pending.claims(item.bucket + 1)
    pending.take()
    assert pending.claims(item.bucket), "its commit is under way"
    pending.committed()
    assert not pending.claims(item.bucket)
