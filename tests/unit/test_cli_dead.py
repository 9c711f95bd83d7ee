"""`tidings dead`: listed, shown, retried and dropped, and nothing of it without a yes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.integration.databases import database_url, on_server
from tests.unit.command_line import OrderCreated, Poisoned, invoke, run_shop
from tidings.cli._pacing import in_waves
from tidings.operations.dead import DeadLetters

SHOP = "tests.unit.command_line:shop"
OTHER = "tests.unit.command_line:other"

pytestmark = pytest.mark.postgresql


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two dead letters of `shop` and a handled event."""
    for name in ("STORE", "BUS", "DATABASE", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.setenv("TIDINGS_SERVICES", SHOP)
    if on_server():
        monkeypatch.setenv("TIDINGS_DATABASE", database_url(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_shop(tmp_path, ("bad-1", Poisoned()), ("order-1", OrderCreated(order_id="1")), ("bad-2", Poisoned()))
    return tmp_path


def listed() -> list[dict[str, Any]]:
    ended = invoke("dead", "list", "--json")
    assert ended.code == 0
    return [json.loads(line) for line in ended.out.splitlines()]


def ids() -> list[str]:
    return [str(letter["id"]) for letter in listed()]


def test_dead_letters_are_listed_with_their_reasons() -> None:
    assert [(row["service"], row["stream"], row["type"]) for row in listed()] == [
        ("shop", "bad-1", "Poisoned"),
        ("shop", "bad-2", "Poisoned"),
    ]
    ended = invoke("dead", "list")
    titles, first, _ = ended.out.splitlines()
    assert titles.split() == ["SERVICE", "ID", "DIED", "KIND", "TYPE", "EVENT", "REASON"]
    assert first.split()[:2] == ["shop", ids()[0]]
    assert first.endswith(r"ValueError: it is \x1b[31mpoison")
    assert "bad-1@0" in first


def test_one_is_shown_whole_with_its_traceback() -> None:
    number = ids()[0]
    ended = invoke("dead", "show", number)
    assert ended.code == 0
    assert f"dead letter {number} of shop: ValueError" in ended.out
    assert "bad-1" in ended.out
    assert "Traceback" in ended.out
    assert "\x1b" not in ended.out
    (letter,) = (json.loads(line) for line in invoke("dead", "show", number, "--json").out.splitlines())
    assert (letter["data"], letter["handler"]) == ({}, "die")


def test_an_unknown_id_is_1_and_nothing_is_changed() -> None:
    for command in (["show", "999"], ["drop", ids()[0], "999", "--yes"], ["retry", "999", "--yes"]):
        ended = invoke("dead", *command)
        assert (ended.code, ended.out) == (1, "")
        assert "no dead letter 999" in ended.err
    assert len(listed()) == 2


@pytest.mark.parametrize("verb", ["retry", "drop"])
def test_nothing_is_done_without_a_yes_where_nobody_can_answer(verb: str) -> None:
    for which in (ids()[:1], ["--all"]):
        ended = invoke("dead", verb, *which)
        assert (ended.code, ended.out) == (2, "")
        assert "say --yes" in ended.err
    assert len(listed()) == 2


@pytest.mark.parametrize("verb", ["retry", "drop"])
def test_which_ones_must_be_said_and_only_in_one_way(verb: str) -> None:
    for which in ([], ["1", "--all"]):
        ended = invoke("dead", verb, *which, "--yes")
        assert ended.code == 2
        assert "ID..., or --all" in ended.err
    assert len(listed()) == 2


def test_what_is_dropped_is_gone_and_the_rest_is_not() -> None:
    first, second = ids()
    ended = invoke("dead", "drop", first, first, "--yes")
    assert (ended.code, ended.out) == (0, "1 dropped.\n")
    assert ids() == [second]
    assert invoke("dead", "drop", "--all", "--yes", "--json").out == (
        '{"service": "shop", "command": "drop", "events": 1, "dry_run": false}\n'
    )
    assert invoke("dead", "list").err == "No dead letters.\n"
    assert invoke("dead", "drop", "--all", "--yes").out == "0 dropped.\n"


def test_what_is_retried_waits_for_the_service() -> None:
    ended = invoke("dead", "retry", ids()[1], "--yes")
    assert (ended.code, ended.out) == (0, "1 retried. Its handler runs again as soon as the service does.\n")
    assert [row["stream"] for row in listed()] == ["bad-1"]
    (report,) = (json.loads(line) for line in invoke("verify", "--json").out.splitlines())
    assert report["ok"] is False
    assert report["services"][0]["held"][0]["stream"] == "bad-2"
    assert "held Poisoned" in invoke("verify").out


def test_a_dead_letter_is_found_in_whichever_service_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    number = ids()[0]
    alone = invoke("dead", "show", number)
    monkeypatch.setenv("TIDINGS_SERVICES", f"{OTHER},{SHOP}")
    assert invoke("dead", "show", number) == alone
    ended = invoke("dead", "show", "4711")
    assert (ended.code, ended.out) == (1, "")
    assert "4711 is not among the dead letters of other, shop: list them again" in ended.err


def test_of_several_services_one_must_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_SERVICES", f"{SHOP},{OTHER}")
    number = ids()[0]
    ended = invoke("dead", "retry", number, "--yes")
    assert ended.code == 2
    assert "--service with one of shop, other" in ended.err
    for name in ("shop", SHOP):
        assert invoke("dead", "show", number, "--service", name).code == 0
    ended = invoke("dead", "show", number, "--service", "other")
    assert ended.code == 1
    assert "has never run here" in ended.err


def test_what_is_retried_at_a_rate_goes_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    waves = list[int]()
    retry = DeadLetters.retry

    async def counted(self: DeadLetters, ids: Sequence[int], **options: bool) -> int:
        waves.append(len(ids))
        return await retry(self, ids, **options)

    monkeypatch.setattr(DeadLetters, "retry", counted)
    ended = invoke("dead", "retry", "--all", "--rate", "1.9", "--yes")
    assert (ended.code, ended.out.split(".")[0]) == (0, "2 retried")
    assert waves == [1, 1]
    assert listed() == [{"shown": 0, "total": 0}]
    assert "2 due now" in invoke("held", "retry", "--all", "--rate", "100", "--yes").out
    assert "2 would be due now" in invoke("held", "retry", "--error", "retried", "--rate", "100", "--dry-run").out


def test_a_rate_is_for_what_runs_handlers() -> None:
    for command in (("dead", "drop"), ("held", "skip"), ("held", "drop")):
        ended = invoke(*command, "--all", "--rate", "1", "--yes")
        assert ended.code == 2
        assert "--rate" in ended.err
    assert invoke("dead", "retry", "--all", "--rate", "0", "--yes").code == 2
    assert len(listed()) == 2


@pytest.mark.parametrize(("rate", "waves", "pause"), [(4.0, [4, 4, 2], 1.0), (0.5, [1] * 10, 2.0), (1e6, [10], 1.0)])
async def test_waves_have_the_rate_that_was_asked_for(
    rate: float, waves: list[int], pause: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses, came = list[float](), list[Sequence[int]]()

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    async def act(some: Sequence[int]) -> int:
        came.append(some)
        return len(some)

    monkeypatch.setattr("tidings.cli._pacing.asyncio.sleep", sleep)
    assert await in_waves(range(10), rate, act, "retried") == 10
    assert [len(some) for some in came] == waves
    assert pauses == [pause] * (len(waves) - 1)
    assert [number for some in came for number in some] == list(range(10))


async def test_waves_stay_below_what_a_statement_may_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """PostgreSQL takes 32767 values in one statement."""
    came = list[int]()

    async def sleep(seconds: float) -> None:
        assert seconds < 0.01

    async def act(some: Sequence[int]) -> int:
        came.append(len(some))
        return len(some)

    monkeypatch.setattr("tidings.cli._pacing.asyncio.sleep", sleep)
    assert await in_waves(range(100_000), 1e5, act, "retried") == 100_000
    assert max(came) < 32_000


async def test_a_redrive_that_is_stopped_says_how_far_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    first = asyncio.Event()

    async def act(some: Sequence[int]) -> int:
        first.set()
        return len(some)

    driving = asyncio.create_task(in_waves(range(10), 0.01, act, "retried"))
    await first.wait()
    driving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await driving
    assert "stopped: 1 of 10 retried; the others are as they were" in capsys.readouterr().err
