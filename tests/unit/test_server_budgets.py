"""The server's budgets, without sockets: what they count, whom they let in, and that nothing is lost between them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("esdbclient", reason="pip install 'tidings[eventstoredb]'")

from tidings.errors import ConfigurationError
from tidings.server.budgets import MIB, Allowance, Bucket, Charge, Limits, Reservations, Treasury
from tidings.server.http2_stream import TRAILER, trailers_of
from tidings.server.refusals import SHOWN, Refusal, Status, group_failed, shown, stream_deleted, unimplemented


def test_a_bucket_gives_what_it_has_and_a_tenth_comes_back_in_a_second() -> None:
    now = [0.0]
    bucket = Bucket(10, lambda: now[0])
    assert [bucket.take() for _ in range(11)] == [True] * 10 + [False]
    assert bucket.empty
    now[0] = 2.0
    assert not bucket.empty
    assert [bucket.take() for _ in range(2)] == [True, False]
    now[0] = 1000.0
    assert [bucket.take() for _ in range(11)] == [True] * 10 + [False]


SMALL = Limits(connection_bytes=24 * MIB, user_bytes=30 * MIB, process_bytes=40 * MIB, user_streams=2)


def test_bytes_are_counted_for_the_connection_the_user_and_the_process() -> None:
    treasury = Treasury(SMALL)
    one, other = Allowance(treasury), Allowance(treasury)
    first, second, third = Charge(one), Charge(one), Charge(other)
    for charge in (first, third):
        charge.of("relay")
    first.take(20 * MIB)
    with pytest.raises(Refusal, match="connection_bytes"):
        second.take(5 * MIB)
    with pytest.raises(Refusal, match="user_bytes"):
        third.take(11 * MIB)
    third.take(10 * MIB)
    nobody = Charge(Allowance(treasury))
    with pytest.raises(Refusal, match="process_bytes") as caught:
        nobody.take(11 * MIB)
    assert caught.value.code is Status.RESOURCE_EXHAUSTED
    assert treasury.refused == {"connection_bytes": 1, "user_bytes": 1, "process_bytes": 1}
    for charge in (first, second, third, nobody):
        charge.clear()
    assert (treasury.bytes, one.bytes, dict(treasury.user_bytes)) == (0, 0, {})


def test_a_user_has_so_many_calls_over_all_connections() -> None:
    treasury = Treasury(SMALL)
    charges = [Charge(Allowance(treasury)) for _ in range(3)]
    for charge in charges[:2]:
        charge.of("relay")
    with pytest.raises(Refusal, match="2 calls"):
        charges[2].of("relay")
    charges[2].of("other")
    charges[0].clear()
    charges[0].clear()
    Charge(Allowance(treasury)).of("relay")


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["hold", "give", "clear", "late"]), st.integers(0, 9))))
def test_whatever_calls_do_nothing_stays_counted_when_all_are_over(steps: list[tuple[int, str, int]]) -> None:
    treasury = Treasury(Limits())
    allowance = Allowance(treasury)
    charges = [Charge(allowance) for _ in range(4)]
    for number, charge in enumerate(charges):
        charge.of("relay" if number % 2 else "")
    for number, what, size in steps:
        charge = charges[number]
        if what == "clear":
            charge.clear()
            charge.hold(size)  # by a handler that has not heard yet
            assert charge.bytes == 0
        else:
            charge.hold(-min(size, charge.bytes) if what == "give" else size)
        assert treasury.bytes == sum(each.bytes for each in charges) == allowance.bytes
    for charge in charges:
        charge.clear()
    assert (treasury.bytes, dict(treasury.user_bytes), dict(treasury.user_streams)) == (0, {}, {})


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 8), st.booleans()), max_size=40))
def test_room_is_never_given_twice_and_who_waits_gets_it_in_order(steps: list[tuple[int, int, bool]]) -> None:
    above = Reservations(12)
    below = [Reservations(8, above), Reservations(8, above)]
    has: dict[int, int] = {}
    asked: dict[int, int] = {}
    for who, size, gives in steps:
        room = below[who % 2]
        if gives:
            has.pop(who, None), asked.pop(who, None)
            room.give_back(who)
        elif who not in asked:
            asked[who] = size
            room.ask(who, size, lambda who=who, size=size: has.__setitem__(who, size))  # type: ignore[misc]
        for side in (0, 1):
            assert sum(size for who, size in has.items() if who % 2 == side) <= 8
        assert sum(has.values()) <= 12
    for who in list(asked):
        below[who % 2].give_back(who)
        asked.pop(who)
        has.pop(who, None)
        assert not asked or has, "somebody waits, and nobody has anything that could be given back"
    granted: list[str] = []
    above.ask("all", 12, lambda: granted.append("all"))
    assert granted == ["all"]


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"connection_bytes": MIB}, {"process_bytes": 25 * MIB}])
def test_limits_under_which_nobody_could_work_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(wrong))):
        Limits(**wrong)


@given(st.text(), st.integers(1, 2000))
def test_what_a_caller_said_is_cut_and_escaped(text: str, times: int) -> None:
    long = text * times
    assert len(shown(long).encode("utf-8", "replace")) <= SHOWN + 40
    for refusal in (unimplemented(long), stream_deleted(long), group_failed(long, long, long)):
        for name, value in trailers_of(refusal):
            assert len(value) <= TRAILER
            assert value.isascii()
            assert not any(byte < 32 for byte in value), name
        assert sum(len(name) + len(value) + 32 for name, value in trailers_of(refusal)) < 8192


def test_a_long_text_ends_with_a_whole_escape() -> None:
    for more in range(4):
        ((_, _), (_, value)) = trailers_of(Refusal(Status.UNKNOWN, "x" * more + "ä" * TRAILER))
        assert value.rpartition(b"%")[2] in (b"A4", b"C3")
