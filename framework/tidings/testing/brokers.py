"""A RabbitMQ for tests: one that is named, installed or in Docker, in this order. Ends only what it started.

`rabbitmq_for_tests()` looks for `TIDINGS_TEST_AMQP` (a URL; tests then share its vhost), an installed `rabbitmq-server`
(started by `deploy/local/rabbitmq`, the script that users run, so it needs a checkout), and Docker (through
testcontainers, where an engine answers). With none of them tests are skipped, loudly; with `CI=true` they fail.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import shutil
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import pytest

from tidings.testing.local import LocalServer, docker_answers, missing, script_of
from tidings.urls import redact

__all__ = ["RabbitMQ", "RabbitMQCluster", "RabbitMQNode", "cluster_for_tests", "node_for_tests", "rabbitmq_for_tests"]

_NUMBERS: Final = itertools.count(1)
_REMEDY: Final = (
    "no RabbitMQ for tests: install one (apt-get install rabbitmq-server, or deploy/local/rabbitmq up as root), start "
    "Docker, or set TIDINGS_TEST_AMQP=amqp://user:password@host:5672/vhost to one that may be written to"
)


class RabbitMQ(Protocol):
    """A broker that tests share."""

    def isolated(self) -> AbstractAsyncContextManager[str]:
        """The URL of a place without queues, for one test."""
        ...


class RabbitMQNode(LocalServer):
    """A node of this machine, started by `deploy/local/rabbitmq` (some 5 s); `settings` are lines for rabbitmq.conf, as
    `{"max_message_size": "65536"}`, and `url` has the vhost `/`."""

    product = "rabbitmq"
    _nodes: int = 1

    def kill(self) -> None:
        """SIGKILL: connections break, no message is flushed.

        Only the register of queues is, because RabbitMQ 3.10 writes that some time after a queue was declared: one that
        was made moments before the kill would come back without a leader, and confirm nothing for ever.
        """
        self.eval("[dets:sync(Table) || Table <- dets:all()]")
        super().kill()

    def rabbitmqctl(self, *arguments: str) -> str:
        """Its output. Takes about half a second; raises `subprocess.CalledProcessError`."""
        return self._run("ctl", *arguments)

    def eval(self, code: str) -> str:
        """Erlang code on the node, in milliseconds."""
        return self._run("eval", code)

    def add_vhost(self) -> str:
        """A new vhost's URL."""
        name = f"test{next(_NUMBERS)}"
        rights = ", ".join(['<<".*">>'] * 3)
        self.eval(
            f'rabbit_vhost:add(<<"{name}">>, <<"test">>), '
            f'rabbit_auth_backend_internal:set_permissions(<<"tidings">>, <<"{name}">>, {rights}, <<"test">>)'
        )
        return self.url + name

    def delete_vhost(self, url: str) -> None:
        """Delete what `add_vhost` made; connections to it are closed."""
        self.eval(f'rabbit_vhost:delete(<<"{urlsplit(url).path[1:]}">>, <<"test">>)')

    @asynccontextmanager
    async def isolated(self) -> AsyncIterator[str]:
        """The URL of a vhost for one test. A test that fails may leave the node stopped or paused: that is mended."""
        await asyncio.to_thread(self.mend)
        url = await asyncio.to_thread(self.add_vhost)
        try:
            yield url
        finally:
            if self._paused:
                await asyncio.to_thread(self.resume)
            if self._runs:
                await asyncio.to_thread(self.delete_vhost, url)

    def _size(self) -> list[str]:
        return [f"--nodes={self._nodes}"]


class RabbitMQCluster(RabbitMQNode):
    """Three nodes as one cluster: what `RabbitMQNode` does to its node is done to all of them, `eval` and `rabbitmqctl`
    on one that lives. `url` names every node."""

    _nodes = 3

    def kill_node(self, number: int) -> None:
        """SIGKILL to node 1, 2 or 3 alone; `start` starts it again. See `kill` for what is flushed before."""
        self._run("eval", f"--node={number}", "[dets:sync(Table) || Table <- dets:all()]")
        self._run("down", "--kill", f"--node={number}")

    def cut_off(self, number: int) -> None:
        """A network partition: node 1, 2 or 3 cannot reach the others, nor they it; clients can reach each of them. It
        finds itself in the minority, and pauses. They are told cookies that do not fit, and disconnected."""
        code = (
            "Others = nodes(), "
            "[rpc:call(Node, erlang, set_cookie, [node(), cut_off]) || Node <- Others], "
            "[{erlang:set_cookie(Node, alone), erlang:disconnect_node(Node)} || Node <- Others]"
        )
        self._run("eval", f"--node={number}", code)

    def let_back(self) -> None:
        """End what `cut_off` did; returns when every node accepts connections."""
        code = "[erlang:set_cookie(Node, erlang:get_cookie()) || Node <- rabbit_mnesia:cluster_nodes(all)]"
        for number in range(1, self._nodes + 1):
            self._run("eval", f"--node={number}", code)
        self.start()

    def leader_of(self, queue: str, url: str) -> int:
        """The number of the node that leads a quorum queue in the vhost of `url`."""
        members, leader = self._raft(queue, url)
        assert leader in members
        return leader

    def members_of(self, queue: str, url: str) -> list[int]:
        """The numbers of the nodes that hold a quorum queue in the vhost of `url`, as the queue itself has it."""
        return sorted(self._raft(queue, url)[0])

    def _raft(self, queue: str, url: str) -> tuple[list[int], int]:
        name = f'rabbit_misc:r(<<"{urlsplit(url).path[1:]}">>, queue, <<"{queue}">>)'
        found = self.eval(f"ra:members(amqqueue:get_pid(element(2, rabbit_amqqueue:lookup({name}))))")
        *members, leader = (int(number) for number in re.findall(r"-(\d)@localhost", found))
        return members, leader


class _Named:
    """A vhost of somebody else's broker, which was empty when the first test came: that one leaves a mark, and only a
    vhost with the mark is cleared of Tidings' exchange around each test."""

    def __init__(self, url: str) -> None:
        self._url = url

    @asynccontextmanager
    async def isolated(self) -> AsyncIterator[str]:
        await self._clear()
        try:
            yield self._url
        finally:
            await self._clear()

    async def _clear(self) -> None:
        """Queues of earlier tests stay, but nothing is bound to them any more."""
        from pamqp import commands  # here, because only the extra `rabbitmq` brings it

        from tidings.buses.rabbitmq.bus import address_of
        from tidings.buses.rabbitmq.connection import Connection
        from tidings.buses.rabbitmq.topology import EXCHANGE

        connection = await Connection.open(address_of(self._url), "tidings tests")
        try:
            if not await _has(connection, _MARK):
                if await _has(connection, EXCHANGE):
                    pytest.fail(
                        f"TIDINGS_TEST_AMQP names a vhost of {redact(self._url)} that has an exchange {EXCHANGE!r}: "
                        "somebody uses it, and tests would delete it. Name a vhost of its own for tests: "
                        "rabbitmqctl add_vhost tests; rabbitmqctl set_permissions -p tests USER '.*' '.*' '.*'",
                        pytrace=False,
                    )
                mark = commands.Exchange.Declare(exchange=_MARK, exchange_type="fanout", durable=True)
                await (await connection.channel()).call(mark, commands.Exchange.DeclareOk)
            delete = commands.Exchange.Delete(exchange=EXCHANGE)
            await (await connection.channel()).call(delete, commands.Exchange.DeleteOk)
        finally:
            await connection.close()


_MARK: Final = "tidings-tests"
"""An exchange that says: this vhost is for tests."""


async def _has(connection: Any, exchange: str) -> bool:
    """Is there such an exchange? It makes none."""
    from pamqp import commands

    from tidings.buses.rabbitmq.channel import ChannelClosed

    asked = commands.Exchange.Declare(exchange=exchange, passive=True)
    try:
        await (await connection.channel()).call(asked, commands.Exchange.DeclareOk)
    except ChannelClosed as error:
        if error.code != 404:
            raise
        return False
    return True


def _container() -> Any:
    """A started container, or None without testcontainers or an engine that answers."""
    try:
        from testcontainers.rabbitmq import RabbitMqContainer
    except ImportError:
        return None
    return RabbitMqContainer("rabbitmq:3.13").start() if docker_answers() else None


def _installed() -> bool:
    found = shutil.which("rabbitmq-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return found is not None and script_of("rabbitmq") is not None


@contextmanager
def rabbitmq_for_tests() -> Iterator[RabbitMQ]:
    """The broker that a test session shares; skips (in CI: fails) the tests that ask for it when there is none."""
    if named := os.environ.get("TIDINGS_TEST_AMQP"):
        yield _Named(named)
    elif _installed():
        with RabbitMQNode() as node:
            yield node
    elif (container := _container()) is not None:
        try:
            host, port = container.get_container_host_ip(), container.get_exposed_port(5672)
            yield _Named(f"amqp://guest:guest@{host}:{port}/")
        finally:
            container.stop()
    else:
        missing(_REMEDY)


def _installed_or_missing() -> None:
    if not _installed():
        missing("no rabbitmq-server is installed, so none can be killed: apt-get install rabbitmq-server")


@contextmanager
def node_for_tests(settings: Mapping[str, str] | None = None) -> Iterator[RabbitMQNode]:
    """A node that a test may harm; skips (in CI: fails) where none can be started."""
    _installed_or_missing()
    with RabbitMQNode(settings) as node:
        yield node


@contextmanager
def cluster_for_tests(settings: Mapping[str, str] | None = None) -> Iterator[RabbitMQCluster]:
    """Three nodes that a test may harm (some 20 s, 400 MB); skips (in CI: fails) where none can be started."""
    _installed_or_missing()
    with RabbitMQCluster(settings) as cluster:
        yield cluster
