"""Every page in `docs/` works when it is followed from top to bottom, in an empty folder, on the embedded default.

A ```` ```python ```` block begins with `# name.py` and is saved under that name. A ```` ```console ```` block holds
commands, each after `$ `, and below it what it prints, where `...` stands for anything; a command is expected to end
with exit code 0, or with N where its line ends in `# exit N`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if "```" in page.read_text(encoding="utf-8")]


class Command(NamedTuple):
    """One command of a page, and what it should print."""

    line: str
    exit: int
    prints: str


def steps(page: str) -> Iterator[tuple[str, str] | Command]:
    """In the order of the page: files to save, as name and text, and commands to run."""
    for kind, block in re.findall(r"^```(python|console)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE):
        if kind == "python":
            name = re.match(r"# ([\w/]+\.py)\n", block)
            assert name is not None, f"a python block begins with '# name.py', not with {block.splitlines()[0]!r}"
            yield name[1], block
            continue
        for text in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            line, _, prints = text.partition("\n")
            said = re.search(r"\s+# exit (\d+)$", line)
            yield Command(line[: said.start()] if said else line, int(said[1]) if said else 0, prints.strip())


def follow(page: str, folder: Path) -> None:
    """Do what the page says. Raises `AssertionError` that names the step which did something else."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDINGS_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {"NO_COLOR": "1", "COLUMNS": "120", "PYTHONWARNINGS": "error"}
    for step in steps(page):
        if not isinstance(step, Command):
            (folder / step[0]).parent.mkdir(parents=True, exist_ok=True)
            (folder / step[0]).write_text(step[1], encoding="utf-8")
            continue
        done = subprocess.run(
            step.line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, timeout=90
        )
        assert done.returncode == step.exit, f"$ {step.line}\n{done.stdout}{done.stderr}"
        wanted = ".*".join(re.escape(part.strip()) for part in step.prints.split("..."))
        assert re.search(wanted, done.stdout + done.stderr, re.DOTALL), (
            f"$ {step.line}\nshould print\n{step.prints}\nand prints\n{done.stdout}{done.stderr}"
        )


@pytest.mark.timeout(300)  # seconds: a page is up to twenty processes, one after the other
@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_page_works_when_it_is_followed(page: Path, tmp_path: Path) -> None:
    follow(page.read_text(encoding="utf-8"), tmp_path)


GOOD = (
    "```python\n# a.py\nprint('one two three')\n```\n```console\n$ python a.py\none ... three\n$ false  # exit 1\n```\n"
)


def test_a_page_that_does_what_it_says_passes(tmp_path: Path) -> None:
    follow(GOOD, tmp_path)


@pytest.mark.parametrize(
    ("was", "now"),
    [("one ... three", "one ... four"), ("# exit 1", "# exit 2"), ("# a.py", "# b.py"), ("# a.py\n", "")],
)
def test_a_page_that_says_what_is_not_so_fails(was: str, now: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        follow(GOOD.replace(was, now), tmp_path)
