"""What CONTRIBUTING.md points at is there: rooms, files and the names in them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACES = re.findall(r"`([\w/]+\.py)::(\w+)`", TEXT)


@pytest.mark.parametrize(("file", "name"), PLACES, ids=[f"{file}-{name}" for file, name in PLACES])
def test_each_place_is_where_it_says(file: str, name: str) -> None:
    source = (ROOT / "framework" / "tidings" / file).read_text(encoding="utf-8")
    assert re.search(rf"^(class |def |async def |){name}\b", source, re.MULTILINE), f"{file} has no {name}"


def test_all_seven_places_are_named() -> None:
    table = TEXT.partition("## Where to look")[2].partition("##")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| Where")]
    assert len(rows) == 7
    assert all(re.search(r"`[\w/]+\.py::\w+`", row) for row in rows)


def test_the_rooms_are_those_that_import_linter_keeps_in_the_same_order() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    rooms = [room.strip() for layer in layers for room in layer.split("|")]
    table = TEXT.partition("## The rooms")[2].partition("Read the ports")[0]
    named = [
        room for row in re.findall(r"^\| (`[^|]*) \|", table, re.MULTILINE) for room in re.findall(r"`(\w+)`", row)
    ]
    assert named == rooms


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`?((?:tests|deploy|docs)/[\w/.-]*\w)", TEXT))))
def test_every_path_exists(path: str) -> None:
    assert (ROOT / path).exists()
