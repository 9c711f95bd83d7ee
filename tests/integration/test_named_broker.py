"""A broker that somebody names for tests: of what is in its vhost, tests delete only what they made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.processes import ROOT
from tidings import open_bus
from tidings.buses import Subscription
from tidings.testing.brokers import rabbitmq_for_tests


async def test_a_vhost_that_somebody_uses_is_refused_and_left_as_it_is(
    amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDINGS_TEST_AMQP", amqp_url)
    async with open_bus(amqp_url) as bus:
        await bus.provision(Subscription("theirs"))
        with rabbitmq_for_tests() as broker:
            with pytest.raises(pytest.fail.Exception, match="somebody uses it") as refused:
                await broker.isolated().__aenter__()
            assert ":tidings@" not in str(refused.value)
        found = await bus.inspect([Subscription("theirs")])
        assert {thing.state for thing in found} == {"fits"}


async def test_an_empty_vhost_is_cleared_around_each_test(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_TEST_AMQP", amqp_url)
    for _ in range(2):
        with rabbitmq_for_tests() as broker:
            async with broker.isolated() as url, open_bus(url) as bus:
                (exchange, *_) = await bus.inspect([Subscription("ours")])
                assert exchange.state == "missing"
                await bus.provision(Subscription("ours"))


def test_local_servers_are_those_of_the_checkout_wherever_the_script_is_called(tmp_path: Path) -> None:
    def home(**named: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", "from kept import Kept; print(Kept('var/x').home)"],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT / "deploy" / "local"), **named},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    assert home() == str(ROOT / "var" / "x")
    assert home(TIDINGS_LOCAL="here") == str(tmp_path / "here")
