"""A handler with a session hangs and holds the one writer that SQLite has: commands say who, and what to do."""

from __future__ import annotations

import asyncio
import signal
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.integration.commands import Command, Commands
from tests.integration.processes import until
from tidings._support.holders import writer_elsewhere

pytestmark = pytest.mark.sqlite("its one writer")

DESK = """
import asyncio

from sqlalchemy import Column, Integer, MetaData, Table, insert
from sqlalchemy.ext.asyncio import AsyncSession

from tidings import Event, Service

tables = MetaData()
done = Table("done", tables, Column("number", Integer, primary_key=True))
desk = Service("desk", tables=tables)

class Filed(Event):
    number: int

@desk.on(Filed, timeout=3600)
async def file(event: Filed, session: AsyncSession) -> None:
    await session.execute(insert(done).values(number=event.number))
    if event.number == 0:
        await asyncio.Event().wait()
"""
SERVICE = "desk:desk"


async def hanging(commands: Commands, folder: Path) -> Command:
    """Return the process in which a handler hangs, once it holds the writer."""
    (folder / "desk.py").write_text(DESK)
    process = commands.start("run", SERVICE)
    for number in (0, 1):
        await commands.append("Filed", f'{{"number": {number}}}', "files")
    await until(lambda: writer_elsewhere(str(folder / "desk.db")) == process.process.pid, "the writer is held")
    return process


async def test_skip_says_which_handler_of_which_process_holds_the_writer_and_its_steps_work(tmp_path: Path) -> None:
    with Commands(tmp_path, {"TIDINGS_SERVICES": SERVICE}) as commands:
        process = await hanging(commands, tmp_path)
        pid = process.process.pid
        skipping = await commands.run("skip", "files@0", "--yes")
        assert skipping.process.returncode == 3
        said = skipping.err
        assert f"process {pid} on this machine, which runs service 'desk', holds the one writer" in said
        assert "while it runs handler 'file' at event" in said
        assert "of stream 'files'" in said
        assert "Nothing was changed." in said
        assert f"kill {pid}" in said
        assert "give this command again" in said

        process.signal(signal.SIGKILL)
        await process.ended()
        assert (await commands.run("skip", "files@0", "--yes")).process.returncode == 0
        commands.start("run", SERVICE)
        await until(lambda: _done(tmp_path) == [1], "what comes after the skipped event is done")


@pytest.mark.slow("a process is believed for 15 s after it wrote last")
async def test_status_names_the_handler_and_not_the_database(tmp_path: Path) -> None:
    with Commands(tmp_path, {"TIDINGS_SERVICES": SERVICE}) as commands:
        process = await hanging(commands, tmp_path)
        async with asyncio.timeout(120):
            while "holds the one writer" not in (said := (await commands.run("status")).out):
                await asyncio.sleep(1)
        assert f"desk: process {process.process.pid} on this machine, which runs service 'desk', holds" in said
        assert "while it runs handler 'file' at event" in said
        assert "takes no writes" not in said


async def test_somebody_elses_process_that_holds_the_writer_is_named_too(tmp_path: Path) -> None:
    with Commands(tmp_path, {"TIDINGS_SERVICES": SERVICE}) as commands:
        process = await hanging(commands, tmp_path)
        process.signal(signal.SIGKILL)
        await process.ended()
        code = "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('BEGIN IMMEDIATE'); print(1); input()"
        pipe = asyncio.subprocess.PIPE
        other = await asyncio.create_subprocess_exec(
            "python3", "-uc", code, str(tmp_path / "desk.db"), stdin=pipe, stdout=pipe
        )
        assert other.stdout is not None
        await other.stdout.readline()
        skipping = await commands.run("skip", "files@0", "--yes")
        await other.communicate(b"\n")
        assert skipping.process.returncode == 3
        assert f"process {other.pid} on this machine, which is none of service 'desk'" in skipping.err
        assert (await commands.run("skip", "files@0", "--yes")).process.returncode == 0


def _done(folder: Path) -> list[int]:
    with closing(sqlite3.connect(folder / "desk.db")) as connection:
        return [number for (number,) in connection.execute("SELECT number FROM done")]
