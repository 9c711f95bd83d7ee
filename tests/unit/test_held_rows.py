"""Which held events have their turn, asked of the database, against the rules in plain Python, on random rows."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest

from tidings.database.engine import open_database
from tidings.database.held_due import AT_ONCE
from tidings.database.held_events import HeldEvent, Line
from tidings.database.held_rows import HeldRows
from tidings.database.tables import dead, floors
from tidings.protocol.position import ALL_BUCKETS, bucket_of
from tidings.stores import RecordedEvent

LOG = UUID(int=7)
NOW, LONGEST = 1_000.0, 600.0
KEYS = [(f"key{number}{end}", line) for number in range(2) for end in ("", "\0") for line in ("", "count\0")]
"""Half of the texts are such that a database cannot hold them as they are."""


def held_event(position: int, line: Line, attempts: int, due: float) -> HeldEvent:
    event = RecordedEvent(position, "orders", position, "Placed", b"{}", b"", True, UUID(int=position).bytes, 0)
    return HeldEvent(
        event, bucket_of(line[0]), line[0], "place", attempts, 0, due, "because", None, handlers_line=line[1]
    )


def random_rows(dice: random.Random) -> tuple[list[HeldEvent], list[tuple[int, Line, bool]]]:
    """Held events, and dead letters (position, line, whether it blocks the line)."""
    rows, letters = [], []
    for position in range(1, dice.randrange(2, 40)):
        key, fate = dice.choice(KEYS), dice.random()
        if fate < 0.2:
            letters.append((position, key, dice.random() < 0.5))
        elif fate < 0.6:
            rows.append(held_event(position, key, 0, dice.choice([0.0, NOW + 100])))
        else:
            rows.append(held_event(position, key, dice.randrange(1, 9), NOW + dice.choice([-100, -1, 1, 100, 9_000])))
    return rows, letters


def have_their_turn(rows: list[HeldEvent], letters: list[tuple[int, Line, bool]], besides: set[Line]) -> list[int]:
    """Return the held events that the rules allow: the oldest of each key, if it is due or only waited, and its
    followers up to a letter that holds the key."""
    found: list[int] = []
    for key in set(KEYS) - besides:
        graves = [position for position, of, holds in letters if of == key and holds]
        mine = [row for row in rows if row.line == key and row.event.position < min(graves, default=10**9)]
        if not mine:
            continue
        first = mine[0]
        if first.attempts == 0 or first.due <= NOW or first.due > NOW + LONGEST:
            found += [row.event.position for row in mine]
    return sorted(found)


@pytest.mark.parametrize("seed", range(25))
async def test_what_is_due_is_what_the_rules_say(tmp_path: Path, seed: int) -> None:
    dice = random.Random(seed)
    rows, letters = random_rows(dice)
    besides = set(dice.sample(KEYS, dice.randrange(3)))
    after = set(dice.sample(KEYS, 3)) - besides
    mine = HeldRows("shop", LOG, ALL_BUCKETS)
    async with open_database(f"sqlite:///{tmp_path}/shop.db") as database, database.transaction() as connection:
        own = {"service": "shop", "log": str(LOG)}
        await connection.execute(floors.insert().values(own | {"first_bucket": 0, "last_bucket": 255, "position": 99}))
        await mine.hold(connection, rows)
        for position, (key, line), holds in letters:
            letter = {
                "kind": "handler",
                "attempts": 1,
                "reason": "no",
                "died_at": datetime.now(UTC),
                "bucket": bucket_of(key),
            }
            await connection.execute(
                dead.insert().values(
                    own | letter | {"position": position, "key": key, "line": line, "holds_key": holds}
                )
            )
        whole = await mine.due.find(connection, NOW, LONGEST, besides)
        part = await mine.due.find(connection, NOW, LONGEST, besides, after)
        blocked = await mine.blocked(connection)
    turn = have_their_turn(rows, letters, besides)
    assert [row.event.position for row in whole] == turn
    waited = {row.line for row in rows if row.event.position in turn and row.attempts == 0 and row.line not in after}
    first = {key: next(row for row in rows if row.line == key) for key in {row.line for row in rows}}
    unasked = {key for key in waited if first[key].attempts == 0}
    expected = [row.event.position for row in rows if row.event.position in turn and row.line not in unasked]
    assert [row.event.position for row in part] == expected
    keys = [row.line for row in rows] + [key for _, key, holds in letters if holds]
    assert blocked == {
        bucket: {key: keys.count(key) for key in keys if bucket_of(key[0]) == bucket}
        for bucket in [bucket_of(key) for key, _ in keys]
    }


async def test_so_many_are_read_at_once_and_the_oldest_first(tmp_path: Path) -> None:
    mine = HeldRows("shop", LOG, ALL_BUCKETS)
    rows = [held_event(position, KEYS[0], int(position == 1), 0.0) for position in range(1, AT_ONCE + 100)]
    async with open_database(f"sqlite:///{tmp_path}/shop.db") as database, database.transaction() as connection:
        own = {"service": "shop", "log": str(LOG), "first_bucket": 0, "last_bucket": 255, "position": 10_000}
        await connection.execute(floors.insert().values(own))
        await mine.hold(connection, rows)
        found = await mine.due.find(connection, NOW, LONGEST, ())
    assert [row.event.position for row in found] == list(range(1, AT_ONCE + 1))


@pytest.mark.parametrize("attempts", [0, 1])
async def test_what_has_no_handler_has_no_turn_and_is_no_trial(tmp_path: Path, attempts: int) -> None:
    mine, line, other = HeldRows("shop", LOG, ALL_BUCKETS), ("key0", ""), ("key1", "")
    first, second, free = (held_event(at, of, attempts, NOW) for at, of in ((1, line), (2, line), (3, other)))
    first = first._replace(event=first.event._replace(type="Gone"))
    gone = {("place", "Gone")}
    async with open_database(f"sqlite:///{tmp_path}/shop.db") as database, database.transaction() as connection:
        own = {"service": "shop", "log": str(LOG)}
        await connection.execute(floors.insert().values(own | {"first_bucket": 0, "last_bucket": 255, "position": 99}))
        await mine.hold(connection, [first, second, free])
        assert [row.event.position for row in await mine.due.find(connection, NOW, LONGEST, ())] == [1, 2, 3]
        for after in (None, {line, other}):
            found = await mine.due.find(connection, NOW, LONGEST, (), after, (), gone)
            assert [row.event.position for row in found] == [3], "the next of its key waits behind it"
        for newest in (True, False):
            trials = await mine.due.candidate(connection, "place", {other}, newest=newest, gone=gone)
            assert trials == []
