"""The real relay and services in random worlds: the promises hold in every one, and in none without the rules."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from functools import cache
from itertools import pairwise

import pytest

from tests.unit.command_line import invoke
from tidings.testing.simulation import RULES, Outcome, Simulator, simulate, without
from tidings.testing.simulation.world import World

RUNS = int(os.environ.get("TIDINGS_TEST_SIMULATIONS", "2000"))
PARTS = 20
SAMPLE = 2
"""Parts of the worlds that are simulated in every run of the tests; the others are slow."""
WORKERS = min(4, os.cpu_count() or 1)
ENOUGH = 3000
"""Worlds, at most, until a missing rule must have been noticed."""
COMPARED = range(40)
WORLDS = pytest.mark.slow("worlds beyond the sample")


@cache
def total(rule: str | None, count: str) -> int:
    """Number of the same worlds in which no promise breaks."""
    outcomes = list(simulate(COMPARED, workers=WORKERS, rule=rule))
    assert not [outcome for outcome in outcomes if outcome.broken]
    return sum(getattr(outcome, count) for outcome in outcomes)


@pytest.mark.parametrize("part", [*range(SAMPLE), *(pytest.param(part, marks=WORLDS) for part in range(SAMPLE, PARTS))])
@pytest.mark.timeout(600)
def test_nothing_is_lost_doubled_or_reordered_in_any_world(part: int) -> None:
    seeds = range(part * RUNS // PARTS, (part + 1) * RUNS // PARTS)
    outcomes = list(simulate(seeds, workers=WORKERS))
    assert sorted(outcome.seed for outcome in outcomes) == list(seeds)
    broken = {outcome.seed: outcome.broken for outcome in outcomes if outcome.broken}
    assert not broken, "tidings simulate --seed SEED --runs 1 tells the story"


def test_a_world_that_is_over_leaves_nothing_in_memory() -> None:
    with Simulator() as simulator:
        for seed in range(3):
            simulator.run(seed)
        gc.collect()
        assert [each for each in gc.get_objects() if isinstance(each, World)] == []


RARELY_MISSED = {
    "watermark_cas",
    "previous_never_low",
    "held_emits_alone",
    "behind_undone_is_recalled",
    "older_code_is_fenced",
}
"""Rules without which only one world in a hundred breaks a promise."""


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(rule, marks=pytest.mark.slow("many worlds until it is missed")) if rule in RARELY_MISSED else rule
        for rule in RULES
    ],
)
@pytest.mark.timeout(1800)
def test_without_the_rule_a_promise_breaks(rule: str) -> None:
    found = simulate(range(ENOUGH), workers=WORKERS, rule=rule)
    assert any(outcome.broken for outcome in found), f"nobody misses the rule {rule!r}"


def told_by_receipts(rule: str) -> list[tuple[str, list[str]]]:
    """Of worlds without the rule, what breaks: all of it, and what receipts say of that."""
    outcomes = list(simulate(range(16), workers=WORKERS, rule=rule))
    return [
        (" ".join(outcome.broken), [text for text in outcome.broken if text.startswith("contradicted by the log: ")])
        for outcome in outcomes
        if outcome.broken
    ]


@pytest.mark.timeout(600)
def test_an_event_that_a_bug_skips_is_named_by_the_receipt_of_its_bucket() -> None:
    found = told_by_receipts("nothing_is_passed_over")
    assert any(" lost: [" in f" {broken}" for broken, _ in found)
    for broken, told in found:
        lost = {number for part in re.findall(r"(?<!for )\blost: \[([\d, ]+)\]", broken) for number in part.split(", ")}
        assert all(any(f"position {number} was passed over" in text for text in told) for number in lost), broken


@pytest.mark.timeout(600)
def test_forged_content_is_named_by_the_proof_from_the_log_and_by_nothing_else() -> None:
    """By the receipts, and where the handler failed, by the dead letter's content, too."""
    found = told_by_receipts("content_of_the_log")
    assert found
    by_receipt = re.compile(r"in the place of .*, position (\d+): replaced$")
    by_letter = re.compile(r"the dead row of .*, position (\d+), has other content")
    for broken, told in found:
        assert broken == " ".join(told)
        places = [by_receipt.search(text) or by_letter.search(text) for text in told]
        assert all(place is not None and int(place[1]) % 5 == 3 for place in places), broken
        assert any(map(by_receipt.search, told)), broken


@pytest.mark.slow("it compares many worlds")
@pytest.mark.timeout(600)
def test_no_promise_rests_on_late_acknowledgements() -> None:
    assert total("acknowledged_late", "events") > 0


@pytest.mark.slow("it compares many worlds")
@pytest.mark.timeout(600)
@pytest.mark.parametrize("rule", ["checkpoint", "one_leads"])
def test_checkpoints_and_leadership_save_messages_and_nothing_else(rule: str) -> None:
    assert total(rule, "published") > total(None, "published")


def test_a_seed_tells_the_same_story_in_every_process() -> None:
    stories = [
        subprocess.run(
            [sys.executable, "-m", "tidings", "simulate", "--seed", "5", "--runs", "1", "--story"],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert stories[0] == stories[1]
    assert len(stories[0].splitlines()) > 50


def test_a_seed_tells_the_same_story_after_other_worlds() -> None:
    with Simulator() as simulator:
        first = [simulator.run(seed, telling=True) for seed in range(10)]
        again = [simulator.run(seed, telling=True) for seed in reversed(range(10))]
    assert [outcome.story for outcome in first] == [outcome.story for outcome in reversed(again)]


@pytest.fixture(scope="module")
def lossy() -> tuple[Outcome, Outcome]:
    """Return a world that fails because gaps are not noticed, as it was and shrunk."""
    with Simulator() as simulator, without("gap"):
        broken = next(outcome for seed in range(1000) if (outcome := simulator.run(seed)).kind == "lost")
        return broken, simulator.shrink(broken)


def test_a_failing_world_is_made_small(lossy: tuple[Outcome, Outcome]) -> None:
    broken, small = lossy
    assert small.kind == broken.kind
    assert len(small.happened) < len(broken.happened) / 2
    assert len(small.happened) <= 15


def test_the_story_of_a_failing_world_says_what_was_lost_and_when(lossy: tuple[Outcome, Outcome]) -> None:
    _, small = lossy
    lost = re.search(r"lost: \[(\d+)", small.broken[0])
    assert lost is not None
    assert any(f"{lost[1]}: " in line and "log" in line for line in small.story)
    assert any(f"published {lost[1]} " in line or f"{lost[1]} for tidings.audit" in line for line in small.story)
    times = [float(line.split()[0]) for line in small.story]
    assert all(before <= after for before, after in pairwise(times))


def test_without_a_rule_the_command_says_no_and_tells_a_story(lossy: tuple[Outcome, Outcome]) -> None:
    seed = str(lossy[0].seed)
    ended = invoke("simulate", "--seed", seed, "--runs", "1", "--without", "gap")
    assert ended.code == 1
    assert f"The story of seed {seed}:" in ended.out
    assert "In the end: lost: [" in ended.out
    assert invoke("simulate", "--seed", seed, "--runs", "1").code == 0


def test_the_command_refuses_a_rule_that_is_none() -> None:
    ended = invoke("simulate", "--without", "gravity")
    assert ended.code == 2
    assert "gravity" in ended.err


def test_the_simulation_leaves_time_randomness_and_logging_as_they_were() -> None:
    import random
    import time

    import structlog

    before = time.time, os.urandom, random.getstate(), structlog.is_configured(), structlog.get_config()
    with Simulator() as simulator:
        simulator.run(1)
    assert before == (time.time, os.urandom, random.getstate(), structlog.is_configured(), structlog.get_config())
