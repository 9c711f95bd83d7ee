"""Settings, adapters by URL, and passwords that are never shown."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tidings import adapters
from tidings.adapters import check_bus, check_store, open_bus, open_store
from tidings.buses import EventBus
from tidings.errors import ConfigurationError
from tidings.settings import Settings
from tidings.stores import EventStore
from tidings.urls import redact

pytestmark = pytest.mark.lower_bounds

NAMES = ("TIDINGS_STORE", "TIDINGS_BUS", "TIDINGS_DATABASE")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


# ---- the environment -----------------------------------------------------------------


def test_without_any_setting_everything_is_embedded() -> None:
    settings = Settings()
    assert (settings.store, settings.bus, settings.database) == ("sqlite:///tidings.db", "memory://", None)
    assert settings.database_of("stock") == "sqlite:///stock.db"


def test_the_environment_is_read_when_settings_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, url in zip(NAMES, ("memory://a", "amqp://host", "postgresql+asyncpg://host/{service}"), strict=True):
        monkeypatch.setenv(name, url)
    monkeypatch.setenv("TIDINGS_TEST_AMQP", "not ours to refuse")
    settings = Settings()
    assert (settings.store, settings.bus) == ("memory://a", "amqp://host")
    assert settings.database_of("stock") == "postgresql+asyncpg://host/stock"


@pytest.mark.parametrize("bus", ["amqp://u:hush@host", "amqps://u:hush@host/v", "AMQP://u:hush@host"])
def test_a_networked_bus_needs_a_database_named(bus: str) -> None:
    with pytest.raises(ConfigurationError, match=r"'stock'.*TIDINGS_DATABASE.*stock") as refused:
        Settings(bus=bus).database_of("stock")
    assert "hush" not in str(refused.value)
    assert Settings(bus=bus, database="sqlite:///mine.db").database_of("stock") == "sqlite:///mine.db"


def test_an_embedded_bus_needs_none_however_its_scheme_is_written() -> None:
    assert Settings(bus="MEMORY://x").database_of("stock") == "sqlite:///stock.db"


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_setting_is_refused_not_taken_for_the_default(empty: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, empty)
        with pytest.raises(ConfigurationError):
            Settings()
        monkeypatch.delenv(name)


def test_settings_are_frozen_and_strangers_are_refused_without_their_values() -> None:
    with pytest.raises(ValidationError):
        Settings().store = "memory://"  # type: ignore[misc]
    with pytest.raises(ValidationError) as refused:
        Settings(buss="amqp://u:hush@host")  # type: ignore[call-arg]
    assert "hush" not in str(refused.value)


def test_settings_can_be_shown() -> None:
    settings = Settings(bus="amqp://u:hush@host", database="postgresql://u:hush@host/x?password=hush")
    for shown in (repr(settings), str(settings), f"{settings}"):
        assert "hush" not in shown
        assert "amqp://u:***@host" in shown


# ---- adapters ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["sqllite:///x", "sqlite:/x", "sqlite", "", "://", "http://host", "amqp:/u:hush@host", "u:hush@host"]
)
def test_a_url_that_fits_no_adapter_is_refused_with_the_choices(url: str) -> None:
    for what, choice in (("store", "sqlite://"), ("bus", "amqp://")):
        with pytest.raises(ConfigurationError, match=f"must begin with one of .*{choice}") as refused:
            Settings.model_validate({what: url})
        assert "hush" not in str(refused.value)


async def test_opening_refuses_what_fits_none() -> None:
    for opening in (open_store("amqp://u:hush@host"), open_bus("sqlite:///x")):
        with pytest.raises(ConfigurationError, match=r"no (store|bus) adapter") as refused:
            async with opening:
                pass
        assert "hush" not in str(refused.value)


async def test_embedded_adapters_open_and_close() -> None:
    async with open_store(f"memory://{uuid4()}") as store, open_bus(f"memory://{uuid4()}") as bus:
        assert isinstance(store, EventStore)
        assert isinstance(bus, EventBus)


async def test_a_missing_package_is_answered_with_the_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("pamqp", "tidings.buses.rabbitmq", "aiormq"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pamqp", None)
    with pytest.raises(ConfigurationError, match=r"'pamqp'.*pip install 'tidings\[rabbitmq\]'") as refused:
        async with open_bus("amqp://u:hush@host"):
            pass
    assert "hush" not in str(refused.value)


async def test_a_broken_module_of_our_own_is_not_taken_for_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tidings.buses.rabbitmq.bus", None)
    with pytest.raises(ImportError):
        async with open_bus("amqp://host"):
            pass


# ---- adapters of other packages ------------------------------------------------------


def announce(folder: Path, package: str, group: str, scheme: str, value: str) -> None:
    """Write the metadata of an installed package, as pip does."""
    metadata = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{scheme} = {value}\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages that this process has not read yet."""
    monkeypatch.syspath_prepend(tmp_path)
    adapters._installed.cache_clear()
    yield tmp_path
    adapters._installed.cache_clear()


def test_two_packages_with_one_scheme_are_named_when_it_is_used(site: Path) -> None:
    announce(site, "tidings-nats", "tidings.buses", "nats", "tidings_nats:open_nats")
    announce(site, "another-nats", "tidings.buses", "NATS", "another:opened")
    check_bus("memory://")  # they are of no concern to anybody else
    with pytest.raises(ConfigurationError, match=r"two installed packages .*nats://") as refused:
        check_bus("nats://u:hush@host")
    for told in ("'tidings-nats' (tidings_nats:open_nats)", "'another-nats' (another:opened)", "pip uninstall"):
        assert told in str(refused.value)
    assert "hush" not in str(refused.value)


def test_a_package_cannot_take_a_scheme_of_ours_in_silence(site: Path) -> None:
    announce(site, "impostor", "tidings.stores", "sqlite", "impostor:opened")
    with pytest.raises(ConfigurationError, match=r"'tidings' .*sqlite://|sqlite://.*'tidings' "):
        Settings()


def test_a_scheme_that_nobody_has_is_answered_with_those_installed_and_their_extras(site: Path) -> None:
    announce(site, "tidings-nats", "tidings.buses", "nats", "tidings_nats:open_nats [tls]")
    with pytest.raises(ConfigurationError) as refused:
        check_bus("kafka://host")
    for told in (
        "amqp:// (pip install 'tidings[rabbitmq]')",
        "memory://,",
        "nats:// (pip install 'tidings-nats[tls]')",
    ):
        assert told in str(refused.value)
    with pytest.raises(ConfigurationError) as refused:
        check_store("kafka://host")
    for scheme, extra in (("esdb", "eventstoredb"), ("kurrentdb", "kurrentdb"), ("kdb+discover", "kurrentdb")):
        assert f"{scheme}:// (pip install 'tidings[{extra}]')" in str(refused.value)


async def test_what_an_adapter_of_another_package_lacks_is_named(site: Path) -> None:
    (site / "tidings_nats.py").write_text("import a_client_that_nobody_has\n")
    announce(site, "tidings-nats", "tidings.buses", "nats", "tidings_nats:open_nats")
    announce(site, "other", "tidings.buses", "other", "tidings.urls:open_other")
    announce(site, "gone", "tidings.buses", "gone", "a_module_that_is_gone:open")
    with pytest.raises(ConfigurationError, match=r"pip install 'a_client_that_nobody_has'"):
        async with open_bus("nats://host"):
            pass
    with pytest.raises(ConfigurationError, match=r"package 'other' announces 'tidings.urls:open_other'"):
        async with open_bus("other://host"):
            pass
    with pytest.raises(ModuleNotFoundError):
        async with open_bus("gone://host"):
            pass


def test_an_installation_without_our_own_adapters_says_how_to_mend_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "entry_points", lambda group: [])
    adapters._installed.cache_clear()
    try:
        with pytest.raises(ConfigurationError, match=r"announces no bus adapters .*pip install -e"):
            check_bus("memory://")
    finally:
        adapters._installed.cache_clear()


def test_installed_packages_are_looked_at_once_in_a_process_and_not_at_import() -> None:
    code = (
        "import importlib.metadata as metadata\n"
        "asked = []\n"
        "found = metadata.entry_points\n"
        "metadata.entry_points = lambda **group: asked.append(group) or found(**group)\n"
        "import tidings, tidings.settings\n"
        "asked.clear()\n"  # pydantic asks for its own
        "service = tidings.Service('stock')\n"
        "assert asked == [], asked\n"
        "for _ in range(3): tidings.Settings()\n"
        "assert [group['group'] for group in asked] == ['tidings.stores', 'tidings.buses'], asked\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# ---- passwords -----------------------------------------------------------------------

SHOWN = {
    "amqp://host:5672/vhost": "amqp://host:5672/vhost",
    "amqp://user:hush@host:5672/vhost": "amqp://user:***@host:5672/vhost",
    "amqp://:hush@host": "amqp://***@host",
    "amqp://hush@host": "amqp://***@host",
    "amqp://user:hu@sh@host": "amqp://user:***@host",
    "amqp://user:hu/sh@host": "amqp://user:***@host",
    "amqp://user:hu#sh@host": "amqp://user:***@host",
    "amqp://user:hu?sh@host/v": "amqp://user:***@host/v",
    "amqp://user:hu[sh@host": "amqp://user:***@host",
    "amqp://user:hush@host:port/": "amqp://user:***@host:port/",
    "amqp://a:hush@one,b:hush@two": "amqp://a:***@two",
    "amqp://host/?password=hush": "amqp://host/",
    "amqp://u:hush@host/?mail=a@b&password=hush": "amqp://u:***@b",
    "amqp://host/v#hush": "amqp://host/v",
    "postgresql+asyncpg://user:hush@/db?host=/tmp": "postgresql+asyncpg://user:***@/db",
    "mssql+pyodbc:///?odbc_connect=PWD%3Dhush": "mssql+pyodbc:///",
    "mssql://host/db;PWD=hush": "mssql://host/db",
    "sqlite+pysqlcipher://:hush@/file.db": "sqlite+pysqlcipher://***@/file.db",
    "sqlite:////data/me@home/x.db?mode=ro": "sqlite:////data/me@home/x.db",
    "memory://name": "memory://name",
    "sqlite": "sqlite",
    "": "",
    "user:hush@host": "<not a URL>",
    "amqp:/user:hush@host": "<not a URL>",
    "amqp//user:hush@host": "<not a URL>",
    "host=db password=hush": "<not a URL>",
    " amqp://user:hush@host": "<not a URL>",
    "hush@host": "<not a URL>",
}


@pytest.mark.parametrize(("url", "shown"), SHOWN.items(), ids=[url or "empty" for url in SHOWN])
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert redact(url) == shown


SECRET = "s3CReT"
passwords = st.tuples(st.text(max_size=8), st.text(max_size=8)).map(SECRET.join)
TEMPLATES: list[Callable[[str], str]] = [
    lambda password: f"amqp://user:{password}@host:5672/vhost",
    lambda password: f"amqps://:{password}@host",
    lambda password: f"amqp://user:{password}@host/?heartbeat=5",
    lambda password: f"postgresql+asyncpg://user:{password}@host/db",
    lambda password: f"sqlite+pysqlcipher://:{password}@/file.db",
    lambda password: f"wrong://user:{password}@host",
    lambda password: f"amqp:/user:{password}@host",
    lambda password: f"user:{password}@host",
]


@pytest.mark.parametrize("template", range(len(TEMPLATES)))
@given(password=passwords)
def test_no_password_is_ever_shown(template: int, password: str) -> None:
    assert SECRET not in redact(TEMPLATES[template](password))


@given(password=passwords)
def test_no_error_of_settings_says_a_password(password: str) -> None:
    url = f"amqp://user:{password}@host"
    attempts: list[Callable[[], Any]] = [
        lambda: Settings(store=url),
        lambda: Settings(bus="x" + url),
        lambda: Settings(bus=url).database_of("stock"),
    ]
    for attempt in attempts:
        with pytest.raises(ConfigurationError) as refused:
            attempt()
        assert SECRET not in str(refused.value)


def test_a_misspelt_variable_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_BUSS", "amqp://host")
    with pytest.raises(ConfigurationError, match="TIDINGS_BUSS is no setting"):
        Settings()
