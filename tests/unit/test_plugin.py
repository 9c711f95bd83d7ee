"""The pytest plugin: what it costs, where its fixtures find servers, and what a run says if there is none."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tidings import open_store
from tidings._support.holding import held
from tidings.errors import StoreUnavailable
from tidings.testing import brokers, databases, event_stores

pytest_plugins = ["pytester"]

HEAVY = ("pydantic", "sqlalchemy", "structlog", "asyncio", "hypothesis", "testcontainers", "pamqp")


def test_loading_it_imports_nothing_heavy() -> None:
    code = "import sys; before = {*sys.modules}; import pytest; with_pytest = {*sys.modules}\n"
    code += (
        f"import tidings.testing.plugin\nprint([name for name in {HEAVY!r} if name in {{*sys.modules}} - with_pytest])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run tests without plugins for async tests, and without variables that name servers."""

    def run(source: str, *options: str, **environment: str) -> pytest.RunResult:
        pytester.makepyfile(source)
        for name in [name for name in os.environ if name.startswith("TIDINGS_") or name == "CI"]:
            monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return pytester.runpytest_inprocess("-p", "no:asyncio", "-p", "no:cacheprovider", *options)

    return run


ONE_EACH = """
def test_a_broker(rabbitmq_url):
    assert rabbitmq_url.startswith("amqp://")

def test_another(rabbitmq_url):
    pass

def test_a_database(postgresql_url):
    assert postgresql_url.startswith("postgresql+asyncpg://")
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """Environment variables of a machine without servers, and without a Docker engine."""
    (tmp_path / "docker").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "docker").chmod(0o755)
    return {"PATH": str(tmp_path)}


NOTHING = """
import pytest
import tidings.testing.brokers, tidings.testing.databases

@pytest.fixture(scope="session", autouse=True)
def _nothing_installed():
    with pytest.MonkeyPatch.context() as patch:
        for module in (tidings.testing.brokers, tidings.testing.databases):
            patch.setattr(module, "_installed", lambda: False)
        yield
"""


def test_a_missing_server_skips_loudly_and_says_how_to_get_it(
    run: Any, bare: dict[str, str], pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(NOTHING)
    done = run(ONE_EACH, **bare)
    done.assert_outcomes(skipped=3)
    done.stdout.fnmatch_lines(
        [
            "*= tidings: servers that tests asked for =*",
            "1 skipped: no PostgreSQL for tests: install one*, start Docker*, or set TIDINGS_TEST_POSTGRESQL=*",
            "2 skipped: no RabbitMQ for tests: install one*, start Docker*, or set TIDINGS_TEST_AMQP=*",
        ]
    )


def test_side_by_side_the_end_of_the_run_says_it_too(run: Any, bare: dict[str, str], pytester: pytest.Pytester) -> None:
    pytester.makeconftest(NOTHING)
    done = run(ONE_EACH, "-n", "1", **bare)
    done.assert_outcomes(skipped=3)
    done.stdout.fnmatch_lines(["2 skipped: no RabbitMQ for tests: *"])


def test_in_continuous_integration_a_missing_server_is_an_error(
    run: Any, bare: dict[str, str], pytester: pytest.Pytester
) -> None:
    pytester.makeconftest(NOTHING)
    done = run(ONE_EACH, CI="true", **bare)
    done.assert_outcomes(errors=3)
    done.stdout.fnmatch_lines(["no RabbitMQ for tests: *"])


def test_each_test_has_an_event_store_without_any_server_installed(run: Any, bare: dict[str, str]) -> None:
    done = run(
        """
        import asyncio
        from tidings import NO_STREAM, EventData, open_store

        async def append(url):
            async with open_store(url) as store:
                return await store.append("order-1", [EventData("Placed", b"{}")], expected=NO_STREAM)

        def test_one(eventstoredb_url):
            assert asyncio.run(append(eventstoredb_url)).version == 0

        def test_two(eventstoredb_url):
            assert asyncio.run(append(eventstoredb_url)).version == 0
        """,
        **bare,
    )
    done.assert_outcomes(passed=2)


def test_an_installed_event_store_is_started_and_ended(
    tmp_path: Path, bare: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = tmp_path / "started"
    binary = tmp_path / "eventstored"
    binary.write_text(
        f"#!{sys.executable}\n"
        "import os, re, sys\n"
        f"open({str(started)!r}, 'w').write(' '.join([str(os.getpid()), *sys.argv[1:]]))\n"
        "port = re.search(r'--node-port=(\\d+)', ' '.join(sys.argv))[1]\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'tidings', 'server', '--memory', '--port', port])\n"
    )
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", bare["PATH"])
    monkeypatch.delenv("TIDINGS_TEST_ESDB", raising=False)
    with event_stores.eventstoredb_for_tests() as store, held(store.isolated(), "test") as (url, _):
        assert url.startswith("esdb://127.0.0.1:")
        pid, *options = started.read_text().split()
        assert options[:2] == ["--insecure", "--mem-db"]
        os.kill(int(pid), 0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)


def test_an_event_store_that_ends_at_once_is_reported_with_what_it_said(
    tmp_path: Path, bare: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    binary = tmp_path / "kurrentd"
    binary.write_text("#!/bin/sh\necho no licence\nexit 3\n")
    binary.chmod(0o755)
    monkeypatch.setenv("PATH", bare["PATH"])
    monkeypatch.delenv("TIDINGS_TEST_ESDB", raising=False)
    with (
        event_stores.eventstoredb_for_tests() as store,
        pytest.raises(StoreUnavailable, match="ended before it answered, and said: no licence"),
        held(store.isolated(), "test"),
    ):
        pass


# ---- where servers are found -------------------------------------------------------------


class Container:
    """The part of testcontainers' containers that is used."""

    made: ClassVar[list[Container]] = []

    def __init__(self, image: str, **options: object) -> None:
        self.image, self.options = image, options
        self.environment: dict[str, str] = {}
        self.executed: list[list[str]] = []
        self.state = "made"
        Container.made.append(self)

    def start(self) -> Container:
        self.state = "started"
        return self

    def stop(self) -> None:
        self.state = "stopped"

    def with_env(self, name: str, value: str) -> Container:
        self.environment[name] = value
        return self

    def with_exposed_ports(self, *ports: int) -> Container:
        return self

    def get_container_host_ip(self) -> str:
        return "127.0.0.1"

    def get_exposed_port(self, port: int) -> int:
        return 50_000 + port

    def get_connection_url(self) -> str:
        return "postgresql+asyncpg://test:test@127.0.0.1:55432/test"

    def exec(self, command: list[str]) -> tuple[int, bytes]:
        self.executed.append(command)
        return (1, b"no such vhost") if "broken" in self.environment else (0, b"")


@pytest.fixture
def docker(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Docker engine that answers, with a stand-in of testcontainers, on a machine without servers."""
    Container.made = []
    for module, name in (
        ("testcontainers.rabbitmq", "RabbitMqContainer"),
        ("testcontainers.postgres", "PostgresContainer"),
        ("testcontainers.core.container", "DockerContainer"),
    ):
        stand_in = types.ModuleType(module)
        setattr(stand_in, name, Container)
        monkeypatch.setitem(sys.modules, module, stand_in)
    for variable in ("TIDINGS_TEST_AMQP", "TIDINGS_TEST_POSTGRESQL", "TIDINGS_TEST_ESDB"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(event_stores, "_BINARIES", ())
    for place in (brokers, databases, event_stores):
        monkeypatch.setattr(place, "docker_answers", lambda: True)
        monkeypatch.setattr(place, "_installed", lambda: False)
    yield
    assert [made.state for made in Container.made] == ["stopped"]


@pytest.mark.usefixtures("docker")
def test_a_broker_in_a_container_has_a_vhost_for_each_test() -> None:
    with brokers.rabbitmq_for_tests() as broker:
        with held(broker.isolated(), "one") as (first, _), held(broker.isolated(), "two") as (second, _):
            assert first != second
            assert first.startswith("amqp://guest:guest@127.0.0.1:55672/test")
        (container,) = Container.made
        name = first.rpartition("/")[2]
        mine = [command[1:] for command in container.executed if name in command]
        assert mine == [
            ["add_vhost", name],
            ["set_permissions", "-p", name, "guest", ".*", ".*", ".*"],
            ["delete_vhost", name],
        ]
        container.environment["broken"] = "yes"
        with pytest.raises(RuntimeError, match="rabbitmqctl add_vhost in the container: no such vhost"):
            held(broker.isolated(), "test").__enter__()


@pytest.mark.usefixtures("docker")
def test_a_database_server_in_a_container_is_used_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, str]] = []

    async def create(server: str, name: str) -> None:
        made.append((server, name))

    async def drop(server: str, prefix: str) -> None:
        made.remove((server, prefix))

    monkeypatch.setattr(databases, "create_database", create)
    monkeypatch.setattr(databases, "drop_databases", drop)
    with databases.postgresql_for_tests() as server, held(server.isolated(), "test") as (url, _):
        ((_, name),) = made
        assert url == f"postgresql+asyncpg://test:test@127.0.0.1:55432/{name}"
    assert made == []


@pytest.mark.usefixtures("docker")
def test_an_event_store_in_a_container_is_used_and_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    async def answers(url: str, ended: object) -> None:
        assert url == "esdb://127.0.0.1:52113?tls=false"

    monkeypatch.setattr(event_stores, "_answers", answers)
    with event_stores.eventstoredb_for_tests() as store, held(store.isolated(), "test") as (url, _):
        assert url == "esdb://127.0.0.1:52113?tls=false"
        assert Container.made[0].environment == {"EVENTSTORE_INSECURE": "true", "EVENTSTORE_MEM_DB": "true"}


# ---- fixtures at work --------------------------------------------------------------------


async def test_two_brokers_of_one_server_are_apart(
    rabbitmq_url: str, tidings_rabbitmq: brokers.RabbitMQ, postgresql_url: str, eventstoredb_url: str
) -> None:
    async with tidings_rabbitmq.isolated() as other:
        assert other != rabbitmq_url
    assert postgresql_url.startswith("postgresql+asyncpg://")
    async with open_store(eventstoredb_url) as store:
        assert await store.head() >= 0


def test_what_a_manager_raises_reaches_whoever_enters_and_leaves_it() -> None:
    @asynccontextmanager
    async def failing(where: str) -> Any:
        if where == "entering":
            raise OSError(where)
        yield where
        raise OSError(where)

    with pytest.raises(OSError, match="entering"), held(failing("entering"), "test"):
        pass
    with pytest.raises(OSError, match="leaving"), held(failing("leaving"), "test") as (found, _):
        assert found == "leaving"
