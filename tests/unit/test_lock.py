"""The lock file agrees with pyproject.toml, and the audit never takes silence for a clean answer."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT: Final = Path(__file__).parents[2]
PYPROJECT: Final = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT: Final = PYPROJECT["project"]
LOCK: Final = (ROOT / "deploy/local/dev.lock").read_text(encoding="utf-8")
RENEW: Final = "make lock writes it anew"
ENTRY: Final = re.compile(
    r"^(?P<name>[\w.-]+)==(?P<version>[\w.+!]+)(?: ; (?P<marker>[^\\\n]+?))?"
    r"(?: \\\n    --hash=sha256:[0-9a-f]{64})+$",
    re.MULTILINE,
)
PYTHONS: Final = ("3.11", "3.12", "3.13", "3.14")


def needed(extra: str | None, seen: set[str]) -> Iterator[Requirement]:
    """Yield what an extra needs, or the project itself; `tidings[extra]` stands for what that extra needs."""
    for text in PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name != "tidings":
            yield requirement
            continue
        for other in sorted(requirement.extras - seen):
            seen.add(other)
            yield from needed(other, seen)


def locked() -> dict[str, list[re.Match[str]]]:
    found: dict[str, list[re.Match[str]]] = {}
    for entry in ENTRY.finditer(LOCK):
        found.setdefault(canonicalize_name(entry["name"]), []).append(entry)
    return found


DEV: Final = [*needed(None, set()), *needed("dev", set())]
ALL: Final = [
    *(Requirement(text) for text in PYPROJECT["build-system"]["requires"]),
    *(Requirement(text) for text in PROJECT["dependencies"]),
    *(Requirement(text) for texts in PROJECT["optional-dependencies"].values() for text in texts),
]


@pytest.mark.parametrize("requirement", DEV, ids=str)
def test_what_development_needs_is_locked_at_a_version_that_is_allowed(requirement: Requirement) -> None:
    entries = locked().get(canonicalize_name(requirement.name), [])
    for python in PYTHONS:
        environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
        there = [entry for entry in entries if entry["marker"] is None or Marker(entry["marker"]).evaluate(environment)]
        assert len(there) == 1, f"{requirement.name} is there {len(there)} times for Python {python}: {RENEW}"
        assert Version(there[0]["version"]) in requirement.specifier, RENEW


@pytest.mark.parametrize("requirement", [each for each in ALL if each.name != "tidings"], ids=str)
def test_every_dependency_has_a_lowest_version_and_one_from_which_on_it_is_not_allowed(
    requirement: Requirement,
) -> None:
    assert {specifier.operator for specifier in requirement.specifier} == {">=", "<"}


def test_every_line_of_the_lock_file_is_a_version_with_hashes_and_names_no_place() -> None:
    rest = ENTRY.sub("", LOCK).strip().splitlines()
    assert len(rest) == 1, rest[:3]
    assert rest[0].startswith("#")
    assert "://" not in LOCK
    assert "--index" not in LOCK


PIP_AUDIT = """#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
service = arguments[arguments.index("--vulnerability-service") + 1]
answer = json.loads(pathlib.Path(__file__).with_name("answers.json").read_text())[service]
if isinstance(answer, str):
    print("WARNING: a hint", file=sys.stderr)
    sys.exit(answer)
pathlib.Path(arguments[arguments.index("--output") + 1]).write_text(json.dumps({{"dependencies": answer}}))
sys.exit(any(package.get("vulns") for package in answer))
"""
CLEAN: Final = [{"name": "one", "version": "1", "vulns": []}]
HIT: Final = [{"name": "one", "version": "1", "vulns": [{"id": "X-1", "fix_versions": ["2"]}]}]
SKIPPED: Final = [{"name": "one", "skip_reason": "not found: one"}]


@pytest.mark.parametrize(
    ("answers", "code", "says"),
    [
        ({"pypi": CLEAN, "osv": "unused"}, 0, "1 packages, no known vulnerability (pypi)"),
        ({"pypi": HIT, "osv": "unused"}, 1, "one 1: X-1, fixed in 2"),
        ({"pypi": SKIPPED, "osv": CLEAN}, 0, "no known vulnerability (osv)"),
        ({"pypi": "no network", "osv": HIT}, 1, "one 1: X-1"),
        ({"pypi": SKIPPED, "osv": "no name server"}, 2, "pypi: 1 of 1 packages are not known there; not found: one"),
        ({"pypi": "no network", "osv": "no name server"}, 2, "osv: no name server"),
    ],
    ids=["clean", "vulnerable", "known to the second", "unreachable and vulnerable", "unknown", "no network"],
)
def test_the_audit_is_clean_only_where_every_package_was_looked_up(
    answers: dict[str, Any], code: int, says: str, tmp_path: Path
) -> None:
    program = tmp_path / "pip-audit"
    program.write_text(PIP_AUDIT.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    command = [sys.executable, str(ROOT / "deploy/local/audit"), str(program), str(tmp_path / "installed.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done
    assert says in done.stdout + done.stderr
    assert ("is not known" in done.stderr) == (code == 2)
