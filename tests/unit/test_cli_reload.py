"""Which changes a restart is for."""

from __future__ import annotations

from pathlib import Path

import pytest
from watchfiles import Change

from tidings.cli._reload import is_code


def made(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


@pytest.mark.parametrize("change", Change)
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.py", True),
        ("sub/deep/b.py", True),
        ("f.txt", False),
        ("tidings.db-wal", False),
        (".git/c.py", False),
        ("sub/__pycache__/c.py", False),
        ("env/lib/d.py", False),
        ("node_modules/e.py", False),
    ],
)
def test_python_files_are_code_outside_hidden_directories_and_environments(
    tmp_path: Path, name: str, expected: bool, change: Change
) -> None:
    folder = tmp_path / ".hidden" / "project"  # what is above is nobody's choice
    made(folder, "env/pyvenv.cfg", name)
    if change is Change.deleted:
        (folder / name).unlink()
    assert is_code(folder, change, str(folder / name)) is expected


def test_a_directory_that_was_moved_here_is_code_when_python_files_are_in_it(tmp_path: Path) -> None:
    made(tmp_path, "package/deep/a.py", "pictures/b.png", "env/pyvenv.cfg", "env/c.py", "tools/.cache/d.py")
    came = {name: is_code(tmp_path, Change.added, str(tmp_path / name)) for name in ("package", "pictures", "env")}
    assert came == {"package": True, "pictures": False, "env": False}
    assert not is_code(tmp_path, Change.added, str(tmp_path / "tools"))
    assert not is_code(tmp_path, Change.modified, str(tmp_path / "package"))
