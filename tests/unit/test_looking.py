"""What a command says of a database that it cannot look into."""

from __future__ import annotations

import asyncio

import pytest

import tidings.operations.looking as looking
from tidings.errors import DatabaseUnavailable
from tidings.settings import Settings


async def test_a_database_that_never_answers_is_named_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port like a paused PostgreSQL's: the system accepts the connection, and nothing answers."""
    monkeypatch.setattr(looking, "ANSWER_SECONDS", 0.2)
    done = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await done.wait()
        writer.close()

    async with await asyncio.start_server(silent, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        settings = Settings(database=f"postgresql+asyncpg://tidings:secret@127.0.0.1:{port}/shop")
        with pytest.raises(DatabaseUnavailable, match=r"did not answer within 0.2 s: its server is paused") as caught:
            async with asyncio.timeout(10), looking.existing_database(settings, "shop"):
                raise AssertionError("it answered")
        assert "secret" not in str(caught.value)
        done.set()
