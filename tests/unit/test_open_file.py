"""Whether the file of a database is still the one that was opened: looked at by its path, at most once a second."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tidings.database.engine import open_database
from tidings.database.open_file import LOOK_SECONDS, OpenFile
from tidings.errors import DatabaseMoved


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def moved(file: Path) -> None:
    file.rename(file.with_name("elsewhere.db"))


def deleted(file: Path) -> None:
    file.unlink()


def replaced(file: Path) -> None:
    other = file.with_name("other.db")
    other.write_bytes(file.read_bytes())
    other.replace(file)


def with_its_folder(file: Path) -> None:
    file.parent.rename(file.parent.with_name("away"))


def folder_is_a_file(file: Path) -> None:
    with_its_folder(file)
    file.parent.write_text("")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "var" / "shop.db"
    path.parent.mkdir()
    path.write_bytes(b"rows")
    return path


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (moved, "it was moved or deleted"),
        (deleted, "it was moved or deleted"),
        (replaced, "another file was put in its place"),
        (with_its_folder, "it was moved or deleted"),
        (folder_is_a_file, "it was moved or deleted"),
    ],
)
def test_a_file_that_is_not_the_one_that_was_opened_is_named(
    file: Path, harm: Callable[[Path], None], says: str
) -> None:
    opened = OpenFile(str(file), Clock())
    opened.opened()
    opened.check()
    harm(file)
    with pytest.raises(DatabaseMoved) as caught:
        opened.check()
    assert str(file) in str(caught.value)
    assert says in str(caught.value)
    assert "Put the file back" in str(caught.value)
    assert not caught.value.waiting_helps


def test_it_is_looked_at_at_most_once_a_second(file: Path) -> None:
    clock = Clock()
    opened = OpenFile(str(file), clock)
    opened.opened()
    file.unlink()
    clock.now += LOOK_SECONDS / 2
    opened.look()
    clock.now += LOOK_SECONDS / 2
    with pytest.raises(DatabaseMoved):
        opened.look()
    opened.look()
    clock.now += LOOK_SECONDS
    with pytest.raises(DatabaseMoved):
        opened.look()


def test_a_link_that_leads_to_another_file_is_noticed(file: Path) -> None:
    link = file.with_name("link.db")
    link.symlink_to(file)
    opened = OpenFile(str(link), Clock())
    opened.opened()
    link.unlink()
    link.symlink_to(file.with_name("other.db"))
    with pytest.raises(DatabaseMoved):
        opened.check()


def test_a_process_that_goes_to_another_folder_still_finds_its_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    opened = OpenFile(file.name, Clock())
    opened.opened()
    monkeypatch.chdir("/")
    opened.check()


def test_a_file_system_that_does_not_answer_says_nothing_about_the_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = OpenFile(str(file), Clock())
    opened.opened()

    def unreachable(path: str) -> None:
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(os, "stat", unreachable)
    opened.check()


async def test_no_connection_makes_a_new_file_where_the_opened_one_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "shop.db"
    async with open_database(f"sqlite:///{file}") as database, database.reading():
        moved(file)
        with pytest.raises(DatabaseMoved):
            async with database.transaction():  # the pool's only connection is taken, so it makes another one
                pass
        assert not file.exists()
    async with open_database(f"sqlite:///{file}") as another:  # whoever starts afresh may
        assert another.file == str(file)
