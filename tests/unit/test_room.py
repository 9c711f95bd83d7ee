"""Whether a file can grow, as its file system says, and who tells when it cannot."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from tidings import EventData
from tidings._support.room import ROOM, no_room
from tidings.errors import StoreUnavailable
from tidings.server import disk
from tidings.stores.sqlite.store import open_sqlite


def system(**facts: int) -> Any:
    return SimpleNamespace(
        **{"f_flag": 0, "f_blocks": 1000, "f_frsize": 4096, "f_bfree": 1000, "f_bavail": 1000} | facts
    )


@pytest.mark.parametrize(
    ("facts", "user", "says"),
    [
        ({}, 1000, None),
        ({"f_bavail": ROOM // 4096}, 1000, None),
        ({"f_bavail": ROOM // 4096 - 1}, 1000, "is full: 1044480 bytes are free"),
        ({"f_bavail": 0}, 0, None),
        ({"f_bavail": 0, "f_bfree": 0}, 0, "is full: 0 bytes are free"),
        ({"f_bavail": 0, "f_bfree": 0, "f_blocks": 0}, 1000, None),
        ({"f_flag": os.ST_RDONLY}, 0, "is read-only"),
    ],
)
def test_a_file_system_says_that_it_is_full_or_read_only(
    tmp_path: Path, facts: dict[str, int], user: int, says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "log.db"
    file.touch()
    monkeypatch.setattr(os, "statvfs", lambda path: system(**facts))
    monkeypatch.setattr(os, "geteuid", lambda: user)
    said = no_room(str(file))
    assert (said is None) == (says is None)
    assert said is None or (says is not None and says in said and str(file) in said)


def test_a_file_that_nobody_may_write_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "log.db"
    file.touch()
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    assert "its permissions" in (no_room(str(file)) or "")
    assert no_room(str(tmp_path / "missing" / "log.db")) is None


async def test_the_server_says_once_that_its_disk_is_full_also_while_nobody_appends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full: str | None = "the disk of log.db is full: 0 bytes are free"
    looks = 0

    def look(path: str) -> str | None:
        nonlocal looks
        looks += 1
        return full

    async def looked(times: int) -> None:
        upto = looks + times
        async with asyncio.timeout(30):
            while looks < upto:
                await asyncio.sleep(0.01)

    monkeypatch.setattr("tidings.stores.sqlite.store.no_room", look)
    monkeypatch.setattr(disk, "LOOK_SECONDS", 0.001)
    store = await open_sqlite(f"sqlite:///{tmp_path}/log.db")
    with capture_logs() as logs:
        watching = asyncio.create_task(disk.watch_disk(store))
        await looked(20)
        full = None
        await looked(3)
        watching.cancel()
    await store.close()
    first, last = logs
    assert (first["event"], last["event"]) == ("log.takes_no_appends", "log.takes_appends")
    assert "is full: 0 bytes" in first["error"]
    assert "df -h" in first["advice"]
    assert last["attempts"] >= 20


async def test_a_store_knows_what_its_last_write_failed_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = await open_sqlite(f"sqlite:///{tmp_path}/log.db")
    await store.append("s", [EventData("T", b"{}")])
    assert store.refused_within(60) is None
    monkeypatch.setattr(store._log.writer, "submit", lambda writes: store._settle([(w, FULL) for w in writes], -1))
    with pytest.raises(StoreUnavailable):
        await store.append("s", [EventData("T", b"{}")])
    assert store.refused_within(60) == str(FULL)
    assert store.refused_within(-1) is None
    monkeypatch.undo()
    await store.append("s", [EventData("T", b"{}")])
    assert store.refused_within(60) is None
    await store.close()


FULL = StoreUnavailable("the event store log.db failed: database or disk is full")
