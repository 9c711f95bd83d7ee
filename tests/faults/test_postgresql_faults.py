"""A service whose database is on a PostgreSQL that is killed, restarted, paused, cut off, closed to it, or full.

Each effect happens once, in order, and the service goes on by itself and says what was wrong.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest

from tests.faults.conftest import Recovered
from tests.faults.proxy import Proxy
from tests.faults.stage import Process, Stage, Traffic, now, until
from tidings.testing.databases import PostgreSQLServer

pytestmark = pytest.mark.faults

SOME = 100
ROLE, PASSWORD = "shop", "secret"
QUICK = "?heartbeat=1"
"""Seconds after which the broker gives up a silent consumer and activates the next: two to three heartbeats."""


class Site:
    """A stage whose service `audit` has its database on a server, with a user that has only the necessary rights."""

    def __init__(self, stage: Stage, server: PostgreSQLServer, url: str, admin: Any) -> None:
        self.stage = stage
        self.server = server
        self.url = url
        """URL of the database for the service."""
        self.admin = admin
        """The administrator's connection to the same database, which is lost when the server ends."""
        self.traffic: Traffic | None = None
        """The process of the service, within `working`."""

    async def more_events(self) -> None:
        """Wait until the log has enough new events that a service at work would have handled some."""
        assert self.traffic is not None
        await self.traffic.reached(3 * SOME)

    async def cut_off(self) -> int:
        """End every connection of the service on the server. Return their number."""
        ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1"
        return len(await self.admin.fetch(ended, ROLE))

    async def connects(self) -> Any:
        """Connect as the service does."""
        return await asyncpg.connect(self.url.replace("+asyncpg", ""))


@pytest.fixture
async def site(tmp_path: Path, amqp_url: str, postgresql_server: PostgreSQLServer) -> AsyncIterator[Site]:
    async with postgresql_server.isolated() as url, AsyncExitStack() as stack:
        admin = await asyncpg.connect(url.replace("+asyncpg", ""))
        stack.push_async_callback(_close, admin)
        place = urlsplit(url)
        await admin.execute(f"DROP ROLE IF EXISTS {ROLE}")
        await admin.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{PASSWORD}'")
        await admin.execute(f'ALTER DATABASE "{place.path[1:]}" OWNER TO {ROLE}')
        await admin.execute(f"GRANT ALL ON SCHEMA public TO {ROLE}")
        stage = stack.enter_context(Stage(tmp_path, amqp_url, url))
        stage.database_url = place._replace(netloc=f"{ROLE}:{PASSWORD}@{place.hostname}:{place.port}").geturl()
        yield Site(stage, postgresql_server, stage.database_url, admin)


async def _close(admin: Any) -> None:
    admin.terminate()


@asynccontextmanager
async def working(site: Site) -> AsyncIterator[Process]:
    """Run a service under traffic. At the end it must be the same process."""
    stage = site.stage
    stage.relay()
    service = stage.service()
    async with stage.traffic() as site.traffic:
        await stage.handles(SOME)
        yield service
    assert service.alive


async def goes_on(site: Site, recovered: Recovered, since: float, seconds: float | None = None) -> None:
    seconds = await site.stage.recovered(since) if seconds is None else seconds
    recovered(await site.stage.keeps_promises(), seconds)


async def test_postgresql_killed(site: Site, recovered: Recovered) -> None:
    async with working(site) as service:
        await asyncio.to_thread(site.server.kill)
        line = await service.says("service.rejoining", "Nothing is lost")
        assert ROLE in line
        assert PASSWORD not in service.log
        await asyncio.to_thread(site.server.start)
        seconds = await site.stage.recovered(now())
    await goes_on(site, recovered, 0, seconds)


async def test_postgresql_killed_again_and_again(site: Site, recovered: Recovered) -> None:
    seconds = 0.0
    async with working(site):
        for _ in range(4):
            await asyncio.to_thread(site.server.kill)
            await asyncio.to_thread(site.server.start)
            seconds = max(seconds, await site.stage.recovered(now()))
            await site.stage.handles(SOME)
    await goes_on(site, recovered, 0, seconds)


async def test_postgresql_restarted(site: Site, recovered: Recovered) -> None:
    async with working(site) as service:
        await asyncio.to_thread(site.server.restart)
        seconds = await site.stage.recovered(now())
        await service.says("service.rejoining", "Nothing is lost")
    await goes_on(site, recovered, 0, seconds)


async def test_postgresql_away_when_the_service_starts(site: Site, recovered: Recovered) -> None:
    async with working(site) as service:
        service.kill()
        await asyncio.to_thread(site.server.stop)
        service.start()
        await service.says("process.waiting", "the database of service audit")
        await asyncio.to_thread(site.server.start)
        seconds = await site.stage.recovered(now())
    await goes_on(site, recovered, 0, seconds)


async def test_postgresql_paused(site: Site, recovered: Recovered) -> None:
    """The server is paused while the traffic appends some events: connections stay open, and nothing answers."""
    async with working(site) as service:
        await asyncio.to_thread(site.server.pause)
        await site.more_events()
        since = now()
        await asyncio.to_thread(site.server.resume)
        seconds = await site.stage.recovered(since)
        assert "service.rejoining" not in service.log, "it had only to wait"
    await goes_on(site, recovered, 0, seconds)


async def test_connections_ended_by_the_server(site: Site, recovered: Recovered) -> None:
    async with working(site) as service:
        for _ in range(5):
            assert await site.cut_off() > 0
            since = now()
            seconds = await site.stage.recovered(since)
        await service.says("service.rejoining", "Nothing is lost")
    await goes_on(site, recovered, 0, seconds)


async def test_connections_cut_by_the_network(site: Site, recovered: Recovered) -> None:
    async with Proxy(site.url) as proxy:
        site.stage.database_url = proxy.url
        async with working(site) as service:
            for _ in range(5):
                assert proxy.connections > 0
                proxy.cut()
                seconds = await site.stage.recovered(now())
            await service.says("service.rejoining", "Nothing is lost")
        await goes_on(site, recovered, 0, seconds)


async def test_connections_in_a_black_hole_for_a_while(site: Site, recovered: Recovered) -> None:
    async with Proxy(site.url) as proxy:
        site.stage.database_url = proxy.url
        async with working(site):
            proxy.black_hole()
            await site.more_events()
            since = now()
            proxy.heal()
            seconds = await site.stage.recovered(since)
        await goes_on(site, recovered, 0, seconds)


async def test_password_revoked_and_given_back(site: Site, recovered: Recovered) -> None:
    async with working(site) as service:
        await site.admin.execute(f"ALTER ROLE {ROLE} PASSWORD 'another'")
        await site.cut_off()
        await service.says("service.rejoining", "password authentication failed", "check user and password")
        await site.admin.execute(f"ALTER ROLE {ROLE} PASSWORD '{PASSWORD}'")
        seconds = await site.stage.recovered(now())
    await goes_on(site, recovered, 0, seconds)


async def test_database_takes_no_writes_for_a_while(site: Site, recovered: Recovered) -> None:
    """The server refuses writes like a primary that has become a standby. No event is tried, let alone given up."""
    async with working(site) as service:
        await site.admin.execute(f"ALTER ROLE {ROLE} SET default_transaction_read_only = on")
        await site.cut_off()
        await service.says("service.rejoining", "read-only transaction", "name the primary")
        await site.admin.execute(f"ALTER ROLE {ROLE} RESET default_transaction_read_only")
        await site.cut_off()
        seconds = await site.stage.recovered(now())
        assert "event.retrying" not in service.log
    await goes_on(site, recovered, 0, seconds)


async def test_no_connection_is_left(site: Site, recovered: Recovered) -> None:
    """Another client takes all connections as soon as the service has lost its own."""
    greedy: list[Any] = []
    async with working(site) as service:
        await site.admin.execute(f"ALTER ROLE {ROLE} CONNECTION LIMIT 12")

        async def take_all() -> None:
            while "max_connections" not in service.log:
                try:
                    greedy.append(await site.connects())
                except asyncpg.TooManyConnectionsError:
                    await site.admin.execute(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = $1 AND pid <> ALL($2)",
                        ROLE,
                        [connection.get_server_pid() for connection in greedy],
                    )

        async with asyncio.timeout(60):
            await take_all()
        await service.says("service.rejoining", "too many connections", "raise its max_connections")
        for connection in greedy:
            await connection.close()
        seconds = await site.stage.recovered(now())
    await goes_on(site, recovered, 0, seconds)


async def test_deadlock_with_somebody_else(site: Site, recovered: Recovered) -> None:
    """Two transactions wait for each other, and PostgreSQL ends one of them: always the service's."""
    async with working(site) as service:
        tool = await asyncpg.connect(site.stage.database_server.replace("+asyncpg", ""))  # type: ignore[union-attr]
        await tool.execute("SET deadlock_timeout = '1h'")  # so that it is the other side that notices
        for _ in range(3):
            told = service.log.count("deadlock detected")
            async with tool.transaction():
                await tool.execute("SELECT FROM tidings_watermarks FOR UPDATE")
                waiting = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND wait_event_type = 'Lock'"
                await _until_positive(site.admin, waiting)
                await tool.execute("LOCK TABLE audit IN ACCESS EXCLUSIVE MODE")
            await until(lambda told=told: service.log.count("deadlock detected") > told, "the deadlock is told")  # type: ignore[misc]
            seconds = await site.stage.recovered(now())
        await service.says("group.undone", "so it is done again", "deadlock detected")
        assert "event.retrying" not in service.log
        await tool.close()
    await goes_on(site, recovered, 0, seconds)


async def _until_positive(admin: Any, statement: str) -> None:
    async with asyncio.timeout(30):
        while not await admin.fetchval(statement, ROLE):
            await asyncio.sleep(0.02)


async def test_service_paused_while_another_takes_over_then_resumed(site: Site, recovered: Recovered) -> None:
    """The zombie, paused within a handler, goes on with watermarks that are no longer true: none of its effects is
    kept."""
    stage = site.stage
    stage.relay()
    active = stage.service(bus=stage.bus + QUICK)
    await active.says("service.connected")
    standby = stage.service(bus=stage.bus + QUICK)
    await standby.says("service.connected")
    async with stage.traffic():
        await stage.handles(SOME)
        await stage.errand("errand", 4.0)
        await active.says("errand.begun")
        await pause_between_commits(site, active)
        seconds = await stage.recovered(now(), seconds=150)
        await standby.says("errand.begun")
        await stage.answers("errand")
        active.resume()
        await active.says("service.rejoining", "another process")
        await stage.handles(SOME)
    await goes_on(site, recovered, 0, seconds)


async def pause_between_commits(site: Site, process: Process) -> None:
    """A process that is paused within a transaction keeps its row locks. No other process can take over until it goes
    on, is killed, or the server's idle_in_transaction_session_timeout ends the transaction."""
    while True:
        process.pause()
        busy = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND state <> 'idle'"
        if not await site.admin.fetchval(busy, ROLE):
            return
        process.resume()
        await asyncio.sleep(0.01)
