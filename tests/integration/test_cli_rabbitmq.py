"""The command line over a real RabbitMQ: relay, standby and services as processes, topology, status."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import aio_pika
import pytest

from tests.integration.commands import Command, Commands
from tests.integration.processes import until
from tidings import open_bus
from tidings.buses import Subscription
from tidings.database.engine import open_database
from tidings.database.tables import floors


@pytest.fixture
def commands(tmp_path: Path, amqp_url: str) -> Iterator[Commands]:
    settings = {
        "TIDINGS_BUS": amqp_url,
        "TIDINGS_DATABASE": "sqlite:///{service}.db",
        "TIDINGS_SERVICES": "shop:shop",
    }
    with Commands(tmp_path, settings) as opened:
        yield opened


def objects(command: Command) -> list[dict[str, Any]]:
    return [json.loads(line) for line in command.out.splitlines()]


async def healthy(commands: Commands) -> None:
    """Wait until `status` prints this."""
    async with asyncio.timeout(60):
        while (await commands.run("status")).process.returncode != 0:
            await asyncio.sleep(0.2)


async def test_relay_and_service_carry_an_event_are_seen_by_status_and_end_with_0(commands: Commands) -> None:
    relay, service = commands.start("relay"), commands.start("run", "shop")
    await commands.append("Placed", '{"number": 1}')
    await until(lambda: commands.handled == ["placed 1 by version 1"], "it is handled")
    await healthy(commands)
    (state,) = objects(await commands.run("status", "--json"))
    (part,) = state["services"]
    assert (part["queue"], part["ready"], part["consumers"], part["pending"]) == ("fits", 0, 1, 0)
    assert (await commands.run("verify")).process.returncode == 0
    for command in (service, relay):
        command.signal(signal.SIGTERM)
        assert await command.ended() == 0
    ended = await commands.run("status")
    assert ended.process.returncode == 1
    assert "UNHEALTHY  shop: nobody consumes queue tidings.shop; tidings run shop:shop" in ended.out


async def test_a_second_relay_waits_as_a_standby_says_so_and_takes_over(commands: Commands) -> None:
    service = commands.start("run", "shop")
    first = commands.start("relay", "--name=main")
    await until(lambda: "relay.leading" in first.err, "the first leads")
    second = commands.start("relay", "--name=main")
    await until(lambda: "bus.lock_waiting" in second.err, "the second waits")
    other = commands.start("relay", "--name=another")
    await until(lambda: "relay.leading" in other.err, "a relay of another name leads beside it")
    assert "relay.leading" not in second.err
    first.process.kill()
    await until(lambda: "relay.leading" in second.err, "the second takes over")
    await commands.append("Placed", '{"number": 1}')
    await until(lambda: commands.handled == ["placed 1 by version 1"], "it is handled once")
    for command in (second, other, service):
        command.signal(signal.SIGINT)
        assert await command.ended() == 0


async def test_a_standby_ends_with_0_too(commands: Commands) -> None:
    assert (await commands.run("topology", "apply")).process.returncode == 0
    first = commands.start("relay")
    await until(lambda: "relay.leading" in first.err, "the first leads, because somebody would hear it")
    second = commands.start("relay")
    await until(lambda: "bus.lock_waiting" in second.err, "the second waits")
    second.signal(signal.SIGTERM)
    assert await second.ended() == 0


async def test_topology_is_planned_without_being_made_then_applied(commands: Commands) -> None:
    for _ in range(2):
        plan = await commands.run("topology", "plan", "--json")
        assert plan.process.returncode == 0
        assert [(thing["kind"], thing["name"], thing["state"]) for thing in objects(plan)] == [
            ("exchange", "tidings.events", "missing"),
            ("queue", "tidings.shop", "missing"),
        ]
    diff = await commands.run("topology", "diff")
    assert diff.process.returncode == 1
    assert [line.split()[:3] for line in diff.out.splitlines()[1:]] == [
        ["exchange", "tidings.events", "missing"],
        ["queue", "tidings.shop", "missing"],
    ]
    applied = await commands.run("topology", "apply")
    assert applied.process.returncode == 0
    assert applied.out.splitlines()[2].split() == ["queue", "tidings.shop", "fits", "0", "0", "keep"]
    diff = await commands.run("topology", "diff")
    assert (diff.process.returncode, diff.out) == (0, "No differences.\n")


async def test_a_queue_of_somebody_else_is_named_and_left_alone(commands: Commands, amqp_url: str) -> None:
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        await channel.declare_queue("tidings.shop", durable=True)
        for name in ("diff", "apply"):
            command = await commands.run("topology", name)
            assert command.process.returncode == 1
            assert "tidings.shop: queue 'tidings.shop'" in command.out
            assert "rabbitmqctl delete_queue tidings.shop" in command.out
        await channel.declare_queue("tidings.shop", passive=True)


class _Management(BaseHTTPRequestHandler):
    """The part of RabbitMQ's management API that is used."""

    answers: ClassVar[dict[str, object]] = {
        "exchanges": [
            {"destination": "tidings.shop", "destination_type": "queue"},
            {"destination": "tidings.unheard-of", "destination_type": "queue"},
            {"destination": "tidings.served-elsewhere", "destination_type": "queue"},
        ],
        "queues": [
            {
                "name": "tidings.shop",
                "messages_ready": 0,
                "consumers": 1,
                "arguments": {"x-delivery-limit": -1},
                "policy": "crashes",
                "operator_policy": None,
                "effective_policy_definition": {"delivery-limit": 20},
            },
            {"name": "tidings.unheard-of", "messages_ready": 1159, "consumers": 0},
            {"name": "tidings.served-elsewhere", "messages_ready": 5, "consumers": 1},
            {"name": "tidings.relay.main", "messages_ready": 0, "consumers": 0},
            {"name": "somebody-else", "messages_ready": 0, "consumers": 0},
        ],
        "bindings": [
            {"source": source, "destination": destination, "destination_type": kind}
            for source, destination, kind in (
                ("", "tidings.shop", "queue"),
                ("tidings.events", "tidings.shop", "queue"),
                ("tidings.events", "tidings.partitions", "exchange"),
                ("tidings.events", "tidings.served-elsewhere", "queue"),
                ("tidings.events", "listener", "queue"),
                ("tidings.events", "copies", "exchange"),
                ("tidings.partitions", "tidings.shop.7", "queue"),
                ("amq.topic", "tidings.shop", "queue"),
                ("amq.topic", "somebody-else", "queue"),
            )
        ],
    }

    def do_GET(self) -> None:
        kind = re.fullmatch(r"/api/(exchanges|queues|bindings)/[^/]+(?:/tidings\.events/bindings/source)?", self.path)
        found = None if kind is None else self.answers[kind[1]]
        self.send_response(401 if "Authorization" not in self.headers else 200 if found is not None else 404)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""


async def test_queues_that_nobody_serves_are_shown(commands: Commands, amqp_url: str) -> None:
    assert (await commands.run("topology", "apply")).process.returncode == 0
    async with open_bus(amqp_url) as bus:
        for name in ("retired", "renamed"):
            await bus.provision(Subscription(name, 0, 1))
    try:
        url = f"sqlite:///{commands.folder / 'renamed.db'}"
        async with open_database(url) as database, database.transaction() as connection:
            values = {"service": "renamed", "log": "x", "first_bucket": 0, "last_bucket": 255, "position": 5}
            await connection.execute(floors.insert().values(values))
        ended = await commands.run("topology", "diff", "--json")
        assert ended.process.returncode == 1
        (found,) = objects(ended)
        assert (found["name"], found["messages"]) == ("tidings.renamed", 0)
        assert "rabbitmqctl delete_queue tidings.renamed" in found["detail"]
        ended = await commands.run("topology", "diff", "--former", "retired", "--former", "never-was")
        assert [line.split()[1] for line in ended.out.splitlines()[1:3]] == ["tidings.renamed", "tidings.retired"]
        server = ThreadingHTTPServer(("127.0.0.1", 0), _Management)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f"http://127.0.0.1:{server.server_port}"
            ended = await commands.run("topology", "diff", "--management", url, "--json")
            shown = {(found["kind"], found["name"]): found["detail"] for found in objects(ended)}
            assert "queue tidings.shop drops each message" in shown["policy", "crashes -> tidings.shop"]
            assert shown.keys() == {
                ("policy", "crashes -> tidings.shop"),
                ("queue", "tidings.renamed"),
                ("queue", "tidings.unheard-of"),
                ("binding", "tidings.events -> listener"),
                ("binding", "tidings.events -> copies"),
                ("binding", "tidings.partitions -> tidings.shop.7"),
                ("binding", "amq.topic -> tidings.shop"),
            }
            assert "AMQP lists no bindings" not in ended.err
        finally:
            await asyncio.to_thread(server.shutdown)
            server.server_close()
        ended = await commands.run("topology", "diff", "--management", url)
        assert (ended.process.returncode, ended.out) == (3, "")
        assert "does not say which queues there are" in ended.err
    finally:
        async with open_bus(amqp_url) as bus:
            await bus.delete([Subscription(name, 0, 1) for name in ("retired", "renamed")])


async def test_a_queue_named_like_a_partition_that_a_service_has_not_is_shown(
    commands: Commands, amqp_url: str
) -> None:
    """Without the management API too, which a foreign binding would need: the command says how to see those."""
    assert (await commands.run("topology", "apply")).process.returncode == 0
    async with await aio_pika.connect(amqp_url) as connection:
        channel = await connection.channel()
        limits: dict[str, Any] = {"x-max-length": 1, "x-overflow": "reject-publish"}
        queue = await channel.declare_queue("tidings.shop.7", durable=True, arguments=limits)
        await queue.bind("tidings.events")
        try:
            ended = await commands.run("topology", "diff")
            assert ended.process.returncode == 1
            assert [line.split()[:3] for line in ended.out.splitlines()[1:2]] == [
                ["queue", "tidings.shop.7", "differs"]
            ]
            assert "rabbitmqctl delete_queue tidings.shop.7" in ended.out
            assert "AMQP lists no bindings" in ended.err
            assert "rabbitmqctl list_bindings --vhost" in ended.err
        finally:
            await queue.delete(if_unused=False, if_empty=False)
