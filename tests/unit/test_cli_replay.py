"""`tidings replay`: what it says beforehand, what it does after a yes, and what it refuses."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.command_line import OrderCreated, Poisoned, invoke, run_shop, shop
from tidings.modelling.handlers import Handler

SHOP = "tests.unit.command_line:shop"
TABLES = ("watermarks", "floors", "replay", "held", "dead", "staged", "schema")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three events that `shop` handled, and a dead letter."""
    for name in ("STORE", "BUS", "DATABASE", "DEBUG", "SERVICES"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    orders = [(f"order-{n}", OrderCreated(order_id=f"{n}")) for n in range(3)]
    run_shop(tmp_path, orders[0], ("bad-1", Poisoned()), *orders[1:])
    return tmp_path


def declare_anew(monkeypatch: pytest.MonkeyPatch, handler: Handler) -> None:
    monkeypatch.setitem(shop.handlers, "OrderCreated", (handler,))
    monkeypatch.setitem(shop.named, handler.name, handler)


@pytest.fixture
def handled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the orders that `shop` handles from now on."""
    found: list[str] = []
    (handler,) = shop.handlers["OrderCreated"]

    async def take(event: OrderCreated) -> None:
        found.append(event.order_id)

    declare_anew(monkeypatch, replace(handler, function=take, parameters=handler.parameters[:1]))
    return found


def contents(folder: Path) -> dict[str, list[Any]]:
    with closing(sqlite3.connect(folder / "shop.db")) as database:
        return {name: database.execute(f"SELECT * FROM tidings_{name}").fetchall() for name in TABLES}


def events() -> list[dict[str, Any]]:
    return [json.loads(line) for line in invoke("streams", "tail", "--json").out.splitlines()]


def positions() -> list[int]:
    return [event["position"] for event in events()]


def test_a_dry_run_says_what_would_run_and_writes_nothing(folder: Path) -> None:
    before = contents(folder)
    ended = invoke("replay", SHOP, "--from", "0", "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    lines = ended.out.splitlines()
    assert lines[0].startswith(f"replay of shop from position {positions()[0]} (")
    (titles,) = (line for line in lines if "RUN AGAIN" in line)
    assert titles.split() == ["HANDLER", "TYPE", "RUN", "AGAIN", "PASSED", "OVER", "NEVER", "DONE", "FIRST", "LAST"]
    (take,) = (line.split() for line in lines if line.startswith("take"))
    assert take == ["take", "OrderCreated", "3", "0", "0", str(positions()[0]), str(positions()[-1])]
    assert "0 held events stay held, 1 dead letters become held" in ended.out
    assert "tables are not emptied" in ended.out
    assert "May emit: take." in ended.out
    assert contents(folder) == before


def test_a_dry_run_names_the_handlers_that_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    (handler,) = shop.handlers["OrderCreated"]
    declare_anew(monkeypatch, replace(handler, replay=False))
    (share, _) = json.loads(invoke("replay", SHOP, "--from", "0", "--dry-run", "--json").out)["shares"]
    assert (share["handler"], share["replay"], share["run"], share["passed_over"]) == ("take", False, 0, 3)
    (line,) = (line for line in invoke("replay", SHOP, "--from", "0", "--dry-run").out.splitlines() if "take" in line)
    assert line.endswith("replay=False")


def test_after_a_yes_the_service_runs_it_again_from_there(folder: Path, handled: list[str]) -> None:
    ended = invoke("replay", SHOP, "--from", str(positions()[2]), "--yes")
    assert ended.code == 0
    assert f"shop is sent back to position {positions()[2]}" in ended.out
    run_shop(folder)
    assert handled == ["1", "2"]
    assert invoke("verify", SHOP).code == 0
    run_shop(folder)
    assert handled == ["1", "2"], "once"


def test_a_time_begins_at_the_first_event_after_it(folder: Path) -> None:
    last = events()[-1]
    found = json.loads(invoke("replay", SHOP, "--from", last["recorded_at"], "--dry-run", "--json").out)
    assert found["start"]["recorded_at"] == last["recorded_at"], "shown to the millisecond, it may be one before"
    assert found["start"]["position"] <= last["position"]
    assert found["shares"][0]["last"] == last["position"]
    ended = invoke("replay", SHOP, "--from", "2999-01-01T00:00", "--dry-run")
    assert (ended.code, ended.out) == (1, "")
    assert "no event from 2999-01-01T00:00 on" in ended.err


def test_nothing_is_done_without_a_yes_where_nobody_can_answer(folder: Path) -> None:
    before = contents(folder)
    ended = invoke("replay", SHOP, "--from", "0")
    assert ended.code == 2
    assert "say --yes" in ended.err
    assert contents(folder) == before


@pytest.mark.parametrize("since", ["-1", "yesterday", "2026-13-01", ""])
def test_what_is_neither_a_position_nor_a_time_is_refused(since: str, folder: Path) -> None:
    before = contents(folder)
    ended = invoke("replay", SHOP, f"--from={since}", "--yes")
    assert (ended.code, ended.out) == (2, "")
    assert "--from" in ended.err
    assert contents(folder) == before


def test_a_position_that_the_log_does_not_reach_is_refused(folder: Path) -> None:
    before = contents(folder)
    ended = invoke("replay", SHOP, "--from", str(positions()[-1] + 1), "--yes")
    assert (ended.code, ended.out) == (1, "")
    assert "nothing to replay" in ended.err
    assert contents(folder) == before


def test_a_service_that_has_never_run_has_nothing_to_replay() -> None:
    ended = invoke("replay", "tests.unit.command_line:other", "--from", "0", "--yes")
    assert (ended.code, ended.out) == (1, "")
    assert "has never run here" in ended.err
    assert not Path("other.db").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "say where to begin: --from POSITION or TIME; or what to replay: --key, --stream or --handler"),
        (("--cancel", "--from", "0"), "--cancel cancels all replays"),
        (("--cancel", "--key", "1"), "--cancel cancels all replays"),
        (("--handler", "nobody", "--yes"), "has no handler 'nobody'; its handlers: "),
    ],
)
def test_what_cannot_be_chosen_is_2_and_says_so(options: tuple[str, ...], said: str) -> None:
    ended = invoke("replay", SHOP, *options)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err


def test_chosen_events_run_again_and_are_taken_back() -> None:
    ended = invoke("replay", SHOP, "--stream", "order-1", "--dry-run", "--json")
    assert (ended.code, json.loads(ended.out)["run"]) == (0, 1)
    ended = invoke("replay", SHOP, "--stream", "order-1")
    assert (ended.code, ended.out) == (2, "")
    assert "say --yes" in ended.err
    assert invoke("replay", SHOP, "--stream", "order-1", "--yes").out.startswith("1 run again as soon as shop runs")
    held = json.loads(invoke("held", "list", SHOP, "--json").out)
    assert (held["stream"], held["reason"], held["attempts"]) == ("order-1", "replayed by operator", 0)
    ended = invoke("replay", SHOP, "--stream", "order-1", "--yes")
    assert (ended.code, ended.out.partition(";")[0]) == (1, "0 would run again")
    assert json.loads(invoke("replay", SHOP, "--cancel", "--yes", "--json").out)["events"] == 1
    assert json.loads(invoke("held", "list", SHOP, "--json").out) == {"shown": 0, "total": 0}


def letter_changed(folder: Path, sql: str) -> tuple[int, int]:
    """Change the dead letter by hand; return its id and the position of its event."""
    with closing(sqlite3.connect(folder / "shop.db")) as database, database:
        database.execute(f"UPDATE tidings_dead SET {sql}")
        (row,) = database.execute("SELECT id, position FROM tidings_dead").fetchall()
    return row[0], row[1]


@pytest.mark.parametrize(
    "sql",
    [
        "data = x'7b2261223a317d'",
        "event_id = '00000000-0000-0000-0000-000000000001'",
        "version = NULL, event_id = '00000000-0000-0000-0000-000000000001'",
        "stream = 'another', data = x'7b2261223a317d'",
    ],
)
def test_what_the_log_contradicts_is_not_run_again_but_named_with_the_way_to_drop_it(folder: Path, sql: str) -> None:
    number, position = letter_changed(folder, sql)
    before = contents(folder)
    dry = invoke("replay", SHOP, "--from", "0", "--dry-run")
    assert dry.code == 0
    assert f"FORGED, or changed by hand: the log has something else in the place of dead letter {number}" in dry.out
    (forged,) = json.loads(invoke("replay", SHOP, "--from", "0", "--dry-run", "--json").out)["forged"]
    assert (forged["kind"], forged["position"]) == ("dead", position)
    for command in (
        ("replay", SHOP, "--from", "0", "--yes"),
        ("dead", "retry", str(number), "--service", SHOP, "--yes"),
        ("dead", "retry", "--all", "--service", SHOP, "--yes"),
        ("dead", "retry", str(number), "--service", SHOP, "--dry-run"),
    ):
        ended = invoke(*command)
        assert ended.code == 1, command
        assert f"tidings dead drop {number} --service shop" in ended.err
        assert f"--from {position}" in ended.err
    assert contents(folder) == before
    assert invoke("dead", "drop", str(number), "--service", SHOP, "--yes").code == 0
    assert invoke("replay", SHOP, "--from", str(position), "--yes").code == 0


def test_a_letter_whose_event_the_log_does_not_have_any_more_is_retried_as_it_is(folder: Path) -> None:
    number, _ = letter_changed(folder, "position = position * 1000, version = version + 1000, data = x'7b7d'")
    assert invoke("dead", "retry", str(number), "--service", SHOP, "--yes").code == 0


@pytest.mark.parametrize(
    "sql",
    [
        "data = x'7b2261223a317d'",
        "position = position * 1000",
        "position = position * 1000, data = x'7b7d'",
        "version = NULL, event_id = '00000000-0000-0000-0000-000000000001'",
    ],
)
def test_many_letters_are_compared_in_one_reading_of_the_log(
    folder: Path, monkeypatch: pytest.MonkeyPatch, sql: str
) -> None:
    monkeypatch.setattr("tidings.operations.genuine.FEW", 0)
    number, _ = letter_changed(folder, sql)
    ended = invoke("dead", "retry", str(number), "--service", SHOP, "--yes")
    assert (ended.code, f"tidings dead drop {number}" in ended.err) == (1, True)
