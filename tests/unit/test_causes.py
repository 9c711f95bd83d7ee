"""One model of cause and effect: every fault is told once, causes first, and no effect is ever taken for a cause."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.operations.causes import _BECAUSE, BECAUSE, SHARED, Part, causes_of


class Fault(NamedTuple):
    part: Part
    scope: str
    n: int = 0
    origin: str = ""


def fault(part: Part, service: str = "inventory") -> Fault:
    return Fault(part, "" if part in SHARED else service)


faults = st.lists(
    st.builds(
        lambda part, service, n: Fault(part, service if part not in SHARED or n == 1 else "", n),
        st.sampled_from(Part),
        st.sampled_from(("inventory", "shipping")),
        st.integers(0, 3),
    ),
    max_size=12,
    unique=True,
)


@given(faults)
def test_every_fault_is_told_once(given: list[Fault]) -> None:
    told = [each for cause in causes_of(given) for each in (cause.fault, *cause.effects)]
    assert sorted(told) == sorted(given)


@given(faults)
def test_no_fault_that_another_one_brings_about_is_a_cause(given: list[Fault]) -> None:
    causes = causes_of(given)
    for cause in causes:
        for other in given:
            mine = other.scope in ("", cause.fault.scope)
            assert not (mine and other.part in _BECAUSE[cause.fault.part]), f"{other} explains {cause.fault}"
        for effect in cause.effects:
            assert cause.fault.part == effect.part in SHARED or cause.fault.part in _BECAUSE[effect.part]
            said = [each.scope for each in (cause.fault, *cause.effects) if each.part in SHARED]
            theirs = {"", cause.fault.scope, *said}
            assert effect.scope in theirs or "" in said or not cause.fault.scope, (
                "one service's trouble is no other one's"
            )
    assert [cause.fault.part for cause in causes] == sorted(cause.fault.part for cause in causes)


@given(faults, st.randoms())
def test_the_order_in_which_faults_are_found_names_no_other_causes(given: list[Fault], random: object) -> None:
    mixed = list(given)
    random.shuffle(mixed)  # type: ignore[attr-defined]
    kinds = [[(cause.fault.part, cause.fault.scope) for cause in causes_of(found)] for found in (given, mixed)]
    assert kinds[0] == kinds[1]


@given(faults, faults)
def test_what_only_follows_from_a_cause_changes_no_cause(given: list[Fault], more: list[Fault]) -> None:
    causes = causes_of(given)
    following = [
        each
        for each in more
        if any(cause.fault.part in _BECAUSE[each.part] and cause.fault.scope in ("", each.scope) for cause in causes)
    ]
    assert [cause.fault for cause in causes_of(given + following)] == [cause.fault for cause in causes]


def test_nothing_brings_itself_about_and_causes_come_before_their_effects() -> None:
    for part, causes in _BECAUSE.items():
        assert part not in causes
        assert all(cause < part for cause in causes)
        for cause in causes & SHARED:
            assert cause in SHARED
    assert set(BECAUSE) == set(Part)


@pytest.mark.parametrize(
    ("found", "culprits"),
    [
        ([Part.CONNECTION, Part.DATABASE, Part.MARKERS, Part.PROGRESS], [Part.DATABASE]),
        ([Part.CONNECTION, Part.BUS, Part.RELAY, Part.MARKERS], [Part.BUS]),
        ([Part.STORE, Part.STORE_WRITES, Part.RELAY, Part.CONNECTION, Part.HANDLER], [Part.STORE]),
        ([Part.STORE_WRITES, Part.RELAY, Part.MARKERS, Part.PROGRESS], [Part.STORE_WRITES]),
        ([Part.RELAY, Part.MARKERS, Part.PROGRESS], [Part.RELAY]),
        ([Part.HANDLER, Part.MARKERS, Part.PROGRESS], [Part.HANDLER]),
        ([Part.QUEUE, Part.CONNECTION, Part.MARKERS], [Part.QUEUE]),
        ([Part.BREAKER, Part.HELD], [Part.BREAKER]),
        ([Part.DATABASE, Part.BUS, Part.CONNECTION], [Part.DATABASE, Part.BUS]),
        ([Part.HELD, Part.DEAD], [Part.HELD, Part.DEAD]),
    ],
)
def test_the_culprit_of_each_incident_is_named(found: list[Part], culprits: list[Part]) -> None:
    assert [cause.fault.part for cause in causes_of(map(fault, found))] == culprits


def test_a_database_explains_nothing_of_another_service() -> None:
    causes = causes_of([fault(Part.DATABASE), fault(Part.CONNECTION), fault(Part.CONNECTION, "shipping")])
    assert [cause.fault for cause in causes] == [fault(Part.DATABASE), fault(Part.CONNECTION, "shipping")]


def test_a_store_that_one_service_cannot_read_explains_nothing_of_another_service() -> None:
    mine, theirs = Fault(Part.STORE, "inventory"), Fault(Part.STORE, "shipping")
    hangs, relay, pulse = fault(Part.HANDLER, "shipping"), fault(Part.RELAY), fault(Part.MARKERS, "shipping")
    assert [cause.fault for cause in causes_of([mine, hangs])] == [mine, hangs]
    assert [cause.fault for cause in causes_of([mine, theirs, hangs])] == [mine], "the store fails both"
    assert [cause.fault for cause in causes_of([mine, relay, pulse])] == [mine], "and the relay, which has it in common"


def test_one_server_that_is_down_is_one_cause_for_all_services_on_it() -> None:
    down = [Fault(Part.DATABASE, name, origin="db:5432 refused") for name in ("inventory", "shipping")]
    behind = [Fault(Part.PROGRESS, name) for name in ("inventory", "shipping")]
    wrong_password = Fault(Part.DATABASE, "billing", origin="db:5432 password")
    other = Fault(Part.DATABASE, "file")
    causes = causes_of([*behind, other, *down, wrong_password])
    assert [cause.fault for cause in causes] == [wrong_password, other, down[0]]
    assert set(causes[2].effects) == {down[1], *behind}
