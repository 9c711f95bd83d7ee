"""What `import tidings` gives, and what it must not cost."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import tidings

HEAVY = (
    "sqlalchemy",
    "aio_pika",
    "aiormq",
    "pamqp",
    "grpc",
    "fastapi",
    "uvicorn",
    "opentelemetry",
    "pydantic_settings",
)


@pytest.mark.parametrize("name", tidings.__all__)
def test_every_name_on_offer_is_there_and_documented(name: str) -> None:
    assert getattr(tidings, name) is not None
    if isinstance(getattr(tidings, name), type):
        assert getattr(tidings, name).__doc__


def test_every_public_name_is_on_offer() -> None:
    source = Path(str(tidings.__file__)).read_text(encoding="utf-8")
    imported = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tidings.")
        for alias in node.names
    }
    assert imported == set(tidings.__all__)
    assert len(tidings.__all__) == len(set(tidings.__all__))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        _ = tidings.Unknown


def _fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_tidings_imports_nothing_heavy() -> None:
    declares = "from tidings import Aggregate, Context, Event, EventStore, Repository, Retry, Service"
    assert _fresh(f"import sys; {declares}; print([name for name in {HEAVY!r} if name in sys.modules])") == "[]"


def test_the_command_line_hears_signals_before_it_imports_what_takes_its_time() -> None:
    slow = ("pydantic", "structlog", "typer", "asyncio")
    assert _fresh(f"import sys, tidings.cli; print([name for name in {slow!r} if name in sys.modules])") == "[]"


def test_declaring_a_service_imports_nothing_heavy() -> None:
    code = (
        "import sys, tidings\n"
        "class Placed(tidings.Event): pass\n"
        "service = tidings.Service('stock')\n"
        "@service.on(Placed)\n"
        "async def handle(event: Placed, context: tidings.Context) -> None: ...\n"
    )
    assert _fresh(code + f"print([name for name in {HEAVY!r} if name in sys.modules])") == "[]"


def test_names_that_come_later_come_when_they_are_asked_for() -> None:
    later = "Settings, Relay, Runtime, open_bus, open_store"
    assert _fresh(f"from tidings import {later}; import sys; print('aio_pika' in sys.modules)") == "False"


def test_every_exported_name_of_every_core_module_is_there() -> None:
    core = [
        module.name
        for module in pkgutil.iter_modules(tidings.__path__)
        if not module.ispkg and module.name != "__main__"
    ]
    for name in core:
        module = importlib.import_module(f"tidings.{name}")
        assert module.__doc__, f"{name} must say what it is"
        missing = [export for export in getattr(module, "__all__", ()) if not hasattr(module, export)]
        assert not missing, f"{name}.__all__"


def test_the_version_is_that_of_the_distribution() -> None:
    project = Path(__file__).parents[2] / "pyproject.toml"
    assert f'version = "{tidings.__version__}"' in project.read_text(encoding="utf-8")
