"""The sandbox gateway: each key takes effect once, whatever comes how often; and its ledger proves it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.payment.gateway import (
    DECLINED_MULTIPLE,
    GatewayRefused,
    Operation,
    PaymentGateway,
    SandboxGateway,
    open_sandbox,
)
from services.payment.money import pence, pounds, to_the_penny

TEN = Decimal("10.00")


@pytest.fixture
async def gateway() -> AsyncIterator[SandboxGateway]:
    async with open_sandbox(":memory:") as opened:
        yield opened


async def operations(gateway: SandboxGateway) -> list[Operation]:
    return [entry.operation for entry in await gateway.ledger()]


def test_the_sandbox_is_a_gateway(gateway: SandboxGateway) -> None:
    assert isinstance(gateway, PaymentGateway)


async def test_an_amount_is_held_then_taken_then_given_back(gateway: SandboxGateway) -> None:
    answer = await gateway.authorise(TEN, reference="order 1", key="a")
    assert answer.declined == ""
    await gateway.capture(answer.authorisation, key="b")
    await gateway.refund(answer.authorisation, key="c")
    ledger = await gateway.ledger()
    assert [entry.operation for entry in ledger] == [Operation.AUTHORISE, Operation.CAPTURE, Operation.REFUND]
    assert {(entry.authorisation, entry.amount, entry.reference) for entry in ledger} == {
        (answer.authorisation, TEN, "order 1")
    }


async def test_a_multiple_of_29_pence_is_declined_every_time(gateway: SandboxGateway) -> None:
    answers = [await gateway.authorise(Decimal("2.90"), reference="order 1", key=key) for key in "ab"]
    assert [answer.authorisation for answer in answers] == ["", ""]
    assert answers[0].declined == "declined by the bank (£2.90)"


@given(st.integers(1, 10**7))
def test_the_rule_declines_some_three_in_a_hundred(amount: int) -> None:
    async def ask() -> str:
        async with open_sandbox(":memory:") as gateway:
            return (await gateway.authorise(pounds(amount), reference="", key="k")).declined

    assert bool(asyncio.run(ask())) is (amount % DECLINED_MULTIPLE == 0)


async def test_a_repeated_key_answers_as_before_and_takes_effect_once(gateway: SandboxGateway) -> None:
    first, second = [await gateway.authorise(TEN, reference="order 1", key="a") for _ in range(2)]
    assert first == second
    for _ in range(3):
        await gateway.capture(first.authorisation, key="b")
    assert [(entry.operation, entry.calls) for entry in await gateway.ledger()] == [
        (Operation.AUTHORISE, 2),
        (Operation.CAPTURE, 3),
    ]


async def test_a_repeated_capture_is_recognised_even_after_the_refund(gateway: SandboxGateway) -> None:
    answer = await gateway.authorise(TEN, reference="order 1", key="a")
    await gateway.capture(answer.authorisation, key="b")
    await gateway.refund(answer.authorisation, key="c")
    await gateway.capture(answer.authorisation, key="b")
    assert await operations(gateway) == [Operation.AUTHORISE, Operation.CAPTURE, Operation.REFUND]


async def test_many_calls_at_once_with_one_key_take_effect_once(gateway: SandboxGateway) -> None:
    answers = await asyncio.gather(*(gateway.authorise(TEN, reference="order 1", key="a") for _ in range(20)))
    assert len(set(answers)) == 1
    assert [entry.calls for entry in await gateway.ledger()] == [20]


async def test_money_is_not_taken_twice_nor_given_back_before_it_was_taken(gateway: SandboxGateway) -> None:
    answer = await gateway.authorise(TEN, reference="order 1", key="a")
    with pytest.raises(GatewayRefused, match=r"cannot refund .*last operation was authorise, not capture"):
        await gateway.refund(answer.authorisation, key="r")
    await gateway.capture(answer.authorisation, key="b")
    with pytest.raises(GatewayRefused, match="cannot capture"):
        await gateway.capture(answer.authorisation, key="another key")
    with pytest.raises(GatewayRefused, match="cannot void"):
        await gateway.void(answer.authorisation, key="v")
    assert await operations(gateway) == [Operation.AUTHORISE, Operation.CAPTURE]


async def test_what_was_never_authorised_is_refused(gateway: SandboxGateway) -> None:
    with pytest.raises(GatewayRefused, match="unknown here"):
        await gateway.capture("auth-of-somebody-else", key="a")
    assert await operations(gateway) == []


async def test_the_ledger_outlives_the_process(tmp_path: Path) -> None:
    async with open_sandbox(tmp_path / "gateway.db") as gateway:
        answer = await gateway.authorise(TEN, reference="order 1", key="a")
    async with open_sandbox(tmp_path / "gateway.db") as gateway:
        assert await gateway.authorise(TEN, reference="order 1", key="a") == answer
        assert [entry.calls for entry in await gateway.ledger()] == [2]


# ---- money ---------------------------------------------------------------------------


@given(st.integers(-(10**12), 10**12))
def test_pence_and_pounds_are_exact_in_both_directions(amount: int) -> None:
    assert pence(pounds(amount)) == amount


def test_half_a_penny_goes_up_and_is_never_lost_in_silence() -> None:
    assert to_the_penny(Decimal("0.125")) == Decimal("0.13")
    assert to_the_penny(3 * Decimal("0.1")) == Decimal("0.30")
    with pytest.raises(ValueError, match="not a whole number of pence"):
        pence(Decimal("0.125"))
