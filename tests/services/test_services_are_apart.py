"""No service imports another, nor the demo: each can be deployed with nothing but itself and Tidings."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVICES = Path(__file__).parents[2] / "services"
APART = ("order", "inventory", "payment", "shipping", "sales", "importer")


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            assert node.module is not None
            yield from (
                [f"services.{alias.name}" for alias in node.names] if node.module == "services" else [node.module]
            )


@pytest.mark.parametrize("name", APART)
def test_a_service_imports_no_other(name: str) -> None:
    files = list((SERVICES / name).rglob("*.py"))
    assert files
    strangers = {
        f"{path.name} imports {module}"
        for path in files
        for module in imported(path)
        if module.startswith("services") and module.split(".")[1:2] != [name]
    }
    assert not strangers


@pytest.mark.parametrize("name", APART)
def test_a_service_is_imported_without_the_others_and_without_doing_anything(name: str, tmp_path: Path) -> None:
    """Import the service in a new process in an empty folder, which stays empty."""
    program = f"import sys, services.{name}; print(*sorted(m for m in sys.modules if m.startswith('services.')))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(SERVICES.parent)},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = done.stdout.split()
    assert f"services.{name}" in loaded
    assert all(module.split(".")[1] == name for module in loaded)
    assert list(tmp_path.iterdir()) == []
