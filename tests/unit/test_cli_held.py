"""`tidings held` and `tidings skip`: chosen in every way, shown, tried again, skipped, dropped; never without a yes."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from tests.integration.databases import database_url, on_server
from tests.unit.command_line import Unlucky, holding, invoke, run_holding
from tidings.database.engine import open_database
from tidings.database.tables import held
from tidings.settings import Settings

HOLDING = "tests.unit.command_line:holding"
OTHER = "tests.unit.command_line:other"

pytestmark = pytest.mark.postgresql


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with four held events, one of which only waits behind another, and a handled event."""
    for name in ("STORE", "BUS", "DATABASE", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.setenv("TIDINGS_SERVICES", HOLDING)
    if on_server():
        monkeypatch.setenv("TIDINGS_DATABASE", database_url(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_holding(
        tmp_path,
        ("s-a", Unlucky(name="a", error="value")),
        ("s-a", Unlucky(name="a")),
        ("s-b", Unlucky(name="b", error="key")),
        ("s-c", Unlucky(name="c", error="value")),
        ("s-d", Unlucky(name="d")),
        held=4,
    )
    return tmp_path


def listed(*options: str) -> list[dict[str, Any]]:
    ended = invoke("held", "list", *options, "--json")
    assert ended.code == 0
    return [entry for entry in map(json.loads, ended.out.splitlines()) if "position" in entry]


def places(*options: str) -> list[str]:
    return [f"{entry['stream']}@{entry['version']}" for entry in listed(*options)]


def test_held_events_are_listed_with_their_reasons_and_counted_by_handler() -> None:
    assert places() == ["s-a@0", "s-a@1", "s-b@0", "s-c@0"]
    titles, first, second, _, _, counted = invoke("held", "list").out.splitlines()
    assert titles.split("  ")[0] == "SERVICE"
    assert "s-a@0" in first
    assert first.endswith(r"ValueError: a \x1b[31mis unlucky")
    assert second.endswith("waits behind an earlier event of its partition key")
    assert counted.startswith("holding.try_it: 3 failed, the oldest held since 20")


def test_what_waits_for_a_handler_that_is_not_in_the_code_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "named", {})
    monkeypatch.setattr(holding, "handlers", {})
    said = "its handler 'try_it' is not in this code: bring it back, or skip or drop the event, or, where a handler "
    said += "is the same under a new name, declare that with was=('try_it',); before: "
    _, first, *_, counted = invoke("held", "list").out.splitlines()
    assert f"{said}ValueError: a" in first
    assert said in counted
    assert not any(entry["handler_in_code"] for entry in listed())
    assert said in invoke("held", "show", "s-a@0").out
    assert said in invoke("status", HOLDING).out
    assert invoke("held", "skip", "--all", "--yes").out.startswith("4 skipped.")


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (("--error", "valueerror"), ["s-a@0", "s-c@0"]),
        (("--error", "b \\x1b"), ["s-b@0"]),
        (("--error", "100%_"), []),
        (("--key", "a"), ["s-a@0", "s-a@1"]),
        (("--stream", "s-b"), ["s-b@0"]),
        (("--handler", "try_it", "--error", "KeyError"), ["s-b@0"]),
        (("--handler", "other"), []),
        (("--type", "Unlucky", "--limit", "2"), ["s-a@0", "s-a@1"]),
        (("--since", "1h"), ["s-a@0", "s-a@1", "s-b@0", "s-c@0"]),
        (("--until", "1h"), []),
        (("--until", "2100-01-01T00:00+01:00"), ["s-a@0", "s-a@1", "s-b@0", "s-c@0"]),
        (("--since", "2100-01-01"), []),
        (("--key", "\0\udcff"), []),
    ],
)
def test_they_are_chosen_by_what_they_have_in_common(options: tuple[str, ...], found: list[str]) -> None:
    assert places(*options) == found


@pytest.mark.parametrize("time", ["yesterday", "1y", "-5m", "", "99999999999d", "2026-13-01"])
def test_what_is_no_time_is_said(time: str) -> None:
    ended = invoke("held", "list", "--since", time)
    if ended.code == 0:
        pytest.skip("it is long ago")
    assert ended.code == 2
    assert "is not a time: write 2026" in ended.err


def test_a_list_says_how_many_it_does_not_show_and_an_empty_one_is_json_too() -> None:
    assert (
        invoke("held", "list", "--limit", "1").out.splitlines()[-1] == "1 of 4 are shown; --limit 4 shows all of them"
    )
    assert json.loads(invoke("held", "list", "--limit", "1", "--json").out.splitlines()[-1]) == {"shown": 1, "total": 4}
    assert json.loads(invoke("held", "list", "--key", "x", "--json").out) == {"shown": 0, "total": 0}
    assert invoke("held", "list", "--key", "x").err == "No held events.\n"


def test_one_is_shown_whole_by_each_of_its_names() -> None:
    (first, *_) = listed()
    for name in (str(first["position"]), first["event_id"], "s-a@0"):
        ended = invoke("held", "show", name)
        assert ended.code == 0
        assert "held event at position" in ended.out
        assert "Traceback" in ended.out
        assert "\x1b" not in ended.out
    shown = json.loads(invoke("held", "show", "s-a@0", "--json").out)
    assert (shown["handler"], shown["attempts"], shown["data"]) == ("try_it", 1, {"name": "a", "error": "value"})


@pytest.mark.parametrize("verb", ["show", "retry", "skip", "drop"])
@pytest.mark.parametrize("event", ["999", "s-d@0", "00000000-0000-0000-0000-000000000001"])
def test_what_is_not_held_is_1_and_nothing_is_changed(verb: str, event: str) -> None:
    ended = invoke("held", verb, event, *(() if verb == "show" else ("s-a@0", "--yes")))
    assert (ended.code, ended.out) == (1, "")
    assert "Nothing was changed" in ended.err
    assert len(listed()) == 4


@pytest.mark.parametrize("verb", ["retry", "skip", "drop"])
def test_nothing_is_done_by_a_dry_run_or_without_a_yes_or_without_saying_which(verb: str) -> None:
    before = listed()
    for which in (("--all",), ("--error", "ValueError"), ("s-a@0",)):
        ended = invoke("held", verb, *which)
        assert (ended.code, ended.out) == (2, "")
        assert "say --yes" in ended.err
        ended = invoke("held", verb, *which, "--dry-run")
        assert ended.code == 0
        assert f"{ {'--all': 4, '--error': 2, 's-a@0': 1}[which[0]] } would be" in ended.out
    for unclear in ([], ["--all", "--key", "a"], ["s-a@0", "--all"], ["s-a@0", "--limit", "1"], ["--limit", "1"]):
        ended = invoke("held", verb, *unclear, "--yes")
        assert (ended.code, ended.out) == (2, "")
    assert listed() == before


def test_what_is_retried_is_due_now() -> None:
    ended = invoke("held", "retry", "--error", "ValueError", "--limit", "1", "--yes")
    assert (ended.code, ended.out) == (0, "1 due now. The service runs them within seconds.\n")
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 1))
    assert [entry["stream"] for entry in listed() if entry["attempts"] and entry["due"] <= now] == ["s-a"]
    ended = invoke("held", "retry", "--key", "nobody", "--yes", "--json")
    assert json.loads(ended.out) == {"service": "holding", "command": "retry", "events": 0, "dry_run": False}


def test_what_is_skipped_is_dead_and_what_is_dropped_is_gone(folder: Path) -> None:
    assert invoke("held", "skip", "s-a@0", "--yes").out == "1 skipped. 'tidings dead list' has them.\n"
    assert invoke("held", "drop", "--error", "KeyError", "--yes").out == "1 dropped.\n"
    assert places() == ["s-a@1", "s-c@0"]
    (letter,) = map(json.loads, invoke("dead", "list", "--json").out.splitlines())
    assert (letter["stream"], letter["reason"], letter["holds_key"]) == ("s-a", "skipped by operator", False)
    run_holding(folder, held=1)
    assert places() == ["s-c@0"]


# ---- dead letters are chosen in the same ways ---------------------------------------------


def test_dead_letters_are_chosen_retried_and_dropped_by_what_they_have_in_common() -> None:
    invoke("held", "skip", "--all", "--yes")

    def dead(*options: str) -> list[str]:
        rows = map(json.loads, invoke("dead", "list", *options, "--json").out.splitlines())
        return [f"{row['stream']}@{row['version']}" for row in rows if "id" in row]

    assert dead("--error", "skipped by operator", "--key", "a") == ["s-a@0", "s-a@1"]
    assert dead("--stream", "s-b", "--handler", "try_it", "--type", "Unlucky", "--since", "1h") == ["s-b@0"]
    assert dead("--until", "1h") == []
    assert (
        invoke("dead", "list", "--limit", "3").out.splitlines()[-1] == "3 of 4 are shown; --limit 4 shows all of them"
    )
    assert json.loads(invoke("dead", "list", "--key", "x", "--json").out) == {"shown": 0, "total": 0}
    assert invoke("dead", "retry", "--key", "a", "--dry-run").out == "2 would be retried; nothing was changed.\n"
    assert len(dead()) == 4
    assert invoke("dead", "retry", "--key", "a", "--limit", "1", "--yes").out.startswith("1 retried.")
    assert dead() == ["s-a@1", "s-b@0", "s-c@0"]
    assert invoke("dead", "drop", "--since", "1h", "--handler", "try_it", "--yes").out == "3 dropped.\n"
    assert (places(), dead()) == (["s-a@0"], [])


# ---- skip ---------------------------------------------------------------------------------


def test_an_event_is_skipped_by_each_of_its_names_wherever_it_stands(folder: Path) -> None:
    ended = invoke("skip", "s-a@0", "--dry-run")
    assert ended.code == 0
    assert "would be skipped in holding. It is held. Nothing was changed." in ended.out
    ended = invoke("skip", "s-a@0")
    assert (ended.code, ended.out) == (2, "")
    assert "say --yes" in ended.err
    assert len(listed()) == 4
    assert "it was held, and is dead now; its key goes on" in invoke("skip", "s-a@0", "--yes").out
    by_id = listed()[1]["event_id"]
    assert json.loads(invoke("skip", by_id, "--yes", "--json").out)["was"] == "held"
    assert "already dead" in invoke("skip", "s-a@0", "--yes").out
    ended = invoke("skip", "s-d@0", "--yes")
    assert (ended.code, ended.out) == (1, "")
    assert "has handled event" in ended.err
    run_holding(folder, held=1)
    assert invoke("streams", "append", "s-e", "Unlucky", '{"name": "e", "error": "value"}').code == 0
    ended = invoke("skip", "s-e@0", "--yes")
    assert "it will be dead when the service comes to it, without being run" in ended.out
    assert "it was skipped before" in invoke("skip", "s-e@0", "--yes").out
    run_holding(folder, held=1)
    rows = [json.loads(line) for line in invoke("dead", "list", "--json").out.splitlines()]
    assert [(row["stream"], row["reason"]) for row in rows] == [
        ("s-a", "skipped by operator"),
        ("s-b", "skipped by operator"),
        ("s-e", "skipped by operator"),
    ]


@pytest.mark.parametrize(
    ("event", "code", "said"),
    [
        ("s-a@99", 1, "shows no version 99"),
        ("nonsense", 2, "names no event"),
        ("99999", 1, "no event is at position 99999"),
        ("9" * 40, 2, "names no event"),
        ("tidings_log@0", 1, "never carried to services"),
    ],
)
def test_what_cannot_be_skipped_is_said(event: str, code: int, said: str) -> None:
    ended = invoke("skip", event, "--yes")
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err


def test_a_service_that_never_ran_is_named() -> None:
    ended = invoke("skip", "s-a@0", "--service", OTHER, "--yes")
    assert ended.code == 1
    assert "'other' has never run here" in ended.err


@pytest.mark.parametrize("chosen", [("s-b@0",), ("--all",), ("--all", "--rate", "100")])
def test_what_the_log_contradicts_is_not_tried_again(chosen: tuple[str, ...]) -> None:
    async def forge() -> None:
        async with open_database(Settings().database_of("holding")) as database, database.transaction() as connection:
            forged = held.update().where(held.c.stream == "s-b")
            await connection.execute(forged.values(data=b'{"name":"forged","error":"key"}', due=time.time() + 3600))

    (before,) = [entry for entry in listed() if entry["stream"] == "s-b"]
    asyncio.run(forge())
    ended = invoke("held", "retry", *chosen, "--yes")
    assert ended.code == 1
    assert "nothing was changed" in ended.err
    assert f"tidings held drop {before['event_id']} --service holding" in ended.err
    assert invoke("held", "retry", "s-a@0", "--yes").out.startswith("1 due now.")
    assert invoke("held", "drop", before["event_id"], "--service", "holding", "--yes").out.startswith("1 dropped.")
    assert invoke("held", "retry", "--all", "--yes").out.startswith("3 due now.")
