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
