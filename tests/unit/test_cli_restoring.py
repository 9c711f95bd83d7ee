"""`tidings backup`, `restore` and `log`: what they say, what they refuse, and that a restored system goes on."""

from __future__ import annotations

import asyncio
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import structlog

from tests.integration.databases import database_url, on_server
from tests.unit.command_line import OrderCreated, invoke, run_shop
from tidings import Settings

SHOP = "tests.unit.command_line:shop"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STORE", "BUS", "DATABASE", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.setenv("TIDINGS_SERVICES", SHOP)
    if on_server():
        monkeypatch.setenv("TIDINGS_DATABASE", database_url(tmp_path))
    monkeypatch.chdir(tmp_path)
    run_shop(tmp_path, ("order-1", OrderCreated(order_id="1")))
    return tmp_path


def shown(*command: str) -> dict[str, Any]:
    ended = invoke(*command, "--json")
    assert ended.code == 0, ended.err
    facts: dict[str, Any] = json.loads(ended.out)
    return facts


def test_everything_is_kept_put_back_and_goes_on(folder: Path) -> None:
    before = shown("log", "show")
    assert [one["name"] for one in shown("backup", "kept")["files"]] == ["shop", "log"], "no service ahead of the log"
    run_shop(folder, ("order-2", OrderCreated(order_id="2")))
    ended = invoke("restore", "kept", "--yes")
    assert (ended.code, ended.out) == (1, "")
    assert "--overwrite" in ended.err
    ended = invoke("restore", "kept", "--overwrite")
    assert (ended.code, ended.out) == (2, "")
    assert "say --yes" in ended.err
    ended = invoke("restore", "kept", "--overwrite", "--yes")
    assert ended.code == 0
    assert "Services that were not restored with it: tidings log adopt SERVICE" in ended.out
    after = shown("log", "show")
    assert after["log"] != before["log"]
    assert after["former"][0]["log"] == before["log"]
    run_shop(folder, ("order-3", OrderCreated(order_id="3")))
    assert invoke("verify").code == 0
    assert invoke("streams", "show", "order-2").code == 1
    assert (folder / "tidings.db.before-restore-1").exists()


@pytest.mark.postgresql
def test_the_log_alone_is_put_back_and_the_service_follows(folder: Path) -> None:
    assert invoke("backup", "kept").code == 0
    run_shop(folder, ("order-2", OrderCreated(order_id="2")))
    assert invoke("restore", "kept", "--only", "log", "--overwrite", "--yes").code == 0
    (report,) = json.loads(invoke("verify", "--json").out)["services"]
    assert report["other_log"] is not None
    ended = invoke("log", "adopt", SHOP)
    assert (ended.code, ended.out) == (2, "")
    ended = invoke("log", "adopt", SHOP, "--yes")
    assert ended.code == 0
    assert "it had done events beyond that in 1 buckets, which the log has lost" in ended.out
    assert "follows this log already" in invoke("log", "adopt", SHOP, "--yes").out
    run_shop(folder, ("order-3", OrderCreated(order_id="3")))
    assert invoke("verify").code == 0


@pytest.mark.postgresql
def test_a_log_gets_a_new_identity_only_after_a_yes(folder: Path) -> None:
    before = shown("log", "show")["log"]
    ended = invoke("log", "renew-identity")
    assert (ended.code, ended.out) == (2, "")
    assert shown("log", "show")["log"] == before
    done = shown("log", "renew-identity", "--yes")
    assert (done["before"], shown("log", "show")["log"]) == (before, done["log"])


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        (("restore", "nowhere", "--yes"), 1, "is no backup, or one that was not finished"),
        (("restore", "kept", "--only", "nobody", "--yes"), 2, "has no nobody; it has log, shop"),
        (("backup", "kept"), 1, "is there already, and not empty"),
    ],
)
def test_what_cannot_be_done_is_said(command: tuple[str, ...], code: int, said: str) -> None:
    assert invoke("backup", "kept").code == 0
    ended = invoke(*command)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err


def test_what_is_kept_elsewhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_DATABASE", "postgresql+asyncpg://user:hush@host/{service}")
    ended = invoke("backup", "kept")
    assert ended.code == 0
    assert "NOT in it: service shop, in postgresql+asyncpg://user:" in ended.out
    assert "hush" not in ended.out


@pytest.mark.postgresql
def test_a_relay_says_that_its_log_is_not_the_one_the_services_know(folder: Path) -> None:
    from tidings.cli._acquainted import compare_logs

    async def told() -> list[Any]:
        with structlog.testing.capture_logs() as logs:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await compare_logs(Settings(), "main")
            return [entry for entry in logs if entry["event"] == "relay.other_log"]

    assert asyncio.run(told()) == []
    before = shown("log", "show")["log"]
    after = shown("log", "renew-identity", "--yes")["log"]
    (entry,) = asyncio.run(told())
    assert (entry["log_level"], entry["service"], entry["log"], entry["follows"]) == ("error", "shop", after, before)
    assert invoke("log", "adopt", "--yes").code == 0
    assert asyncio.run(told()) == []


@pytest.mark.parametrize("services", ["no.such.module:shop", "tests.unit.command_line:nobody"])
def test_a_relay_that_cannot_see_the_services_goes_on(services: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tidings.cli._acquainted import compare_logs

    monkeypatch.setenv("TIDINGS_SERVICES", services)

    async def waits() -> None:
        async with asyncio.timeout(0.2):
            await compare_logs(Settings(), "main")

    with pytest.raises(TimeoutError):
        asyncio.run(waits())


def test_a_backup_without_a_log_says_where_it_looked(folder: Path) -> None:
    (folder / "tidings.db").rename(folder / "elsewhere.db")
    ended = invoke("backup", "kept")
    assert (ended.code, ended.out) == (3, "")
    assert f"there is no log at {folder / 'tidings.db'}: go to its folder, or set TIDINGS_STORE" in ended.err
    assert not (folder / "kept").exists()


@pytest.mark.sqlite("a file that was moved")
def test_a_backup_names_a_service_whose_database_is_not_there(folder: Path) -> None:
    (folder / "shop.db").rename(folder / "elsewhere.db")
    ended = invoke("backup", "kept")
    assert ended.code == 0
    assert f"NOT in it: service shop: there is no file {folder / 'shop.db'}" in ended.out
