"""The README's example works when pasted, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_service_works_when_pasted(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "shop.py").write_text(code)
    for run in (1, 2):
        done = subprocess.run(
            [sys.executable, "-W", "error", "shop.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert len(re.findall(r"packing order \w{8} for Iceland", done.stdout)) == 1, (
            f"run {run} handles its own order only"
        )
        assert "packing: settled up to position" in done.stdout


def test_every_test_and_file_that_it_names_exists() -> None:
    named = re.findall(r"`((?:tests|framework)/[\w/.]+\.py)(?:::(\w+))?`", README)
    assert len(named) > 8
    for path, function in named:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert not function or f"def {function}(" in text, f"{path} has no {function}"
