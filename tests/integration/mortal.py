"""A process with a service that one event ends: `python -m tests.integration.mortal FOLDER KIND`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.databases import on_server
from tests.integration.embedded import QUICK, Happened, audit, embedded, tables
from tidings import Service

POISON = 31
KINDS = ("session", "free", "slow", "leaves", "healed", "rejoins", "late", "second")


def mortal(kind: str, folder: Path) -> Service:
    """The service. `session` and `free` kill the process at once, `slow` while other handlers run. `leaves` hangs, and
    the process ends cleanly. `healed` handles everything. `rejoins` is cut off in the middle first, and kills the
    process when it runs again. `late` adds a handler that is given the past of the log and kills the process. With
    `second`, each event has another handler before this one and a third one after it."""
    service = Service("audit", tables=tables)
    service.poisoned = asyncio.Event()  # type: ignore[attr-defined]

    async def poison() -> None:
        with (folder / "runs").open("a") as runs:
            runs.write("run\n")
        if kind == "slow":
            await asyncio.sleep(0.1)
        if kind == "leaves":
            service.poisoned.set()  # type: ignore[attr-defined]
            await asyncio.Event().wait()
        if kind == "rejoins" and not service.poisoned.is_set():  # type: ignore[attr-defined]
            service.poisoned.set()  # type: ignore[attr-defined]
            async with service.engine.begin() as connection:  # as a replay or a skip does it
                await connection.execute(sa.text("UPDATE tidings_watermarks SET replays = replays + 1"))
            await asyncio.Event().wait()
        os.kill(os.getpid(), signal.SIGKILL)

    async def with_session(event: Happened, session: AsyncSession) -> None:
        if event.n == POISON and kind not in ("healed", "late"):
            await poison()
        await session.execute(sa.insert(audit).values(key=event.key, n=event.n))

    async def without(event: Happened) -> None:
        if event.n == POISON:
            await poison()
        if kind == "slow":
            await asyncio.sleep(0.2)
        insert = postgresql.insert if on_server() else sqlite.insert
        async with service.engine.begin() as connection:  # at least once, so the note makes it once
            row = {"key": event.key, "n": event.n, "note": str(event.n)}
            await connection.execute(insert(audit).values(row).on_conflict_do_nothing())

    async def harmless(event: Happened) -> None: ...

    if kind == "second":
        service.on(Happened, name="before", retry=QUICK)(harmless)
    plain = kind in ("free", "slow", "rejoins", "second")
    service.on(Happened, name="handle", retry=QUICK)(without if plain else with_session)
    if kind == "second":
        service.on(Happened, name="behind", retry=QUICK)(harmless)
    if kind == "late":

        @service.on(Happened, since="start", retry=QUICK)
        async def late(event: Happened) -> None:
            if event.n == POISON:
                await poison()

    return service


async def main(folder: Path, kind: str) -> None:
    assert kind in KINDS
    service = mortal(kind, folder)
    async with embedded(folder, service) as world:
        if kind == "leaves":
            await service.poisoned.wait()  # type: ignore[attr-defined]
        else:
            await world.settled()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
