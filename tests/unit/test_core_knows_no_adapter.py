"""Only adapters, their entry points and the two rooms that are made of them name an adapter's modules."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import grimp

PROJECT: Final = Path(__file__).parents[2] / "pyproject.toml"
MADE_OF_ADAPTERS: Final = ("tidings.server", "tidings.testing")
"""The server serves the SQLite store, and speaks the EventStoreDB adapter's protocol; test brokers are RabbitMQ's."""


def adapters() -> set[str]:
    """The packages and modules that the entry points lead to, below the ports' rooms."""
    groups = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["entry-points"]
    opened = [groups[f"tidings.{port}"].values() for port in ("stores", "buses")]
    modules = {value.partition(":")[0] for values in opened for value in values}
    return {".".join(module.split(".")[:3]) for module in modules}


def within(module: str, rooms: Iterable[str]) -> bool:
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def test_no_module_of_the_core_imports_an_adapter_not_even_inside_a_function() -> None:
    known = adapters()
    assert known == {
        "tidings.stores.sqlite",
        "tidings.stores.eventstoredb",
        "tidings.stores.postgresql",
        "tidings.buses.memory",
        "tidings.buses.rabbitmq",
    }
    graph = grimp.build_graph("tidings", cache_dir=None)
    named = [
        f"{module} imports {imported}"
        for module in sorted(graph.modules)
        if not within(module, known) and not within(module, MADE_OF_ADAPTERS)
        for imported in sorted(graph.find_modules_directly_imported_by(module))
        if within(imported, known)
    ]
    assert named == []


def test_adapters_do_not_know_each_other() -> None:
    known = adapters()
    graph = grimp.build_graph("tidings", cache_dir=None)
    mixed = [
        f"{module} imports {imported}"
        for adapter in known
        for module in sorted(graph.modules)
        if within(module, [adapter])
        for imported in sorted(graph.find_modules_directly_imported_by(module))
        if within(imported, known - {adapter})
    ]
    assert mixed == []


def test_no_module_of_the_core_names_an_adapter_in_a_string() -> None:
    """As `importlib.import_module` would take it, which no import graph shows."""
    package = PROJECT.parent / "framework" / "tidings"
    named = []
    for file in sorted(package.rglob("*.py")):
        module = ".".join(("tidings", *file.relative_to(package).with_suffix("").parts)).removesuffix(".__init__")
        if within(module, [*adapters(), *MADE_OF_ADAPTERS]):
            continue
        source = file.read_text(encoding="utf-8")
        named += [f"{module} names {adapter}" for adapter in sorted(adapters()) if f'"{adapter}' in source]
    assert named == []
