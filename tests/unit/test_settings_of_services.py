"""A database for one service, and URLs in files."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import sqlite3
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.integration.commands import Commands
from tidings.buses import check_service_name
from tidings.environment import is_further, key_of_service, variable_of
from tidings.errors import ConfigurationError
from tidings.settings import Settings


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("TIDINGS_") and not name.startswith("TIDINGS_TEST_")]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "variable",
    ["TIDINGS_DATABASE__ORDER_HISTORY", "TIDINGS_DATABASE__ORDER-HISTORY", "TIDINGS_DATABASE__order-history"],
)
def test_a_service_has_a_database_of_its_own(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "postgresql+asyncpg://a:hush@host/{service}")
    monkeypatch.setenv("TIDINGS_DATABASE", "sqlite:///{service}.db")
    settings = Settings(bus="amqp://host")
    assert settings.database_of("order-history") == "postgresql+asyncpg://a:hush@host/order-history"
    assert settings.database_of("order") == "sqlite:///order.db"
    assert "hush" not in repr(settings)


def test_a_service_without_one_is_refused_while_others_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_DATABASE__INVENTROY", "postgresql+asyncpg://host/x")
    for bus in ("memory://", "amqp://host"):
        with pytest.raises(ConfigurationError, match="TIDINGS_DATABASE__INVENTORY") as refused:
            Settings(bus=bus).database_of("inventory")
        assert "asyncpg://host/x" not in str(refused.value)


def test_what_code_says_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_DATABASE__STOCK", "sqlite:///environment.db")
    assert Settings(database="sqlite:///code.db").database_of("stock") == "sqlite:///code.db"
    assert Settings(databases={"stock": "sqlite:///code.db"}).database_of("stock") == "sqlite:///code.db"
    assert Settings().database_of("stock") == "sqlite:///environment.db"
    assert Settings(databases={"My-Stock": "sqlite:///{service}.db"}).database_of("my-stock") == "sqlite:///my-stock.db"


def test_settings_can_be_copied_and_sent_to_another_process() -> None:
    settings = Settings(databases={"stock": "sqlite:///a.db"})
    for same in (copy.deepcopy(settings), pickle.loads(pickle.dumps(settings)), settings.model_copy()):
        assert same == settings
        assert same.database_of("stock") == "sqlite:///a.db"


@pytest.mark.parametrize("name", ["STORE", "BUS", "DATABASE", "DATABASE__STOCK"])
def test_a_url_may_be_in_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text("memory://hush\n")
    monkeypatch.setenv(f"TIDINGS_{name}__FILE", str(secret))
    settings = Settings()
    found = settings.database_of("stock") if "DATABASE" in name else getattr(settings, name.lower())
    assert found == "memory://hush"

    monkeypatch.setenv(f"TIDINGS_{name}", "memory://x")
    with pytest.raises(ConfigurationError, match=f"TIDINGS_{name}.*TIDINGS_{name}__FILE"):
        Settings()
    monkeypatch.delenv(f"TIDINGS_{name}")

    for wrong in ("", " \n", "memory://hush memory://b"):
        secret.write_text(wrong)
        with pytest.raises(ConfigurationError, match=f"TIDINGS_{name}__FILE") as refused:
            Settings()
        assert "hush" not in str(refused.value)
    for unreadable in (tmp_path / "missing", tmp_path):
        monkeypatch.setenv(f"TIDINGS_{name}__FILE", str(unreadable))
        with pytest.raises(ConfigurationError, match=f"TIDINGS_{name}__FILE.*cannot be read"):
            Settings()
    secret.write_bytes(b"\xff\xfe")
    monkeypatch.setenv(f"TIDINGS_{name}__FILE", str(secret))
    with pytest.raises(ConfigurationError, match="cannot be read"):
        Settings()


@pytest.mark.parametrize(
    "variable", ["TIDINGS_DATABASE__", "TIDINGS_DATABASES", "TIDINGS_DATABASE_STOCK", "TIDINGS_SERVICES__FILE"]
)
def test_a_variable_that_is_nearly_right_is_refused(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "sqlite:///x.db")
    with pytest.raises(ConfigurationError, match="TIDINGS_DATABASE__"):
        Settings()


def test_two_names_of_one_service_and_an_empty_one_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_DATABASE__STOCK", " ")
    with pytest.raises(ConfigurationError, match="TIDINGS_DATABASE__STOCK is set, but empty"):
        Settings()
    monkeypatch.setenv("TIDINGS_DATABASE__STOCK", "sqlite:///x.db")
    monkeypatch.setenv("TIDINGS_DATABASE__stock", "sqlite:///y.db")
    with pytest.raises(ConfigurationError, match=r"DATABASE__STOCK and .*DATABASE__stock"):
        Settings()
    with pytest.raises(ConfigurationError, match="'stock' is empty"):
        Settings(databases={"stock": ""})


@given(st.from_regex(r"[a-z0-9][a-z0-9_-]{0,30}", fullmatch=True).filter(lambda name: name != "file"))
def test_every_service_can_be_named_in_a_variable(name: str) -> None:
    if name in ("events", "partitions", "relay"):
        return
    check_service_name(name)
    variable = variable_of(name)
    assert is_further(variable)
    assert variable.isascii()
    assert variable.replace("_", "").isalnum(), "a shell can export it"
    assert key_of_service(variable.removeprefix("TIDINGS_DATABASE__")) == key_of_service(name)


TWO = """
import sqlalchemy as sa
from tidings import Event, Service

class Placed(Event):
    number: int

def a_service(name):
    service = Service(name)

    @service.on(Placed)
    async def take(event: Placed) -> None:
        pass

    return service

stock, bills = a_service("stock"), a_service("paid-bills")
"""


async def test_one_command_looks_at_databases_of_two_kinds(tmp_path: Path, postgresql_url: str) -> None:
    """Settings in which each URL has its own place and, where possible, its own password."""
    secret = tmp_path / "bills-url"
    secret.write_text(postgresql_url)
    settings = {
        "TIDINGS_DATABASE__STOCK": f"sqlite:///{tmp_path}/anywhere.sqlite",
        "TIDINGS_DATABASE__PAID_BILLS__FILE": str(secret),
        "TIDINGS_SERVICES": "two:stock,two:bills",
    }
    with Commands(tmp_path, settings) as commands:
        (tmp_path / "two.py").write_text(TWO)
        await commands.append("Placed", '{"number": 1}')
        for service in ("stock", "bills"):
            running = commands.start("run", f"two:{service}")
            async with asyncio.timeout(60):
                while (await commands.run("verify", f"two:{service}")).process.returncode:
                    assert running.process.poll() is None, running.err
            running.process.terminate()
            assert await running.ended() == 0
        verified = await commands.run("verify", "--json")
        assert verified.process.returncode == 0, verified.err
        assert {part["service"] for part in json.loads(verified.out)["services"]} == {"stock", "paid-bills"}
        for command in (("status", "--json"), ("dead", "list")):
            looked = await commands.run(*command)
            assert "Traceback" not in looked.err
            assert looked.process.returncode in (0, 1), looked.err
    with sqlite3.connect(tmp_path / "anywhere.sqlite") as connection:
        assert connection.execute("SELECT DISTINCT service FROM tidings_floors").fetchall() == [("stock",)]
