"""A bus in a package of somebody else is installed, found by its scheme, and keeps the port's rules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tidings.testing.bus_conformance import BusConformance

PROJECT = Path(__file__).parents[2]
STRANGER = PROJECT / "tests" / "strangers" / "tidings_filebus"
RULES = sum(name.startswith("test_") for name in dir(BusConformance))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that has the package as pip installs it: its module and its metadata. It needs no network."""
    folder = tmp_path_factory.mktemp("installed")
    offline = ("--no-index", "--no-build-isolation", "--no-deps", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", str(folder), str(STRANGER)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def python(folder: Path | None, bus: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the package installed (or not), and `bus` as TIDINGS_BUS."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TIDINGS_", "PYTEST_"))}
    environment |= {"TIDINGS_BUS": bus, "PYTHONPATH": str(folder or "")}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=PROJECT)


def test_a_bus_of_another_package_passes_the_public_suite(installed: Path, tmp_path: Path) -> None:
    suite = ("-m", "pytest", "-q", "-p", "no:cacheprovider", str(STRANGER / "conformance.py"))
    done = python(installed, f"file://{tmp_path}/bus.db", *suite)
    assert done.returncode == 0, done.stdout[-5_000:] + done.stderr
    passed = re.search(r"^(\d+) passed", done.stdout, re.MULTILINE)
    assert passed is not None
    assert int(passed[1]) > RULES  # every rule, some with several cases
    assert "skipped" not in done.stdout


def test_the_command_line_asks_a_bus_that_it_does_not_know(installed: Path, tmp_path: Path) -> None:
    url = f"file://{tmp_path}/bus.db"

    def topology(command: str, *options: str) -> subprocess.CompletedProcess[str]:
        return python(installed, url, "-m", "tidings", "topology", command, "services.inventory:inventory", *options)

    for command, code, state in (("plan", 0, "missing"), ("apply", 0, "fits"), ("plan", 0, "fits")):
        done = topology(command)
        assert (done.returncode, done.stderr) == (code, "")
        assert re.search(rf"^queue +tidings\.inventory +{state}", done.stdout, re.MULTILINE), done.stdout
    for command, options, told in (
        ("export", (), "has no users and permissions"),
        ("diff", ("--management", "http://localhost:1"), "cannot list its queues"),
    ):
        done = topology(command, *options)
        assert (done.returncode, told in done.stderr) == (2, True), done.stderr


def test_without_the_package_its_scheme_is_unknown(tmp_path: Path) -> None:
    done = python(None, f"file://{tmp_path}/bus.db", "-c", "import tidings; tidings.Settings()")
    assert done.returncode != 0
    assert "no bus adapter for 'file://" in done.stderr
