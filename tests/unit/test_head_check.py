"""What waits until the log goes as far as it claims: in order, each ruled on once, by an answer that is new enough."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from tidings.delivery.head_check import HeadCheck
from tidings.errors import StoreUnavailable
from tidings.stores import EventStore


class Log:
    """A log whose head is asked for: it answers with the next of these, or raises it."""

    def __init__(self, *answers: int | Exception) -> None:
        self.answers = list(answers)
        self.asked = 0
        self.meanwhile: list[Any] = []
        """Calls made while the head is being asked for."""

    async def head(self) -> int:
        self.asked += 1
        answer = self.answers.pop(0)
        await asyncio.sleep(0)
        while self.meanwhile:
            self.meanwhile.pop(0)()
        if isinstance(answer, Exception):
            raise answer
        return answer


def checked(log: Log, head: int) -> HeadCheck[int]:
    return HeadCheck(cast("EventStore", log), head, "shop")


@given(st.lists(st.integers(-1, 30), min_size=1), st.integers(-1, 20), st.integers(-1, 20))
def test_everything_is_ruled_on_once_and_in_order(claims: list[int], known: int, head: int) -> None:
    async def ruled() -> list[tuple[int, bool]]:
        heads, found = checked(Log(*[head] * len(claims)), known), list[tuple[int, bool]]()
        for number, claim in enumerate(claims):
            if heads.knows(claim):
                found.append((number, True))
            else:
                heads.keep(claim, number)
        while len(found) < len(claims):
            found += await heads.rule()
        return found

    found = asyncio.run(ruled())
    assert [number for number, _ in found] == list(range(len(claims)))
    assert [reached for _, reached in found] == [claim <= max(head, known) for claim in claims]


async def test_an_answer_condemns_nothing_that_came_after_the_question() -> None:
    log = Log(5, 9)
    heads = checked(log, 5)
    heads.keep(7, 1)
    log.meanwhile.append(lambda: heads.keep(8, 2))
    assert await heads.rule() == [(1, False)]
    assert not heads.knows(3), "something that came before it waits"
    assert await heads.rule() == [(2, True)]
    assert heads.knows(9)
    assert log.asked == 2


async def test_one_question_is_enough_for_all_that_it_answers() -> None:
    log = Log(9)
    heads = checked(log, 5)
    for claim in (6, 7, 9):
        heads.keep(claim, claim)
    assert await heads.rule() == [(6, True), (7, True), (9, True)]
    assert log.asked == 1


async def test_a_store_that_is_away_condemns_nothing() -> None:
    heads = checked(Log(StoreUnavailable("away"), 6), 5)
    heads.keep(6, 1)
    assert await heads.rule() == [(1, True)]


async def test_what_a_lost_connection_brought_is_forgotten() -> None:
    heads = checked(Log(), 5)
    heads.keep(6, 1)
    heads.forget()
    assert heads.knows(5)
    assert not heads.knows(6)
