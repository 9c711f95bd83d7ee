"""Which events of a key run and which wait, against a model that knows the database, the lane and the uncommitted."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from tidings.database.event_rows import key_of
from tidings.database.held_events import HeldEvent, Line
from tidings.delivery import outcomes
from tidings.delivery.failure import Failure
from tidings.delivery.inflight import InFlight, Role
from tidings.delivery.keys import Keys
from tidings.modelling.handlers import Handler, Hold, Retry
from tidings.stores import RecordedEvent

A = ("a", "")


def event(position: int, key: str) -> RecordedEvent:
    return RecordedEvent(position, key, position, "Happened", b"{}", b"{}", True, UUID(int=position).bytes, 0)


def handler(hold_key: bool, line: str = "", name: str = "handle") -> Handler:
    retry = Retry(attempts=1, hold=Hold(attempts=10), hold_key=hold_key)
    return Handler(name, lambda: None, (), (), retry, 1.0, threaded=True, line=line)


def fresh(position: int, key: str, line: str = "", *, hold_key: bool = True) -> InFlight:
    return InFlight(event(position, key), 0, handler(hold_key, line))


def revived(row: HeldEvent, *, hold_key: bool = True) -> InFlight:
    return InFlight(row.event, 0, handler(hold_key, row.handlers_line), Role.AGAIN, row)


def row(position: int, key: str) -> HeldEvent:
    return HeldEvent(event(position, key), 0, key, "handle", 1, 0, 0.0, "failed", None)


def fail(item: InFlight, *, permanent: bool = False) -> InFlight:
    assert outcomes.fail(item, Failure("ValueError: no", "", permanent), 1, "service") is None
    return item


def test_an_event_that_failed_blocks_its_key_and_no_other() -> None:
    keys = Keys()
    keys.ended(fail(fresh(1, "a")))
    assert keys.must_wait(fresh(2, "a"))
    assert not keys.must_wait(fresh(2, "b"))
    assert not keys.must_wait(fresh(2, "a", "other")), "each line has its own order"


def test_a_key_blocks_in_its_own_bucket_until_nothing_is_left_that_blocks_it() -> None:
    keys = Keys()
    keys.read({0: {A: 1}, 7: {("b", ""): 1}}, ())
    assert not keys.must_wait(fresh(2, "b")), "its bucket is another one"
    assert keys.blocks(row(1, "a"))
    assert not keys.blocks(row(1, "b"))
    keys.ended(revived(row(1, "a")))
    assert keys.blocked == {7: {("b", ""): 1}}


def test_those_behind_a_held_event_that_was_left_alone_wait_until_the_key_is_looked_for_again() -> None:
    """Its handler is paused: later events of the lane must not overtake it."""
    keys = Keys()
    keys.read({0: {A: 2}}, ())
    keys.fly(A)
    keys.fly(A)
    keys.left(row(1, "a"))
    assert not keys.land(A)
    assert keys.must_wait(revived(row(2, "a")))
    assert not keys.must_wait(revived(row(2, "b")))
    assert keys.land(A)
    keys.fly(A)
    assert not keys.must_wait(revived(row(1, "a"))), "it was read again, the oldest first"


def test_a_dead_letter_blocks_its_key_only_when_it_holds_it() -> None:
    for holds in (True, False):
        keys = Keys()
        keys.ended(fail(fresh(1, "a", hold_key=holds), permanent=True))
        assert keys.must_wait(fresh(2, "a")) is holds


def test_a_held_event_that_becomes_a_dead_letter_without_a_hold_lets_those_behind_it_go_on() -> None:
    keys = Keys()
    keys.read({0: {A: 2}}, ())
    keys.fly(A)
    keys.fly(A)
    keys.ended(fail(revived(row(1, "a"), hold_key=False), permanent=True))
    assert not keys.must_wait(revived(row(2, "a")))
    assert keys.must_wait(fresh(3, "a")), "the second is held still"


def test_a_key_whose_flight_met_a_failure_flies_again_when_all_of_it_has_landed() -> None:
    keys = Keys()
    keys.read({0: {A: 2}}, ())
    keys.fly(A)
    keys.fly(A)
    keys.ended(fail(revived(row(1, "a"))))
    assert keys.must_wait(revived(row(2, "a")))
    assert not keys.land(A)
    assert keys.flying == {A}
    assert keys.must_wait(revived(row(2, "a"))), "the first is not committed yet"
    assert keys.land(A)
    assert keys.flying == frozenset()
    assert not keys.must_wait(revived(row(2, "a")))


def test_what_an_operator_took_away_is_known_with_the_next_reading() -> None:
    keys = Keys()
    keys.read({0: {A: 1}}, ())
    assert keys.must_wait(fresh(2, "a"))
    keys.read({}, ())
    assert not keys.must_wait(fresh(2, "a"))


@given(st.lists(st.text(st.sampled_from("a\0\\x0"), min_size=1, max_size=6) | st.text("é", min_size=490), unique=True))
def test_no_two_keys_are_one_text_in_the_rows_and_a_plain_one_is_itself(keys: list[str]) -> None:
    texts = [key_of(event(1, key)) for key in keys]
    assert len(set(texts)) == len(keys)
    for key, text in zip(keys, texts, strict=True):
        assert (text == key) is ("\0" not in key and len(key.encode()) <= 1000)
        assert "\0" not in text


@dataclass
class Database:
    """What is committed: held events and blocking dead letters by line, and events that are done."""

    held: dict[Line, list[HeldEvent]] = field(default_factory=dict)
    graves: dict[Line, int] = field(default_factory=dict)

    def blocked(self) -> dict[int, dict[Line, int]]:
        numbers = {line: len(rows) + self.graves.get(line, 0) for line, rows in self.held.items()}
        blocked = {line: number for line, number in (self.graves | numbers).items() if number}
        return {0: blocked} if blocked else {}

    def write(self, item: InFlight) -> None:
        rows = self.held.setdefault(item.line, [])
        if item.held is not None:
            rows.remove(item.held)
        if item.postponed is not None:
            rows.append(item.postponed)
            rows.sort(key=lambda each: each.event.position)
        elif item.letter is not None and item.letter.holds_key:
            self.graves[item.line] = self.graves.get(item.line, 0) + 1


@dataclass
class World:
    """One bucket: its lane, the next commit, and what the service believes about its keys."""

    keys: Keys = field(default_factory=Keys)
    database: Database = field(default_factory=Database)
    lane: deque[InFlight] = field(default_factory=deque)
    batch: list[InFlight] = field(default_factory=list)
    ran: list[tuple[Line, int]] = field(default_factory=list)
    gone: set[int] = field(default_factory=set)
    """Dead events: later ones may run although these have not run."""
    appended: int = 0

    def append(self, line: Line) -> None:
        self.appended += 1
        self.lane.append(fresh(self.appended, *line))

    def look(self) -> None:
        before = self.keys.flying
        for line, rows in self.database.held.items():
            if line not in before and not self.database.graves.get(line):
                for each in rows:
                    self.keys.fly(line)
                    self.lane.append(revived(each))

    def step(self, outcome: str) -> None:
        if not self.lane:
            return
        item = self.lane.popleft()
        if self.keys.must_wait(item):
            if item.held is not None:
                self.keys.land(item.line)
                return
            outcomes.hold(item)
        elif outcome == "succeeds":
            self.ran.append((item.line, item.event.position))
        else:
            fail(item, permanent=outcome == "dies")
            if item.letter is not None:
                self.gone.add(item.event.position)
        self.batch.append(item)
        self.keys.ended(item)

    def commit(self) -> None:
        batch, self.batch = self.batch, []
        for item in batch:
            self.database.write(item)
        for item in batch:
            if item.held is not None:
                self.keys.land(item.line)

    def read(self) -> None:
        self.keys.read(self.database.blocked(), self.batch)

    def drop(self) -> None:
        """Let the operator drop every dead letter."""
        self.database.graves.clear()


LINES = [("a", ""), ("b", ""), ("a", "other")]
ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.sampled_from(LINES)),
    st.tuples(st.just("step"), st.sampled_from(["succeeds", "succeeds", "fails", "dies"])),
    st.tuples(st.sampled_from(["commit", "read", "look", "drop"]), st.just("")),
)


@settings(max_examples=400, deadline=None)
@given(st.lists(ACTIONS, max_size=80))
def test_whatever_fails_each_key_runs_in_order_and_nothing_waits_for_ever(actions: list[tuple[str, Any]]) -> None:
    world = World()
    for name, argument in actions:
        if name == "append":
            world.append(argument)
        elif name == "step":
            world.step(argument)
        else:
            getattr(world, name)()
    rounds = 0
    while world.lane or world.batch or any(world.database.held.values()):
        rounds += 1
        assert rounds < 5, "what is left is run and committed, and what that lets fly is run and committed"
        world.drop()
        world.read()
        while world.lane:
            world.step("succeeds")
        world.commit()
        world.look()
    for line in LINES:
        positions = [position for of, position in world.ran if of == line]
        assert positions == sorted(set(positions)), f"{line}: once, and in order"
    assert {position for _, position in world.ran} | world.gone == set(range(1, world.appended + 1))
    assert world.keys.flying == frozenset()
