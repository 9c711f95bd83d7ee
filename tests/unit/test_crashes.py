"""Who is blamed for the end of a process: nobody without evidence, and the guilty one in the end."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

from hypothesis import given
from hypothesis import strategies as st

from tidings.crashes import Caution, verdicts

if TYPE_CHECKING:
    from tidings.work import Item


def item(position: int) -> Item:
    return cast("Item", SimpleNamespace(event=SimpleNamespace(position=position)))


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_two_unclean_ends_in_a_row_condemn_and_one_only_makes_suspect() -> None:
    condemned, suspected = verdicts({7: 2, 9: 1})
    assert list(condemned) == [7]
    assert "ProcessCrashed: 2 times" in condemned[7].reason
    assert condemned[7].permanent
    assert suspected == {9}


def test_without_an_unclean_end_nothing_is_noted_and_nothing_waits() -> None:
    caution = Caution(Clock())
    assert not caution.on
    assert caution.wait() == 0


def test_the_next_event_begins_when_the_one_before_has_ended_or_has_run_for_a_while() -> None:
    clock = Clock()
    caution = Caution(clock)
    caution.begin({}, 10, blind=True)
    caution.taken(item(1))
    assert caution.note(item(1)) == 1
    assert caution.wait() > 0
    clock.now += 0.06
    assert caution.wait() == 0, "a slow handler does not hold up the others"
    caution.taken(item(2))
    caution.note(item(2))
    assert caution.wait() > 0
    assert caution.ended(2)
    caution.cleared(2)
    assert caution.wait() == 0
    assert not caution.ended(2), "its note was taken back already"


def test_nothing_runs_beside_a_suspect_however_long_it_takes() -> None:
    clock = Clock()
    caution = Caution(clock)
    caution.begin({1: 1, 2: 1}, 10, blind=False)
    caution.taken(item(1))
    assert caution.note(item(1)) == 2
    clock.now += 3600
    assert caution.wait() > 0


def test_who_knows_what_was_under_way_is_careful_with_that_alone() -> None:
    caution = Caution(Clock())
    caution.begin({7: 1}, 10, blind=False)
    assert caution.on
    caution.taken(item(7))
    assert caution.note(item(7)) == 2
    assert caution.ended(7)
    assert not caution.on
    caution.begin({}, 10, blind=False)
    assert not caution.on, "the process ended while nothing was under way"


def test_caution_ends_after_as_many_events_as_could_have_been_at_work() -> None:
    caution = Caution(Clock())
    caution.begin({99: 1, 98: 1}, 3, blind=True)
    for position in range(3):
        assert caution.on
        caution.taken(item(position))
        caution.note(item(position))
    assert not caution.on, "suspects that never come again do not slow the service for ever"
    assert caution.wait() == 0


def lives(events: Iterable[int], guilty: int, slow: frozenset[int], blind: bool) -> tuple[int, list[int]]:
    """Processes over these events; the guilty one ends its process as it begins, slow ones go on until something must
    wait for them. Returns the number of processes that it took, and who was condemned."""
    todo, dead = list(events), list[int]()
    notes, under_way = dict[int, int](), list[int]()

    def end(position: int, caution: Caution) -> None:
        if caution.ended(position):
            caution.cleared(position)
        notes.pop(position, None)
        todo.remove(position)

    for process in range(1, 10):
        clock = Clock()
        caution = Caution(clock)
        if process > 1:
            if not blind:
                notes.update({position: 1 for position in under_way if position not in notes})
            for position in caution.begin(notes, 100, blind=blind):
                dead.append(position)
                end(position, caution)
        under_way.clear()
        for position in list(todo):
            while caution.wait():
                clock.now += 0.05
                if caution.wait():
                    end(under_way.pop(), caution)
            if caution.on:
                caution.taken(item(position))
                notes[position] = caution.note(item(position))
            under_way.append(position)
            if position == guilty:
                break
            if position not in slow:
                end(under_way.pop(), caution)
        else:
            return process, dead
    raise AssertionError("it crashes for ever")


@given(st.integers(1, 12), st.booleans(), st.data())
def test_whatever_runs_beside_it_the_guilty_event_alone_is_condemned_and_soon(
    count: int, blind: bool, data: st.DataObject
) -> None:
    guilty = data.draw(st.integers(0, count - 1))
    slow = data.draw(st.frozensets(st.integers(0, count - 1).filter(lambda position: position != guilty)))
    assert lives(range(count), guilty, slow, blind) == (4 if blind else 3, [guilty])
