"""A notebook outlives its process, and whoever removed it while its owner goes on."""

from __future__ import annotations

from pathlib import Path

from tidings.database.notebook import Notebook


def test_what_is_under_way_can_be_read_by_others(tmp_path: Path) -> None:
    path = str(tmp_path / "begun")
    notebook = Notebook(path, 3)
    notebook.begin(7, 200)
    notebook.begin(9, 3)
    notebook.end(7)
    assert Notebook.read(path) == {9: 3}


def test_one_that_was_removed_by_a_take_over_is_made_again_with_what_is_under_way(tmp_path: Path) -> None:
    path = str(tmp_path / "begun")
    notebook = Notebook(path, 3)
    notebook.begin(7, 200)
    Notebook.discard(path)
    assert Notebook.read(path) is None
    notebook.keep()
    assert Notebook.read(path) == {7: 200}
    notebook.begin(8, 1)
    notebook.end(7)
    assert Notebook.read(path) == {8: 1}


def test_one_that_is_still_there_is_kept_as_it_is(tmp_path: Path) -> None:
    path = str(tmp_path / "begun")
    notebook = Notebook(path, 3)
    notebook.begin(7, 200)
    inode = Path(path).stat().st_ino
    notebook.keep()
    notebook.end(7)
    assert Path(path).stat().st_ino == inode
    assert Notebook.read(path) == {}


def test_a_closed_one_leaves_no_file_and_notes_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "begun")
    notebook = Notebook(path, 3)
    notebook.close()
    notebook.begin(7, 200)
    notebook.keep()
    assert not Path(path).exists()
    assert not notebook.open


def test_its_place_on_the_disk_is_taken_before_it_is_mapped(tmp_path: Path) -> None:
    """Writing to a mapped page for which a full disk has no room ends the process with SIGBUS."""
    path = tmp_path / "notebook"
    notebook = Notebook(str(path), 65)
    assert path.stat().st_blocks * 512 >= path.stat().st_size > 0
    notebook.close()
