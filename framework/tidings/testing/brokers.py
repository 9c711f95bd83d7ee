"""A RabbitMQ for tests: named by a variable, installed, or in Docker, in this order. It ends only what it started.

`rabbitmq_for_tests()` looks for `TIDINGS_TEST_AMQP` (a URL; tests share its vhost and take turns), an installed
`rabbitmq-server` (started by `deploy/local/rabbitmq`, the script that users run, which the wheel has, too), and Docker
(through testcontainers, where an engine answers). Without any of them, tests are skipped with the reason; with
`CI=true` they fail. `TIDINGS_TEST_RABBITMQ_RELEASE=13` asks for the RabbitMQ of that Debian instead of the installed
one: `deploy/local/rabbitmq` says what that needs.
"""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

import pytest

from tidings.testing.local import LocalServer, docker_answers, missing, script_of
from tidings.urls import redact

__all__ = ["RabbitMQ", "RabbitMQCluster", "RabbitMQNode", "cluster_for_tests", "node_for_tests", "rabbitmq_for_tests"]

_NUMBERS: Final = itertools.count(1)
_REMEDY: Final = (
    "no RabbitMQ for tests: install one (apt-get install rabbitmq-server), start Docker and install "
    "testcontainers, or set TIDINGS_TEST_AMQP=amqp://user:password@host:5672/vhost to one that may be written to"
)


class RabbitMQ(Protocol):
    """A broker that tests share."""

    def isolated(self) -> AbstractAsyncContextManager[str]:
        """Yield the URL of a place without queues, for one test."""
        ...


class RabbitMQNode(LocalServer):
    """A node on this machine, started by `deploy/local/rabbitmq` (about 5 s). `settings` are lines for rabbitmq.conf,
    such as `{"max_message_size": "65536"}`; `url` names the vhost `/`."""

    product = "rabbitmq"
    _nodes: int = 1

    def kill(self) -> None:
        """Kill the node with SIGKILL: connections break, and no message is flushed.

        Only the register of queues is flushed first, because RabbitMQ 3.10 writes it some time after a queue was
        declared. A queue that was declared just before the kill would come back without a leader and confirm nothing.
        """
        self.eval("[dets:sync(Table) || Table <- dets:all()]")
        super().kill()

    def rabbitmqctl(self, *arguments: str) -> str:
        """Run `rabbitmqctl` (about half a second) and return its output. Raises `subprocess.CalledProcessError`."""
        return self._run("ctl", *arguments)

    def eval(self, code: str) -> str:
        """Evaluate Erlang code on the node, within milliseconds, and return the output."""
        return self._run("eval", code)

    def add_vhost(self) -> str:
        """Create a vhost and return its URL."""
        name = f"test{next(_NUMBERS)}"
        rights = ", ".join(['<<".*">>'] * 3)
        self.eval(
            f'rabbit_vhost:add(<<"{name}">>, <<"test">>), '
            f'rabbit_auth_backend_internal:set_permissions(<<"tidings">>, <<"{name}">>, {rights}, <<"test">>)'
        )
        return self.url + name

    def delete_vhost(self, url: str) -> None:
        """Delete a vhost made by `add_vhost`, and close the connections to it."""
        self.eval(f'rabbit_vhost:delete(<<"{urlsplit(url).path[1:]}">>, <<"test">>)')

    @asynccontextmanager
    async def isolated(self) -> AsyncIterator[str]:
        """Yield the URL of a vhost for one test. If an earlier test left the node stopped or paused, start it again."""
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
        return [f"--nodes={self._nodes}", *_release()]


class RabbitMQCluster(RabbitMQNode):
    """Three nodes as one cluster. Methods of `RabbitMQNode` act on all of them, `eval` and `rabbitmqctl` on one that
    is alive. `url` names every node."""

    _nodes = 3

    def kill_node(self, number: int) -> None:
        """Kill node 1, 2 or 3 alone with SIGKILL; `start` starts it again. See `kill` for what is flushed first."""
        self._run("eval", f"--node={number}", "[dets:sync(Table) || Table <- dets:all()]")
        self._run("down", "--kill", f"--node={number}")

    def cut_off(self, number: int) -> None:
        """Simulate a network partition: node 1, 2 or 3 and the others cannot reach each other, but clients can reach
        all of them. The node finds itself in the minority and pauses. (The nodes get cookies that do not match.)"""
        code = (
            "Others = nodes(), "
            "[rpc:call(Node, erlang, set_cookie, [node(), cut_off]) || Node <- Others], "
            "[{erlang:set_cookie(Node, alone), erlang:disconnect_node(Node)} || Node <- Others]"
        )
        self._run("eval", f"--node={number}", code)

    def let_back(self) -> None:
        """Undo `cut_off`. Returns when every node accepts connections."""
        code = "[erlang:set_cookie(Node, erlang:get_cookie()) || Node <- rabbit_mnesia:cluster_nodes(all)]"
        for number in range(1, self._nodes + 1):
            self._run("eval", f"--node={number}", code)
        self.start()

    def leader_of(self, queue: str, url: str) -> int:
        """Return the number of the node that leads a quorum queue in the vhost of `url`."""
        members, leader = self._raft(queue, url)
        assert leader in members
        return leader

    def members_of(self, queue: str, url: str) -> list[int]:
        """Return the numbers of the nodes that hold a quorum queue in the vhost of `url`, as the queue itself says."""
        return sorted(self._raft(queue, url)[0])

    def _raft(self, queue: str, url: str) -> tuple[list[int], int]:
        name = f'rabbit_misc:r(<<"{urlsplit(url).path[1:]}">>, queue, <<"{queue}">>)'
        found = self.eval(f"ra:members(amqqueue:get_pid(element(2, rabbit_amqqueue:lookup({name}))))")
        *members, leader = (int(number) for number in re.findall(r"-(\d)@localhost", found))
        return members, leader


class _Named:
    """A vhost of a broker that is not ours. It must be empty at the first test, which leaves a mark in it; only a vhost
    with that mark is cleared of Tidings' exchange around each test."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._turn = Path(tempfile.gettempdir()) / f"tidings-{sha256(url.encode()).hexdigest()[:16]}.lock"

    @asynccontextmanager
    async def isolated(self) -> AsyncIterator[str]:
        async with self._alone():
            await self._clear()
            try:
                yield self._url
            finally:
                await self._clear()

    @asynccontextmanager
    async def _alone(self) -> AsyncIterator[None]:
        """Let no other process of tests use the vhost within the block."""
        if self._turn in _TURNS:
            yield
            return
        with self._turn.open("a") as file:  # a lock ends with its file, however this process ends
            await asyncio.to_thread(fcntl.flock, file, fcntl.LOCK_EX)
            _TURNS.add(self._turn)
            try:
                yield
            finally:
                _TURNS.remove(self._turn)

    async def _clear(self) -> None:
        """Delete the exchanges. Queues of earlier tests stay, but nothing is bound to them any more."""
        from pamqp import commands  # here, because only the extra `rabbitmq` installs it

        from tidings.buses.rabbitmq.address import address_of
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


_TURNS: Final = set[Path]()
"""Files that this process has locked."""


class _Contained:
    """A broker in a container: each test has a vhost."""

    def __init__(self, container: Any) -> None:
        self._container = container

    @asynccontextmanager
    async def isolated(self) -> AsyncIterator[str]:
        name = f"test{next(_NUMBERS)}"
        await asyncio.to_thread(self._ctl, "add_vhost", name)
        await asyncio.to_thread(self._ctl, "set_permissions", "-p", name, "guest", ".*", ".*", ".*")
        host, port = self._container.get_container_host_ip(), self._container.get_exposed_port(5672)
        try:
            yield f"amqp://guest:guest@{host}:{port}/{name}"
        finally:
            await asyncio.to_thread(self._ctl, "delete_vhost", name)

    def _ctl(self, *arguments: str) -> None:
        code, output = self._container.exec(["rabbitmqctl", *arguments])
        if code != 0:
            raise RuntimeError(f"rabbitmqctl {arguments[0]} in the container: {output.decode(errors='replace')}")


_MARK: Final = "tidings-tests"
"""Name of an exchange that marks a vhost as one for tests."""


async def _has(connection: Any, exchange: str) -> bool:
    """Return whether the exchange exists. It creates none."""
    from pamqp import commands

    from tidings.buses.rabbitmq.client import ChannelClosed

    asked = commands.Exchange.Declare(exchange=exchange, passive=True)
    try:
        await (await connection.channel()).call(asked, commands.Exchange.DeclareOk)
    except ChannelClosed as error:
        if error.code != 404:
            raise
        return False
    return True


def _container() -> Any:
    """Start a container. Return None without testcontainers or a Docker engine that answers."""
    try:
        from testcontainers.rabbitmq import RabbitMqContainer
    except ImportError:
        return None
    return RabbitMqContainer("rabbitmq:3.13").start() if docker_answers() else None


def _release() -> list[str]:
    """Return the options of `deploy/local/rabbitmq` that say of which Debian the RabbitMQ is."""
    release = os.environ.get("TIDINGS_TEST_RABBITMQ_RELEASE")
    return [f"--release={release}"] if release else []


def _installed() -> bool:
    if release := _release():
        _install(release)
        return True
    found = shutil.which("rabbitmq-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    return found is not None and script_of("rabbitmq") is not None


def _install(release: Sequence[str]) -> None:
    """Make what the RabbitMQ of another Debian runs from, unless it is there (a minute or two, once). Skips (in CI:
    fails) where that cannot be done, and never takes another RabbitMQ instead."""
    script = script_of("rabbitmq")
    if script is None:
        missing("no RabbitMQ for tests: Tidings is not installed completely: install it again")
    command = [sys.executable, str(script), "install", *release]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        missing(f"no RabbitMQ for tests: {done.stderr.strip()} (asked for by TIDINGS_TEST_RABBITMQ_RELEASE)")


@contextmanager
def rabbitmq_for_tests(settings: Mapping[str, str] | None = None) -> Iterator[RabbitMQ]:
    """Yield the broker that a test session shares. Without one, tests that ask for it are skipped (in CI: fail).
    `settings` are for one that is started from an installed RabbitMQ."""
    if named := os.environ.get("TIDINGS_TEST_AMQP"):
        yield _Named(named)
    elif _installed():
        with RabbitMQNode(settings) as node:
            yield node
    elif (container := _container()) is not None:
        try:
            yield _Contained(container)
        finally:
            container.stop()
    else:
        missing(_REMEDY)


def _installed_or_missing() -> None:
    if not _installed():
        missing("no rabbitmq-server is installed, so none can be killed: apt-get install rabbitmq-server")


@contextmanager
def node_for_tests(settings: Mapping[str, str] | None = None) -> Iterator[RabbitMQNode]:
    """Yield a node that a test may harm. Skips (in CI: fails) if none can be started."""
    _installed_or_missing()
    with RabbitMQNode(settings) as node:
        yield node


@contextmanager
def cluster_for_tests(settings: Mapping[str, str] | None = None) -> Iterator[RabbitMQCluster]:
    """Yield three nodes that a test may harm (about 20 s, 400 MB). Skips (in CI: fails) if they cannot be started."""
    _installed_or_missing()
    with RabbitMQCluster(settings) as cluster:
        yield cluster
