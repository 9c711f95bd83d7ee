"""`tidings partitions`, and what health and status say of a divided service."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from tests.unit.command_line import invoke, run_shop, shop
from tidings import Settings, open_store
from tidings.buses import EventBus, Subscription, TopologyItem
from tidings.hosting.facts import Facts, ServiceFacts
from tidings.hosting.health import judge_ready
from tidings.operations.status import State, look

SHOP = "tests.unit.command_line:shop"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STORE", "BUS", "DATABASE", "SERVICES", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_service_that_never_ran_cannot_be_resized_and_is_told_how_to_begin_divided(folder: Path) -> None:
    asyncio.run(make_log())
    ended = invoke("partitions", SHOP, "--resize", "4")
    assert (ended.code, ended.out) == (1, "")
    assert "has never run here" in ended.err
    assert "partitions=4" in ended.err
    assert invoke("partitions", SHOP).out.startswith("shop: partitions 1, epoch 0\n")


async def make_log() -> None:
    async with open_store(Settings().store) as store:
        await store.log_id()


@pytest.mark.parametrize("count", ["0", "257", "many"])
def test_a_number_that_cannot_be_is_2(folder: Path, count: str) -> None:
    run_shop(folder)
    assert invoke("partitions", SHOP, "--resize", count).code == 2


def test_resizing_says_what_it_changed_and_shows_the_ranges(folder: Path) -> None:
    run_shop(folder)
    before = json.loads(invoke("partitions", SHOP, "--json").out)
    assert (before["partitions"], before["epoch"], before["rebound"], len(before["parts"])) == (1, 0, True, 1)
    floor = before["parts"][0]["floor"]
    ended = invoke("partitions", SHOP, "--resize", "3")
    assert ended.code == 0
    assert ended.out.startswith("shop: 1 partitions before, 3 now (epoch 1).\n")
    assert invoke("partitions", SHOP, "--resize", "3").out == "shop already has 3 partitions; nothing was changed.\n"
    after = json.loads(invoke("partitions", SHOP, "--json").out)
    assert (after["partitions"], after["epoch"], after["rebound"]) == (3, 1, False)
    assert [(part["first_bucket"], part["last_bucket"], part["floor"], part["queue"]) for part in after["parts"]] == [
        (0, 84, floor, "tidings.shop.0"),
        (85, 169, floor, "tidings.shop.1"),
        (170, 255, floor, "tidings.shop.2"),
    ]
    assert "no process has made the new queues yet: tidings run" in invoke("partitions", SHOP).out
    run_shop(folder)
    assert json.loads(invoke("partitions", SHOP, "--json").out)["rebound"], "the next process made them"


def test_status_names_every_queue_of_a_divided_service_that_is_not_well(folder: Path) -> None:
    run_shop(folder)
    invoke("partitions", SHOP, "--resize", "3")

    class Stub:
        async def inspect(self, subscriptions: Sequence[Subscription]) -> list[TopologyItem]:
            first, second, third = (part.queue for part in subscriptions)
            return [
                TopologyItem("exchange", "tidings.events", "fits"),
                TopologyItem("exchange", "tidings.partitions", "missing"),
                TopologyItem("queue", first, "fits", "", 4, 1),
                TopologyItem("queue", second, "missing"),
                TopologyItem("queue", third, "fits", "", 3, 0),
            ]

    async def seen() -> State:
        settings = Settings(bus="amqp://host", database="sqlite:///{service}.db")
        async with open_store(settings.store) as store:
            return await look(settings, store, cast("EventBus", Stub()), {SHOP: shop}, now=time.time())

    state = asyncio.run(seen())
    (part,) = state.services
    assert (part.partitions, part.queue) == (3, "missing")
    said = "\n".join(state.problems)
    assert "exchange tidings.partitions is missing" in said
    assert "queue tidings.shop.1 is missing" in said
    effects = "\n".join(effect for each in state.effects.values() for effect in each)
    assert "nobody consumes queue tidings.shop.2" in effects, "a service that lacks a queue connects to none"


# ---- health --------------------------------------------------------------------------

HERE = ServiceFacts("shop.0", marker_age=1, marker=9, floor=9, settled=9)
THERE = ServiceFacts("shop.1", settled=9)
"""Let another process be at work on a partition."""
WHOLE = ServiceFacts("shop", settled=9, partitions=(HERE, THERE))


def wrong(*parts: ServiceFacts) -> list[str]:
    health = judge_ready(Facts((replace(WHOLE, partitions=parts),)))
    return [check.name for check in health.checks if not check.ok]


def test_a_divided_service_is_ready_with_some_partitions_here_and_some_elsewhere() -> None:
    health = judge_ready(Facts((WHOLE,)))
    assert health.ok
    assert health.checks[-1].detail == (
        "1 of 2 partitions are at work here, 1 stand by; everything up to position 9 is settled"
    )


def test_one_partition_that_is_not_well_is_named() -> None:
    assert wrong(replace(HERE, marker_age=31), THERE) == ["shop.0.markers"]
    assert wrong(replace(HERE, floor=5, stalled=99), THERE) == ["shop.0.progress"]
    assert wrong(HERE, replace(THERE, waiting_event="event e-1")) == ["shop.1.markers"], "nobody is at work on it"
    assert wrong(HERE, replace(THERE, waiting_event="event e-1", others_idle=1.0)) == [], "somebody is"
