"""MODULE:SERVICE: found, or refused with what there is instead."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tidings import Service, Settings
from tidings.cli._exits import USAGE, Refused
from tidings.cli._find import find, find_service, find_services, is_application
from tidings.errors import ConfigurationError

pytestmark = pytest.mark.lower_bounds

MODULES = {
    "onlyone": "from tidings import Service\nstock = Service('stock')\nalias = stock\n",
    "several": (
        "from tidings import Service\nstock = Service('stock')\norders = Service('order')\nnumber = 5\n"
        "async def app(scope, receive, send): ...\nclass Holder:\n    inner = Service('inner')\n"
    ),
    "nothing": "number = 5\n",
    "broken": "def (:\n",
    "raising": "raise RuntimeError('no luck today')\n",
    "running": "import asyncio\nasync def main(): ...\ncoroutine = main()\ntry:\n    asyncio.run(coroutine)\n"
    "finally:\n    coroutine.close()\n",
    "importing": "import surely_not_installed_xyz\n",
    "refusing": "from tidings import Service\nService('NOT A NAME')\n",
    "namesake": "from tidings import Service\nstock = Service('stock')\n",
}


@pytest.fixture(autouse=True)
def _modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, source in MODULES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def refused(target: str) -> str:
    with pytest.raises(Refused) as caught:
        find_service(target)
    assert caught.value.code == USAGE
    return str(caught.value)


def test_a_service_is_found_in_a_module_of_the_current_folder() -> None:
    assert find_service("several:orders").name == "order"
    assert find_service("several:Holder.inner").name == "inner"


def test_a_module_alone_is_enough_when_it_has_one_service() -> None:
    assert find_service("onlyone").name == "stock"


def test_a_module_alone_is_refused_when_it_has_several_services_or_none() -> None:
    assert "Its services: several:stock, several:orders." in refused("several")
    assert "It has no services." in refused("nothing")


def test_a_missing_attribute_names_the_services_that_the_module_has() -> None:
    assert refused("several:stocks") == (
        "module 'several' has no 'stocks'. Its services: several:stock, several:orders."
    )


def test_what_is_no_service_is_named() -> None:
    assert "'several:number' is a int, not a tidings.Service" in refused("several:number")
    assert "Only 'tidings run' takes a web application" in refused("several:app")


def test_a_missing_module_names_the_folder(tmp_path: Path) -> None:
    text = refused("absent.stock:stock")
    assert "no module 'absent' can be found" in text
    assert str(tmp_path) in text


def test_what_a_module_lacks_is_told_apart_from_the_module() -> None:
    text = refused("importing:stock")
    assert "module 'importing' needs 'surely_not_installed_xyz', which is not installed here" in text
    assert "importing.py:1" in text


@pytest.mark.parametrize(("name", "said"), [("broken", "SyntaxError"), ("raising", "RuntimeError: no luck today")])
def test_a_module_that_cannot_be_imported_says_why_and_where(name: str, said: str) -> None:
    text = refused(f"{name}:stock")
    assert said in text
    assert f"{name}.py:1" in text


async def test_a_module_that_runs_its_program_on_import_is_told_to_guard_it() -> None:
    """Most commands import it within their event loop."""
    assert "put that under  if __name__ == '__main__':" in refused("running:stock")


def test_an_error_of_tidings_in_the_module_passes_as_it_is() -> None:
    with pytest.raises(ConfigurationError, match="cannot name a service"):
        find("refusing:stock")


@pytest.mark.parametrize("target", ["", ":stock", "./several.py:stock", "services/several", ".several:stock"])
def test_what_cannot_be_a_module_is_refused(target: str) -> None:
    assert "is no MODULE:SERVICE" in refused(target)


def test_arguments_come_before_the_setting_and_the_setting_before_nothing() -> None:
    settings = Settings(services="several:orders, onlyone")
    assert [service.name for service in find_services((), settings).values()] == ["order", "stock"]
    assert list(find_services(("onlyone",), settings)) == ["onlyone"]
    assert find_services((), Settings(), needed=False) == {}
    with pytest.raises(Refused, match="TIDINGS_SERVICES"):
        find_services((), Settings())


def test_a_service_may_be_called_by_its_name_where_the_setting_names_it() -> None:
    settings = Settings(services="several:stock,several:orders")
    assert list(find_services(("order",), settings)) == ["several:orders"]
    assert list(find_services(("several:stock", "stock"), settings)) == ["several:stock"]
    with pytest.raises(Refused, match="no module 'orders' can be found"):
        find_services(("orders",), settings)


def test_a_file_is_refused_with_the_module_that_it_is() -> None:
    assert refused("several.py") == ("'several.py' is a file: write the module as Python imports it, several:SERVICE")


def test_a_service_named_twice_counts_once_and_two_of_one_name_are_refused() -> None:
    assert len(find_services(("onlyone", "onlyone:alias"), Settings())) == 1
    with pytest.raises(Refused, match="two services with one name"):
        find_services(("onlyone", "namesake"), Settings())


def test_applications_are_what_takes_scope_receive_and_send() -> None:
    async def application(scope: object, receive: object, send: object) -> None: ...

    assert is_application(application)
    for other in (Service("stock"), Service, 5, lambda: None, dict, print.__class__):
        assert not is_application(other)
