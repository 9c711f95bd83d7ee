"""The audit finds out every broken promise: one that could not would prove nothing."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.faults.auditing import EVERY, Asked, Counted, broken_promises

KEYS = 3


@pytest.fixture
def asked() -> Asked:
    """Return a log of twelve events at every second position, with their answers."""
    found = Asked()
    for number in range(12):
        found.counted[2 * number] = f"id{number}", Counted(key=f"key{number % KEYS}", number=number, at=0.0)
        if number % EVERY == 0:
            found.noted.append(("audit", f"id{number}"))
    return found


def done(folder: Path, numbers: Iterable[int], dead: Iterable[int] = ()) -> dict[str, Path]:
    """Create a service's database with these effects, in this order."""
    database = folder / "audit.db"
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute(
            "CREATE TABLE audit (id INTEGER PRIMARY KEY, position, event_id, key, number, appended, handled, pid)"
        )
        connection.execute("CREATE TABLE tidings_dead (position, reason)")
        connection.executemany(
            "INSERT INTO audit (position, event_id, key, number, appended, handled, pid) VALUES (?, ?, ?, ?, 0, 0, 0)",
            [(2 * number, f"id{number}", f"key{number % KEYS}", number) for number in numbers],
        )
        connection.executemany("INSERT INTO tidings_dead VALUES (?, 'because')", [(2 * number,) for number in dead])
    return {"audit": database}


def acknowledged(numbers: Iterable[int]) -> dict[int, int]:
    return {number: 2 * number for number in numbers}


def swapped(first: int, second: int) -> Iterator[int]:
    for number in range(12):
        yield {first: second, second: first}.get(number, number)


def test_what_was_done_once_and_in_order_breaks_nothing(asked: Asked, tmp_path: Path) -> None:
    assert broken_promises(asked, acknowledged(range(12)), done(tmp_path, range(12))) == []


def test_keys_may_overtake_each_other(asked: Asked, tmp_path: Path) -> None:
    assert broken_promises(asked, acknowledged(range(12)), done(tmp_path, swapped(4, 5))) == []


def test_order_within_a_key_is_kept(asked: Asked, tmp_path: Path) -> None:
    (broken,) = broken_promises(asked, acknowledged(range(12)), done(tmp_path, swapped(4, 4 + KEYS)))
    assert broken.startswith("audit: key1 out of order")


def test_a_lost_effect_is_named(asked: Asked, tmp_path: Path) -> None:
    (broken,) = broken_promises(asked, acknowledged(range(12)), done(tmp_path, set(range(12)) - {7}))
    assert broken == "audit: lost: no effect of 1 of 12 events, the first: [14]"


def test_a_repeated_effect_is_named(asked: Asked, tmp_path: Path) -> None:
    (broken,) = broken_promises(asked, acknowledged(range(12)), done(tmp_path, [*range(12), 11]))
    assert broken == "audit: twice: more than one effect of 1 events, the first: [22]"


def test_an_acknowledged_append_that_the_log_does_not_have_is_named(asked: Asked, tmp_path: Path) -> None:
    (broken,) = broken_promises(asked, acknowledged(range(13)), done(tmp_path, range(12)))
    assert broken == "acknowledged at 24, not there in the log: number 12"


def test_an_append_that_is_twice_in_the_log_is_found(asked: Asked, tmp_path: Path) -> None:
    asked.counted[24] = "again", asked.counted[22][1]
    broken = broken_promises(asked, acknowledged(range(11)), done(tmp_path, range(12)))
    assert "1 numbers are twice in the log" in broken


@pytest.mark.parametrize(
    ("answers", "words"), [(["id0", "id5"], "lost: no answer"), (["id0", "id5", "id10", "id0"], "twice")]
)
def test_each_answer_is_in_the_log_once(asked: Asked, tmp_path: Path, answers: list[str], words: str) -> None:
    asked.noted = [("audit", answer) for answer in answers]
    (broken,) = broken_promises(asked, acknowledged(range(12)), done(tmp_path, range(12)))
    assert words in broken


def test_only_what_must_fail_is_dead(asked: Asked, tmp_path: Path) -> None:
    broken = broken_promises(asked, acknowledged(range(12)), done(tmp_path, range(12), dead=[3]))
    assert "audit: dead at 6: because" in broken
    id_, event = asked.counted[8]
    asked.counted[8] = id_, event.model_copy(update={"fate": "fail"})
    (tmp_path / "other").mkdir()
    databases = done(tmp_path / "other", set(range(12)) - {4}, dead=[4])
    assert broken_promises(asked, acknowledged(range(12)), databases) == []
