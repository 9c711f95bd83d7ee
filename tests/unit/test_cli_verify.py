"""`tidings verify` as people and scripts read it: what it prints, and how it ends."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from tests.unit.command_line import OrderCreated, Poisoned, invoke, run_shop
from tidings import Service

second = Service("second")


@second.on(OrderCreated)
async def take(event: OrderCreated) -> None:
    """Do nothing, successfully."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STORE", "BUS", "DATABASE", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.setenv("TIDINGS_SERVICES", "tests.unit.command_line:shop")
    monkeypatch.chdir(tmp_path)
    run_shop(tmp_path, ("order-1", OrderCreated(order_id="1")), ("bad-1", Poisoned()))
    return tmp_path


def facts(*arguments: str, code: int = 0) -> dict[str, Any]:
    ended = invoke("verify", "--json", *arguments)
    assert ended.code == code, ended.out + ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def test_settled_is_0_with_the_relay_and_each_service_on_a_line() -> None:
    ended = invoke("verify")
    assert ended.code == 0
    log, relay, service, dead = ended.out.splitlines()
    assert "all settled up to position" in log
    assert relay.startswith("relay main: checkpoint ")
    assert service.startswith("shop: settled up to position ")
    assert dead.startswith("  dead Poisoned ")
    assert dead.endswith(r"1 attempts: ValueError: it is \x1b[31mpoison")


def test_deep_tells_where_every_event_stands() -> None:
    found = facts("--deep")
    assert found["ok"] is True
    assert found["deep"]["services"] == [
        {"service": "shop", "events": 2, "handled": 1, "held": 0, "dead": 1, "pending": 0, "late": {}, "skipped": {}}
    ]
    assert "shop: of 2 events of its types 1 are handled, 0 held, 1 dead, 0 pending" in invoke("verify", "--deep").out


def test_a_contradiction_is_1_though_everything_seems_settled(folder: Path) -> None:
    with sqlite3.connect(folder / "shop.db") as database:
        database.execute("UPDATE tidings_dead SET type = 'Ev\x1b[5mil'")
    database.close()
    assert facts()["ok"] is True
    found = facts("--deep", code=1)
    assert (found["ok"], found["deep"]["wrong_count"]) == (False, 1)
    ended = invoke("verify", "--deep")
    assert ended.code == 1
    (line,) = [line for line in ended.out.splitlines() if "WRONG" in line]
    assert r"the dead row of Ev\x1b[5mil" in line


def test_dead_letters_are_settled_and_the_first_line_counts_them() -> None:
    ended = invoke("verify")
    assert ended.code == 0
    assert "all settled up to position" in ended.out.splitlines()[0]
    assert ended.out.splitlines()[0].endswith("; 1 DEAD, which were given up (tidings dead list)")
    assert invoke("status").code == 1
    assert invoke("dead", "drop", "--all", "--yes").code == 0
    assert "DEAD" not in invoke("verify").out.splitlines()[0]


def test_what_is_pending_is_1_and_is_repaired_without_running_anything_twice() -> None:
    invoke("streams", "append", "order-2", "OrderCreated", '{"order_id": "2"}')
    found = facts(code=1)
    assert [event["stream"] for event in found["services"][0]["pending"]] == ["order-2"]
    assert found["relay"]["behind"] == 1
    ended = invoke("verify", "--repair")
    assert ended.code == 0
    before, after = ended.out.split("repair: ran shop here, because no other process does\n")
    assert "NOT all settled" in before
    assert "all settled" in after
    assert facts("--repair")["repaired"] == ["nothing to repair"]


def test_what_claims_more_than_the_log_holds_is_not_repaired_and_the_rest_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIDINGS_SERVICES", "tests.unit.command_line:shop,tests.unit.test_cli_verify:second")
    with sqlite3.connect(folder / "shop.db") as database:
        database.execute("UPDATE tidings_floors SET position = 1000000")
    database.close()
    ended = invoke("verify", "--repair")
    assert ended.code == 1
    assert "shop: not repaired: it has settled more than this log holds" in ended.out
    assert "claims position 1000000" in ended.out
    assert "repair: ran second here" in ended.out
    assert "second: settled up to position" in ended.out


@pytest.fixture
def one_is_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two services, and the database of the second one does not answer."""
    monkeypatch.setenv("TIDINGS_SERVICES", "tests.unit.command_line:shop,tests.unit.test_cli_verify:second")
    monkeypatch.setenv("TIDINGS_DATABASE__SHOP", f"sqlite:///{folder}/shop.db")
    monkeypatch.setenv("TIDINGS_DATABASE__SECOND", "postgresql+asyncpg://second:secret@127.0.0.1:1/second")


@pytest.mark.usefixtures("one_is_down")
@pytest.mark.parametrize("option", [(), ("--strict",), ("--deep",), ("--repair",)])
def test_what_is_known_of_the_others_is_told_when_one_database_is_down(option: tuple[str, ...]) -> None:
    ended = invoke("verify", *option)
    assert ended.code == 3
    first = next(line for line in ended.out.splitlines() if line.startswith("log "))
    assert "NOT all settled" in first
    assert "NOT SEEN: second" in first
    assert "shop: settled up to position " in ended.out
    assert "NOT SEEN: second: database postgresql+asyncpg://second:***@127.0.0.1:1/second" in ended.err
    found = facts(*option, code=3)
    assert found["ok"] is False
    assert [(one["service"], one["error"]) for one in found["unseen"]] == [("second", "DatabaseUnavailable")]
    assert [part["service"] for part in found["services"]] == ["shop"]
    assert "secret" not in str(found)


@pytest.mark.usefixtures("one_is_down")
def test_lists_and_stories_tell_what_they_know_too() -> None:
    ended = invoke("dead", "list")
    assert ended.code == 3
    assert "Poisoned" in ended.out
    assert "NOT SEEN: second: database" in ended.err
    letter, summary = map(json.loads, invoke("dead", "list", "--json").out.splitlines())
    assert (letter["service"], summary["unseen"][0]["service"]) == ("shop", "second")
    held = invoke("held", "list")
    assert (held.code, held.out) == (3, "")
    assert "No held events in the others." in held.err
    shown = invoke("dead", "show", str(letter["id"]))
    assert shown.code == 0, "what was asked for was found"
    assert "NOT SEEN: second" in shown.err
    missing = invoke("dead", "show", "4711")
    assert missing.code == 3
    assert "not among the dead letters of shop; the rest could not be seen" in missing.err
    told = invoke("why", "order-1@0")
    assert told.code == 3
    assert "OrderCreated" in told.out
    assert "NOT SEEN: second" in told.err


@pytest.mark.usefixtures("one_is_down")
def test_where_nothing_can_be_seen_each_service_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_DATABASE__SHOP", "postgresql+asyncpg://shop:secret@127.0.0.1:1/shop")
    for command in (("verify",), ("dead", "list"), ("dead", "show", "1")):
        ended = invoke(*command)
        assert (ended.code, ended.out) == (3, "")
        first, second = ended.err.splitlines()
        assert first.startswith("tidings: NOT SEEN: shop: database")
        assert second.startswith("tidings: database postgresql+asyncpg://second:***@")


@pytest.mark.usefixtures("one_is_down")
def test_one_service_alone_that_cannot_be_seen_is_an_error_as_ever() -> None:
    for command in (("verify", "second"), ("dead", "list", "second"), ("dead", "show", "1", "--service", "second")):
        ended = invoke(*command)
        assert (ended.code, ended.out) == (3, "")
        assert ended.err.startswith("tidings: database postgresql+asyncpg://")


def test_a_proof_says_how_far_it_goes_and_the_next_one_goes_on_there(folder: Path) -> None:
    assert invoke("verify", "--since", "3").code == 2
    never = invoke("verify", "--deep", "--since", "1")
    assert never.code == 2
    assert "'shop' is not proved up to position 1; it has never been proved" in never.err
    upto = facts("--deep")["deep"]["proved"]["shop"]
    assert f"shop: proved up to position {upto}: its receipts are those of the log" in invoke("verify", "--deep").out
    assert facts("--deep", "--since", str(upto))["deep"]["proved"] == {"shop": upto}
    beyond = invoke("verify", "--deep", "--since", str(upto + 1))
    assert beyond.code == 2
    assert f"its last proof ends at {upto}: --since {upto}" in beyond.err


def test_a_receipt_that_the_log_contradicts_is_1_and_names_the_event(folder: Path) -> None:
    with sqlite3.connect(folder / "shop.db") as database:
        [[bucket, receipt]] = database.execute(
            "SELECT bucket, receipt FROM tidings_watermarks WHERE receipt_at > 0 ORDER BY position LIMIT 1"
        ).fetchall()
        since, disorder, *_ = receipt.split(" ")
        database.execute(
            "UPDATE tidings_watermarks SET receipt = ? WHERE bucket = ?", [f"{since} {disorder} 0 0 0 0 0", bucket]
        )
    ended = invoke("verify", "--deep")
    assert ended.code == 1
    assert "WRONG shop: bucket" in ended.out
    assert "was passed over: skipped" in ended.out
    assert "tidings replay MODULE:SERVICE --from POSITION" in ended.out
