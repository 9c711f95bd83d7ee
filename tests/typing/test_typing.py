"""What type checkers say of code that uses Tidings: of right code nothing, of wrong code the expected errors.

In `cases`, a comment at the end of a line names the errors that it should have, such as `# mypy=arg-type
pyright=reportArgumentType`. A line without one should have none.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

CASES = Path(__file__).parent / "cases"
ROOT = CASES.parents[2]
PYRIGHT = os.environ.get("TIDINGS_TEST_PYRIGHT")
Errors = dict[tuple[str, int], list[str]]


def expected(checker: str) -> Errors:
    """Return the error codes that the cases name, by file and line."""
    found: Errors = {}
    for file in sorted(CASES.glob("*.py")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if named := re.search(rf"  # .*\b{checker}=([\w,-]+)", line):
                found[file.name, number] = sorted(named[1].split(","))
    return found


def run(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(600)  # seconds: mypy may have to read everything for the first time
def test_mypy_finds_what_is_wrong_and_nothing_else() -> None:
    modules = [
        argument for file in sorted(CASES.glob("*.py")) for argument in ("-m", f"tests.typing.cases.{file.stem}")
    ]
    output = run(sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-context", *modules)
    found: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for line in output.splitlines():
        if ": note: " not in line:
            error = re.fullmatch(r"tests/typing/cases/(\w+\.py):(\d+): error: .*\[([\w-]+)\]", line)
            assert error is not None, line
            found[error[1], int(error[2])].append(error[3])
    assert {where: sorted(codes) for where, codes in found.items()} == expected("mypy"), output
    assert len(found) > 20


@pytest.mark.skipif(PYRIGHT is None, reason="`make pyright` runs it, in an environment that has Node for it")
@pytest.mark.timeout(600)
def test_pyright_finds_what_is_wrong_and_nothing_else() -> None:
    output = run(str(PYRIGHT), "--pythonpath", sys.executable, "--outputjson", str(CASES))
    found: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for error in json.loads(output)["generalDiagnostics"]:
        found[Path(error["file"]).name, error["range"]["start"]["line"] + 1].append(error.get("rule", error["message"]))
    assert {where: sorted(codes) for where, codes in found.items()} == expected("pyright"), output
    assert len(found) > 20
