"""Who is blamed for the end of a process: nobody without evidence, and the guilty one in the end."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tidings.delivery.crashes import ALONE_SECONDS, CRASHES, QUIET_SECONDS, ROOM, Caution, condemned_and_suspected


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def note(caution: Caution, position: int) -> int:
    """Take an event and note it alone. Return the number that is written."""
    caution.notes.taken(position, 1)
    assert position in caution.group([position])
    return caution.note(position)[1]


def test_two_unclean_ends_in_a_row_condemn_and_one_only_makes_suspect() -> None:
    condemned, suspected = condemned_and_suspected({7: 2, 9: 1})
    assert list(condemned) == [7]
    assert "ProcessCrashed: 2 times" in condemned[7].reason
    assert condemned[7].permanent
    assert suspected == {9}


def test_without_an_unclean_end_nothing_is_noted_and_nothing_waits() -> None:
    caution = Caution(Clock())
    assert not caution.alert
    assert not caution.wants(1)
    assert caution.holds() == 0


def test_many_events_are_noted_together_and_no_more_than_there_is_room_for() -> None:
    clock = Clock()
    caution = Caution(clock)
    caution.begin({}, 1000, blind=True)
    for position in range(ROOM):
        assert caution.holds() == 0
        assert caution.wants(position)
        caution.notes.taken(position, 1)
    assert caution.holds() > 0
    assert caution.group(range(ROOM)) == list(range(ROOM))
    assert {caution.note(position) for position in range(ROOM)} == {(1, 1)}
    assert caution.holds() > 0
    assert caution.ended(3)
    caution.notes.cleared(3)
    assert caution.holds() == 0
    assert not caution.ended(3), "its note was taken back already"


def test_nothing_runs_beside_a_suspect_but_one_that_hangs_does_not_stop_the_rest_for_ever() -> None:
    clock = Clock()
    caution = Caution(clock)
    caution.begin({1: 1, 2: 1}, 10, blind=False)
    assert note(caution, 1) == 2
    clock.now += ALONE_SECONDS - 1
    assert caution.holds() > 0
    clock.now += 1
    assert caution.holds() == 0
    assert caution.patience(1) == 0


def test_a_suspect_waits_for_what_began_before_it_and_not_for_ever() -> None:
    clock = Clock()
    caution = Caution(clock)
    caution.begin({1: 1}, 10, blind=True)
    for position in (5, 1):
        caution.notes.taken(position, 1)
    assert caution.group([5, 1]) == [5], "no suspect is noted together with others"
    caution.note(5)
    assert caution.group([1]) == [1]
    assert caution.patience(1) == QUIET_SECONDS
    clock.now += QUIET_SECONDS
    assert caution.patience(1) == 0


def test_who_knows_what_was_under_way_is_careful_with_that_alone() -> None:
    caution = Caution(Clock())
    caution.begin({7: 1}, 10, blind=False)
    assert not caution.wants(8)
    assert caution.wants(7)
    assert note(caution, 7) == 2
    assert caution.ended(7)
    caution.notes.cleared(7)
    assert not caution.alert
    caution.begin({}, 10, blind=False)
    assert not caution.alert, "the process ended while nothing was under way"


def test_caution_ends_after_as_many_events_as_could_have_been_at_work() -> None:
    caution = Caution(Clock())
    caution.begin({99: 1}, 3, blind=True)
    for position in range(3):
        assert caution.wants(position)
        note(caution, position)
    assert not caution.wants(4)
    assert caution.wants(99), "a suspect is one however late it comes"
    for position in range(3):
        caution.ended(position)
        caution.notes.cleared(position)
    assert caution.holds() == 0, "suspects that never come again do not slow the service"


def test_a_queue_that_leaves_and_comes_back_while_a_note_is_written_stops_nothing() -> None:
    clock = Clock()
    caution = Caution(clock)
    caution.begin({}, 2000, blind=True)
    assert note(caution, 10) == 1
    caution.begin({20: 1}, 2000, blind=True)
    assert caution.ended(10), "its note is to be taken back"
    caution.notes.cleared(10)
    assert caution.holds() == 0
    assert caution.suspects == {20}


def test_an_event_that_is_tried_again_waits_until_its_former_note_is_gone() -> None:
    caution = Caution(Clock())
    caution.begin({}, 10, blind=True)
    note(caution, 1)
    assert caution.ended(1)
    caution.notes.taken(1, 1)
    assert caution.group([1]) == [], "the commit that forgets the note would forget the new one too"
    caution.notes.cleared(1)
    assert caution.group([1]) == [1]
    assert caution.note(1) == (1, 1)


def test_who_has_noted_an_event_itself_and_lives_does_not_condemn_it_for_that() -> None:
    """The other process took the first unclean end for a crash, so it counts two, of which only its own may have been
    one."""
    caution = Caution(Clock())
    caution.begin({}, 10, blind=True)
    note(caution, 1)
    assert caution.ended(1)
    caution.notes.cleared(1)
    assert not caution.begin({1: 2}, 10, blind=True)
    assert caution.suspects == {1}
    assert note(caution, 1) == 2
    assert list(Caution(Clock()).begin({1: 2}, 10, blind=True)) == [1], "a new process knows nothing of that"


def test_a_rejoin_proves_nothing_of_suspects_and_has_as_many_others_noted_as_were_cut_off() -> None:
    caution = Caution(Clock())
    caution.begin({1: 1, 2: 1, 3: 1}, 2, blind=True)
    assert (note(caution, 1), note(caution, 3), note(caution, 8)) == (2, 2, 1)
    assert caution.ended(3)
    caution.cut_off()
    assert caution.suspects == {1, 2}, "what had ended is cleared, what was cut off is not"
    assert caution.rejoined({1: 2, 2: 1, 3: 2, 8: 1}) == {1: 1}, "nobody is at work on it any more"
    assert caution.known == {1, 2}
    assert caution.alert
    assert caution.wants(9), "8 was cut off"
    assert note(caution, 9) == 1
    assert not caution.wants(10)
    assert note(caution, 1) == 2


def test_after_a_rejoin_suspects_that_somebody_has_settled_are_forgotten() -> None:
    caution = Caution(Clock())
    caution.begin({1: 1}, 2, blind=False)
    caution.cut_off()
    assert caution.rejoined({}) == {}
    assert not caution.alert


def test_a_suspect_is_cleared_when_each_of_its_handlers_has_survived_it() -> None:
    caution = Caution(Clock())
    caution.begin({1: 1}, 2, blind=False)
    assert note(caution, 1) == 2
    assert caution.ended(1, "a", ["a", "b"])
    assert caution.times(1) == 1, "its note counts what was, until the next handler is at work"
    assert not caution.wants(1, "a")
    assert caution.wants(1, "b")
    caution.notes.taken(1, 1)
    caution.notes.cleared(1)
    assert (caution.group([1]), caution.note(1)) == ([1], (1, 2)), "alone, and noted again"
    assert caution.ended(1, "b", ["a", "b"])
    assert caution.times(1) == 0
    caution.notes.cleared(1)
    assert not caution.alert


def test_a_suspect_that_was_not_run_stays_one() -> None:
    caution = Caution(Clock())
    caution.begin({1: 1}, 2, blind=False)
    assert note(caution, 1) == 2
    assert caution.ended(1, "a", ran=False)
    caution.notes.cleared(1)
    assert caution.suspects == {1}
    assert (caution.times(1), caution.wants(1, "a"), caution.holds()) == (1, True, 0)


class TwoProcesses(RuleBasedStateMachine):
    """A model of two cautions over one table of notes. A queue moves between them at any moment, even while
    transactions that note and forget are under way. No process crashes, so no event is ever condemned, and in the end
    no note is left and nothing waits."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.table: dict[int, int] = {}
        self.cautions = [Caution(self.clock), Caution(self.clock)]
        self.waiting: list[list[int]] = [[], []]
        self.noted: list[set[int]] = [set(), set()]
        self.leaving: list[list[int]] = [[], []]
        self.active = 0
        self.done = set[int]()
        self.next = 0

    @property
    def caution(self) -> Caution:
        return self.cautions[self.active]

    @rule(blind=st.booleans())
    def take_over(self, blind: bool) -> None:
        self.active = 1 - self.active
        self.finish_read(self.start_read(), blind)

    @rule(blind=st.booleans())
    def take_over_slowly(self, blind: bool) -> None:
        """Commits end between reading the notes and knowing them."""
        self.active = 1 - self.active
        read = self.start_read()
        self.commit(self.active)
        self.finish_read(read, blind)

    def start_read(self) -> tuple[frozenset[int], dict[int, int]]:
        besides = self.caution.notes.own
        for position in self.done & self.table.keys():
            del self.table[position]
        for position, (_, times) in self.caution.notes.noted.items():
            if position not in self.done:
                self.table.setdefault(position, times)
        return besides, dict(self.table)

    def finish_read(self, read: tuple[frozenset[int], dict[int, int]], blind: bool) -> None:
        assert not self.caution.begin(read[1], 10, blind=blind, besides=read[0])

    @rule(who=st.integers(0, 1))
    def take(self, who: int) -> None:
        """Let one side take an event: a new one, or one that the other has, too."""
        caution = self.cautions[who]
        if caution.holds():
            return
        mine = set(self.waiting[who]) | self.noted[who]
        shared = sorted((set(range(self.next)) - mine) - self.done)
        position = shared[0] if shared else self.next
        self.next = max(self.next, position + 1)
        if caution.wants(position):
            caution.notes.taken(position, 1)
            self.waiting[who].append(position)
        else:
            self.noted[who].add(position)

    @rule()
    def note(self) -> None:
        """Begin to write notes. Only the process at work can: the database makes sure of that."""
        group = self.caution.group(self.waiting[self.active])
        for position in group:
            self.waiting[self.active].remove(position)
            self.table[position] = self.caution.note(position)[1]
            assert self.table[position] < CRASHES + 1
            self.noted[self.active].add(position)

    @rule(who=st.integers(0, 1), again=st.booleans())
    def end(self, who: int, again: bool) -> None:
        if self.noted[who]:
            position = min(self.noted[who])
            self.noted[who].remove(position)
            if self.cautions[who].ended(position):
                self.leaving[who].append(position)
            if again and self.cautions[who].wants(position) and position not in self.done:
                self.cautions[who].notes.taken(position, 1)
                self.waiting[who].append(position)
            else:
                self.done.add(position)

    @rule(who=st.integers(0, 1))
    def commit(self, who: int) -> None:
        for position in self.leaving[who]:
            self.table.pop(position, None)
            self.cautions[who].notes.cleared(position)
        self.leaving[who].clear()

    @precondition(lambda self: self.next)
    @rule()
    def wait(self) -> None:
        self.clock.now += 0.05

    @invariant()
    def what_is_at_work_is_noted(self) -> None:
        for position, (_, times) in self.caution.notes.noted.items():
            if position not in self.done:
                assert times >= 1

    def teardown(self) -> None:
        for _ in range(6 * self.next + 20):
            self.clock.now += 0.05
            for who in (0, 1):
                self.active = who
                self.note()
                self.end(who, False)
                self.commit(who)
        assert self.waiting == [[], []], "everybody gets on"
        assert [caution.holds() for caution in self.cautions] == [0, 0]
        assert not [caution.notes.own for caution in self.cautions if caution.notes.own]
        assert not self.table.keys() & self.done, "a note outlives its event"


TestTwoProcesses = TwoProcesses.TestCase
TestTwoProcesses.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)


def lives(events: Iterable[int], guilty: int, slow: frozenset[int], blind: bool) -> tuple[int, list[int]]:
    """Run processes over these events. The guilty event ends its process when it begins; slow ones go on until
    something must wait for them. Return the number of processes, and the condemned events."""
    todo, dead = list(events), list[int]()
    table, under_way = dict[int, int](), list[int]()

    def end(position: int, caution: Caution) -> None:
        if caution.ended(position):
            caution.notes.cleared(position)
            table.pop(position, None)
        todo.remove(position)

    for process in range(1, 10):
        clock = Clock()
        caution = Caution(clock)
        if process > 1:
            table.update({position: 1 for position in under_way if not blind and position not in table})
            for position in caution.begin(table, 100, blind=blind):
                dead.append(position)
                end(position, caution)
        under_way.clear()
        waiting, crashed = list[int](), False
        lane = list(todo)
        while (lane or waiting) and not crashed:
            while lane and not caution.holds():
                position = lane.pop(0)
                if caution.wants(position):
                    caution.notes.taken(position, 1)
                    waiting.append(position)
                else:
                    under_way.append(position)
            group = caution.group(waiting)
            if group and caution.patience(group[0]):
                while under_way:  # it waits until they have ended
                    if under_way[0] == guilty:
                        crashed = True
                        break
                    end(under_way.pop(0), caution)
                if crashed:
                    break
            for position in group:
                waiting.remove(position)
                table[position] = caution.note(position)[1]
                under_way.append(position)
            crashed = guilty in under_way
            for position in list(under_way) if not crashed else []:
                if position not in slow or caution.holds():
                    under_way.remove(position)
                    end(position, caution)
        if not crashed:
            return process, dead
    raise AssertionError("it crashes for ever")


@given(st.integers(1, 12), st.booleans(), st.data())
def test_whatever_runs_beside_it_the_guilty_event_alone_is_condemned_and_soon(
    count: int, blind: bool, data: st.DataObject
) -> None:
    guilty = data.draw(st.integers(0, count - 1))
    slow = data.draw(st.frozensets(st.integers(0, count - 1).filter(lambda position: position != guilty)))
    assert lives(range(count), guilty, slow, blind) == (4 if blind else 3, [guilty])
