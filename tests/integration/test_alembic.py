"""Alembic beside Tidings in one database: it sees the application's tables, and migrates while the service runs."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import Counter
from pathlib import Path
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from tests.integration.databases import on_server
from tidings import Context, Event, Runtime, Service, Settings
from tidings.database.engine import connected
from tidings.database.tables import metadata
from tidings.operations.report import Report

MODELS = """
import sqlalchemy as sa

metadata = sa.MetaData()
seats = sa.Table(
    "seats",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("number", sa.Integer, index=True),
)
tidings_are_ours = sa.Table("tidings_board", metadata, sa.Column("id", sa.Integer, primary_key=True))
"""

ENV = """
import asyncio
from alembic import context
from sqlalchemy.ext.asyncio import create_async_engine
from models import metadata
from tidings.alembic import include_object

def migrate(connection):
    context.configure(
        connection=connection, target_metadata=metadata, include_object=include_object, render_as_batch=True
    )
    with context.begin_transaction():
        context.run_migrations()

async def main():
    url = context.config.get_main_option("sqlalchemy.url")
    engine = create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"))
    async with engine.connect() as connection:
        await connection.run_sync(migrate)
        await connection.commit()
    await engine.dispose()

asyncio.run(main())
"""

TEMPLATE = '''"""${message}"""
from alembic import op
import sqlalchemy as sa
revision = ${repr(up_revision)}
down_revision = ${repr(down_revision)}
def upgrade():
    ${upgrades}
def downgrade():
    ${downgrades}
'''


class Booked(Event, key="key"):
    key: str
    number: int


class Confirmed(Event, key="key"):
    key: str


class Alembic:
    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        (folder / "migrations" / "versions").mkdir(parents=True)
        (folder / "migrations" / "env.py").write_text(ENV)
        (folder / "migrations" / "script.py.mako").write_text(TEMPLATE)
        (folder / "models.py").write_text(MODELS)
        (folder / "alembic.ini").write_text(
            "[alembic]\nscript_location = migrations\nprepend_sys_path = .\npath_separator = os\n"
            f"sqlalchemy.url = {url.replace('%', '%%')}\n"
        )

    async def __call__(self, *arguments: str) -> str:
        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-m", "alembic", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    async def revision(self) -> str:
        """Return the migration that autogenerate writes."""
        before = set(self._versions())
        await self("revision", "--autogenerate", "-m", "next")
        (made,) = set(self._versions()) - before
        return made.read_text()

    def _versions(self) -> list[Path]:
        return list((self.folder / "migrations" / "versions").glob("*.py"))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(tmp_path: Path, request: pytest.FixtureRequest) -> str:
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgresql_url"))
    return f"sqlite:///{tmp_path}/seats.db"


def booking() -> Service:
    """A service without `tables=`, because Alembic creates them."""
    service = Service("booking")

    @service.on(Booked)
    async def book(event: Booked, context: Context, session: AsyncSession) -> None:
        await session.execute(sa.text("INSERT INTO seats (number) VALUES (:number)"), {"number": event.number})
        context.emit(f"confirmed-{event.key}", Confirmed(key=event.key))

    return service


async def tables(url: str) -> set[str]:
    async with connected(url) as database, database.reading() as connection:
        return set(await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names()))


async def numbers(url: str) -> Counter[int]:
    async with connected(url) as database, database.reading() as connection:
        return Counter(await connection.scalars(sa.text("SELECT number FROM seats")))


async def settled_and_none_dead(runtime: Runtime) -> Report:
    report = await runtime.settled()
    assert not sum(part.dead_count for part in report.services)
    return report


async def test_autogenerate_sees_the_applications_tables_only_and_migrates_while_the_service_runs(
    tmp_path: Path, url: str
) -> None:
    assert not on_server(), "it has its own parameter for that"
    alembic = Alembic(tmp_path, url)
    service = booking()
    settings = Settings(store=f"sqlite:///{tmp_path}/log.db", bus=f"memory://{uuid4()}", database=url)
    async with Runtime(service, settings=settings) as runtime:
        first = await alembic.revision()
        assert "create_table('seats'" in first
        assert "create_table('tidings_board'" in first, "a table of the application's own, whatever its name"
        assert "drop" not in first.partition("def downgrade")[0]
        await alembic("upgrade", "head")
        assert {"seats", "tidings_board", *metadata.tables} <= await tables(url)

        (tmp_path / "models.py").write_text(
            MODELS.replace(
                "index=True),\n", 'index=True),\n    sa.Column("row", sa.String(3), server_default="A"),\n'
            ).replace('sa.Table("tidings_board"', 'sa.Table("tidings_plan"')
        )
        second = await alembic.revision()
        upgrade = second.partition("def downgrade")[0]
        assert "add_column" in upgrade
        assert "create_table('tidings_plan'" in upgrade
        assert "drop_" not in upgrade, upgrade

        count = 120
        appending = asyncio.create_task(_append(service, count))
        await alembic("upgrade", "head")
        await alembic("downgrade", "-1")
        await appending
        await settled_and_none_dead(runtime)
        assert await numbers(url) == Counter(range(count))
        assert set(metadata.tables) <= await tables(url)
        assert (await runtime.verify()).ok


async def _append(service: Service, count: int) -> None:
    for number in range(count):
        await service.append(f"booked-{number % 7}", Booked(key=str(number % 7), number=number))
        await asyncio.sleep(0.01)


async def test_without_it_every_table_of_ours_would_be_dropped(tmp_path: Path) -> None:
    """Without `include_object`, the test above would fail."""
    url = f"sqlite:///{tmp_path}/seats.db"
    alembic = Alembic(tmp_path, url)
    env = tmp_path / "migrations" / "env.py"
    env.write_text(env.read_text().replace("include_object=include_object,", ""))
    settings = Settings(store=f"sqlite:///{tmp_path}/log.db", bus=f"memory://{uuid4()}", database=url)
    async with Runtime(booking(), settings=settings):
        written = await alembic.revision()
    assert all(f"drop_table('{name}')" in written for name in metadata.tables)
