"""Which files a restart is for."""

from __future__ import annotations

import os
from pathlib import Path

from tidings.cli._reload import python_files


def names(folder: Path) -> set[str]:
    return {os.path.relpath(path, folder) for path, _, _ in python_files(folder)}


def test_python_files_below_are_watched_without_hidden_folders_and_environments(tmp_path: Path) -> None:
    for name in ("a.py", "sub/deep/b.py", ".git/c.py", "env/pyvenv.cfg", "env/lib/d.py", "node_modules/e.py", "f.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    assert names(tmp_path) == {"a.py", "sub/deep/b.py"}


def test_a_change_a_new_file_and_a_removed_one_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text("1")
    before = set(python_files(tmp_path))
    file.write_text("22")
    changed = set(python_files(tmp_path))
    assert changed != before
    os.utime(file, ns=(1, 1))
    assert set(python_files(tmp_path)) != changed
    (tmp_path / "b.py").write_text("")
    assert names(tmp_path) == {"a.py", "b.py"}
    file.unlink()
    assert names(tmp_path) == {"b.py"}


def test_a_link_in_a_circle_is_not_followed_for_ever(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("")
    (tmp_path / "again").symlink_to(tmp_path)
    assert names(tmp_path) == {"a.py"}
