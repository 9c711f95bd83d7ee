"""`deploy/local/rabbitmq` as a person uses it, with three nodes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tidings import open_bus
from tidings.errors import BusUnavailable
from tidings.testing.brokers import RabbitMQCluster, cluster_for_tests

SCRIPT = Path(__file__).parents[2] / "deploy" / "local" / "rabbitmq"


pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def cluster() -> Iterator[RabbitMQCluster]:
    with cluster_for_tests() as found:
        yield found


def script(folder: Path | str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"TIDINGS_LOCAL": str(folder)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


def pid_of(cluster: RabbitMQCluster, node: int) -> str:
    return script(cluster.folder, "eval", f"--node={node}", "os:getpid()").stdout


def test_up_when_all_nodes_run_prints_the_same_url_and_changes_nothing(cluster: RabbitMQCluster) -> None:
    before = [pid_of(cluster, node) for node in (1, 2, 3)]
    again = script(cluster.folder, "up")
    assert (again.returncode, again.stdout.strip()) == (0, cluster.url)
    assert [pid_of(cluster, node) for node in (1, 2, 3)] == before
    assert len(set(before)) == 3


def test_every_node_has_a_url_and_status_knows_them_as_one_cluster(cluster: RabbitMQCluster) -> None:
    urls = script(cluster.folder, "url", "--all").stdout.split()
    login, _, places = cluster.url.rstrip("/").rpartition("@")
    assert urls == [f"{login}@{place}/" for place in places.split(",")]
    status = script(cluster.folder, "status")
    assert status.returncode == 0
    assert [f"node {number} runs on {url}" for number, url in enumerate(urls, 1)] == status.stdout.splitlines()[:3]
    assert "3 of 3 nodes" in status.stdout


def test_up_with_another_number_of_nodes_says_what_to_do_and_does_nothing(cluster: RabbitMQCluster) -> None:
    refused = script(cluster.folder, "up", "--nodes=1")
    assert refused.returncode == 1
    assert f"{cluster.folder} holds three nodes, running" in refused.stderr
    assert f"TIDINGS_LOCAL={cluster.folder}-1 deploy/local/rabbitmq up --nodes 1" in refused.stderr
    assert script(cluster.folder, "status").returncode == 0


def test_a_node_that_crashed_is_started_alone_and_rejoins(cluster: RabbitMQCluster) -> None:
    before = [pid_of(cluster, node) for node in (1, 2, 3)]
    cluster.kill_node(2)
    status = script(cluster.folder, "status")
    assert status.returncode == 1
    assert "node 2 does not run: deploy/local/rabbitmq up" in status.stdout
    assert "2 of 3 nodes" in status.stdout
    up = script(cluster.folder, "up")
    assert (up.returncode, up.stdout.strip()) == (0, cluster.url)
    after = [pid_of(cluster, node) for node in (1, 2, 3)]
    assert (after[0], after[2]) == (before[0], before[2])
    assert after[1] != before[1]
    assert script(cluster.folder, "status").returncode == 0


def test_a_paused_node_is_told_from_one_that_is_gone(cluster: RabbitMQCluster) -> None:
    assert script(cluster.folder, "pause", "--node=3").returncode == 0
    try:
        status = script(cluster.folder, "status")
        assert status.returncode == 1
        assert "node 3 is paused: deploy/local/rabbitmq resume" in status.stdout
        up = script(cluster.folder, "up")
        assert up.returncode == 1
        assert "resume" in up.stderr
    finally:
        assert script(cluster.folder, "resume", "--node=3").returncode == 0
    assert script(cluster.folder, "status").returncode == 0


async def test_a_node_that_is_gone_is_passed_over_and_not_asked_again(cluster: RabbitMQCluster) -> None:
    login, _, places = cluster.url.rpartition("@")
    with capture_logs() as logs:
        async with open_bus(f"{login}@127.0.0.1:1,{places}") as bus:
            await bus.provision()
            await bus.provision()
    (passed_over,) = [line["node"] for line in logs if line["event"] == "bus.node_unreachable"]
    assert passed_over == "127.0.0.1:1"


async def test_a_refused_password_is_not_tried_at_every_node(cluster: RabbitMQCluster) -> None:
    places = cluster.url.rpartition("@")[2]
    with capture_logs() as logs:
        async with open_bus(f"amqp://tidings:wrong@{places}") as bus:
            with pytest.raises(BusUnavailable, match=r"403 .*Check user and password"):
                await bus.provision()
    assert logs == []


def test_a_port_that_is_asked_for_and_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        try:
            refused = script(tmp_path, "up", f"--port={port}")
        finally:
            script(tmp_path, "down", "--kill")
    assert refused.returncode == 1
    assert f"port {port} of 127.0.0.1 is taken" in refused.stderr
    assert "give another" in refused.stderr
    assert script(tmp_path, "status").returncode == 1


def test_what_the_script_did_not_start_is_never_ended(tmp_path: Path) -> None:
    """The id of a process that has ended now belongs to another process."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        process = {"pid": other.pid, "started": "some other time"}
        node = {"number": 1, "name": "tidings", "port": 1, "dist_port": 2, "process": process}
        (tmp_path / "state.json").write_text(json.dumps({"epmd": process, "epmd_port": 3, "nodes": [node]}))
        assert "does not run" in script(tmp_path, "status").stderr + script(tmp_path, "status").stdout
        assert script(tmp_path, "pause").returncode == 1
        assert script(tmp_path, "down", "--kill").returncode == 0
        assert other.poll() is None
        other.communicate(b"\n")
    assert other.returncode == 0


@pytest.mark.parametrize("command", ["status", "url", "logs", "pause", "resume"])
def test_what_needs_a_node_says_how_to_start_one(tmp_path: Path, command: str) -> None:
    done = script(tmp_path, command)
    assert (done.returncode, done.stderr.strip()) == (1, "does not run: deploy/local/rabbitmq up")
