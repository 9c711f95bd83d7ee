"""The measures of every room and of the services: a module is one idea long, and a function fits on a screen."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
MODULE: Final = 450
"""Lines of a module at most."""
FUNCTION: Final = 60
"""Lines of a function at most, with its docstring."""
LONGER: Final = {
    "framework/tidings/errors.py": "one tree, drawn at its top, with the words of each error",
    "framework/tidings/testing/store_conformance.py": "a class that an adapter's test inherits: each method is a rule",
    "framework/tidings/testing/bus_conformance.py": "a class that an adapter's test inherits: each method is a rule",
    "framework/tidings/stores/eventstoredb/grpc.py": "one connection, whose flow control and calls share its state",
}
"""Modules that may be longer, and why."""

MODULES: Final = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("framework/tidings", "services")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Yield each function's name and its number of lines, decorators not counted."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or 0) - node.lineno + 1


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_functions_stay_within_the_measures(name: str) -> None:
    if name not in LONGER:
        assert len(MODULES[name].splitlines()) <= MODULE
    assert {what: lines for what, lines in functions(MODULES[name]) if lines > FUNCTION} == {}


def test_what_is_measured_is_there_and_no_exception_is_left_over() -> None:
    assert {"framework/tidings/delivery/pipeline.py", "services/order/order.py"} <= MODULES.keys()
    assert dict(functions("class A:\n    @b\n    async def c(self):\n        def d(): pass\n")) == {"c": 2, "d": 1}
    assert [name for name in LONGER if len(MODULES[name].splitlines()) <= MODULE] == []
