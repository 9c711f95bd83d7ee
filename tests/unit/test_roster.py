"""Which handlers are given an event, and what their spans say, by hand and against a model of single positions."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from tidings.modelling.handlers import Handler, Retry
from tidings.modelling.roster import BEHIND, PAST, SKIPPED, Roster, Span, successors, under_one_name

POSITIONS = range(12)


def handler(name: str) -> Handler:
    return Handler(name, lambda: None, (), (), Retry(), 1.0, threaded=True)


A, B = handler("a"), handler("b")


def roster(
    *spans: Span, after: dict[str, int] | None = None, partial: dict[int, dict[str, bool]] | None = None
) -> Roster:
    made = Roster(lambda kind: (A, B) if kind == "Placed" else (), partial or {})
    made.read(after or {}, spans)
    return made


def test_all_handlers_of_its_type_are_given_an_event_in_their_order() -> None:
    assert roster().handlers("Placed", 0, 5) == (A, B)
    assert roster().handlers("Other", 0, 5) == ()


def test_who_is_behind_is_given_nothing_of_the_bucket_and_who_has_a_past_is() -> None:
    found = roster(Span(0, "a", BEHIND, 3, -1), Span(0, "b", PAST, 2, 4))
    assert found.handlers("Placed", 0, 9) == (B,)
    assert found.handlers("Placed", 1, 9) == (A, B)
    assert [of for of, _ in found.late("Placed", 0, 3)] == [B]
    assert [of for of, _ in found.late("Placed", 0, 4)] == [A, B]
    assert [of for of, _ in found.late("Placed", 0, 5)] == [A]


def test_who_was_behind_has_caught_up_where_all_that_was_accepted_was_given() -> None:
    behind = Span(0, "a", BEHIND, 3, -1)
    found = roster(behind)
    assert found.ended(0, reached=7, tail=8) == []
    assert found.handlers("Placed", 0, 9) == (B,)
    assert found.ended(0, reached=8, tail=8) == [behind]
    assert found.handlers("Placed", 0, 9) == (A, B)
    assert found.late("Placed", 0, 9) == []


def test_who_is_done_with_an_event_that_waits_for_others_is_not_given_it_again_unless_a_replay_wants_it() -> None:
    found = roster(partial={5: {"a": False}, 6: {"a": True}})
    assert found.handlers("Placed", 0, 5) == (B,)
    assert found.handlers("Placed", 0, 6) == (A, B)
    assert found.again("a", 6)
    assert not found.again("a", 5)


def test_a_handler_that_was_to_begin_later_is_given_nothing_before() -> None:
    found = roster(after={"a": 5})
    assert found.handlers("Placed", 0, 5) == (B,)
    assert found.handlers("Placed", 0, 6) == (A, B)


@given(st.integers(-1, 10), st.integers(-1, 10))
def test_what_was_done_under_a_former_name_was_not_skipped(left: int, begun: int) -> None:
    spans = [Span(0, "old", BEHIND, left, -1), Span(0, "new", SKIPPED, -1, begun)]
    united = under_one_name(spans, "new", ["new"])
    for position in POSITIONS:
        skipped = any(span.covers(position) for span in united)
        assert skipped is (left < position <= begun), (
            "between its leaving under one name and its coming under the other"
        )


@given(st.integers(-1, 10))
def test_a_handler_that_left_under_its_former_name_goes_on_there_under_the_new_one(left: int) -> None:
    spans = [Span(0, "old", BEHIND, left, -1)]
    assert under_one_name(spans, "new", []) == [Span(0, "new", BEHIND, left, -1)]


def test_what_it_was_not_given_under_its_first_name_it_was_not_given() -> None:
    spans = [Span(0, "old", SKIPPED, -1, 3), Span(0, "old", BEHIND, 9, -1), Span(0, "new", SKIPPED, -1, 9)]
    assert under_one_name(spans, "new", ["new"]) == [Span(0, "new", SKIPPED, -1, 3)]


def names(name: str, *was: str) -> Handler:
    return replace(handler(name), was=was)


def test_a_rename_that_is_rolled_back_is_the_same_handler_and_so_is_one_that_comes_again() -> None:
    assert successors({"tell": ()}, [names("inform", "tell")]) == {"tell": "inform"}
    assert successors({"inform": ("tell",)}, [names("tell")]) == {"inform": "tell"}
    assert successors({"third": ("first", "second")}, [names("second", "first")]) == {"third": "second"}
    assert successors({"third": ("first", "second")}, [names("first")]) == {"third": "first"}


def test_who_is_there_already_is_nobody_elses_successor() -> None:
    assert successors({"inform": ("tell",), "tell": ()}, [names("tell")]) == {"tell": "tell"}
    assert successors({"inform": ()}, [names("tell")]) == {}


spans_of = st.fixed_dictionaries(
    {BEHIND: st.none() | st.integers(-1, 10), SKIPPED: st.none() | st.integers(0, 10), PAST: st.none()}
)


@given(st.lists(spans_of, min_size=1, max_size=3), st.sets(st.integers(0, 2)))
def test_done_under_any_of_its_names_is_done_and_nothing_else(notes: list[dict[str, int | None]], at: set[int]) -> None:
    spans = []
    for number, note in enumerate(notes):
        for kind, position in note.items():
            if position is not None:
                done, upto = (position, -1) if kind == BEHIND else (-1, position)
                spans.append(Span(0, str(number), kind, done, upto))
    noted = {span.handler for span in spans} | {str(number) for number in at}
    united = under_one_name(spans, "new", [str(number) for number in at])
    assert {span.handler for span in united} <= {"new"}
    assert len({span.kind for span in united}) == len(united)
    if not spans:
        return
    missing = {p for p in POSITIONS if all(any(s.covers(p) for s in spans if s.handler == name) for name in noted)}
    covered = {p for p in POSITIONS if any(span.covers(p) for span in united)}
    skipped = {p for p in missing if any(span.kind == SKIPPED and span.covers(p) for span in spans)}
    if skipped == {p for p in POSITIONS if min(skipped, default=1) <= p <= max(skipped, default=0)}:
        assert covered == missing
    else:  # there is one row for all that was skipped
        assert missing < covered
