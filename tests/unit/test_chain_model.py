"""The delivery rules under random faults: all together they keep the promises, without any one of them they do not."""

from __future__ import annotations

from random import Random

import pytest

from tests.unit.chain_world import LOG, MUTANTS, PARTITIONS, World, outcome
from tidings.message import Marker
from tidings.position import carried

SEEDS = 1000
ENOUGH = 2000
"""So many worlds at most until a missing rule must have been noticed."""


@pytest.mark.parametrize("first", range(0, SEEDS, 250))
def test_nothing_is_lost_doubled_or_reordered_whatever_the_world_does(first: int) -> None:
    broken = {seed: found for seed in range(first, first + 250) if (found := outcome(seed)) != "kept"}
    assert not broken


@pytest.mark.parametrize("rule", MUTANTS)
def test_without_the_rule_a_promise_breaks(rule: str) -> None:
    assert any(outcome(seed, MUTANTS[rule]) != "kept" for seed in range(ENOUGH)), f"nobody misses the rule {rule!r}"


def test_worlds_are_busy_enough_to_prove_something() -> None:
    handled = removed = 0
    for seed in range(100):
        world = World(Random(seed))
        for _ in range(300):
            world.happen()
        world.come_to_rest()
        positions = {event.position for event in world.log.events}
        handled += len(world.ledger.effects)
        removed += len({position for position, _ in world.ledger.effects} - positions)
    assert handled > 2000
    assert removed > 20, "retention must also hit what was already handled"


def test_both_partitions_and_both_kinds_of_key_occur() -> None:
    world = World(Random(1))
    for _ in range(300):
        world.happen()
    buckets = {carried(event) for event in world.log.events}
    assert None in buckets, "events that are not carried must pass by"
    for owned in PARTITIONS:
        assert len({bucket for bucket in buckets if bucket in owned}) >= 2


def test_a_world_that_ended_stays_as_it_is_when_everything_is_sent_again() -> None:
    world = World(Random(3))
    for _ in range(300):
        world.happen()
    world.come_to_rest()
    effects = list(world.ledger.effects)
    world.checkpoint = -1
    world.broker.send(Marker(LOG, -1, -1, {}))
    world.come_to_rest()
    assert world.ledger.effects == effects
