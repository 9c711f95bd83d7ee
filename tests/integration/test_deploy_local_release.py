"""`deploy/local/rabbitmq --release 13`: the RabbitMQ of a newer Debian, and what is said where it cannot be had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from tidings.testing.brokers import RabbitMQNode, node_for_tests

SCRIPT = Path(__file__).parents[2] / "deploy" / "local" / "rabbitmq"
NOBODY = f"import os, runpy; os.geteuid = lambda: 1000; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
"""A program that is the script, run by a user who is not root."""

needs_root_on_debian = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("apt-get") is None, reason="only root on Debian comes as far as that"
)


def script(folder: Path | str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return run([str(SCRIPT), *arguments], folder, **more)


def run(words: list[str], folder: Path | str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env=os.environ | {"TIDINGS_LOCAL": str(folder), "PYTHONPATH": str(SCRIPT.parent)} | more,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )


# ---- where it can be had ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node() -> Iterator[RabbitMQNode]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIDINGS_TEST_RABBITMQ_RELEASE", "13")
        with node_for_tests() as found:
            yield found


@pytest.mark.only_rabbitmq4
@pytest.mark.timeout(600)  # the userland is made by whoever comes first
def test_it_is_another_rabbitmq_and_every_command_reaches_it(node: RabbitMQNode) -> None:
    assert node.eval("rabbit_misc:version()").startswith('{ok, "4.')
    assert "4." in node.rabbitmqctl("version")
    status = script(node.folder, "status")
    assert (status.returncode, status.stdout.strip()) == (0, f"runs on {node.url}")
    node.pause()
    assert "is paused" in script(node.folder, "status").stdout
    node.resume()
    before = node.url
    node.kill()
    assert script(node.folder, "status").returncode == 1
    up = script(node.folder, "up")
    assert (up.returncode, up.stdout.strip()) == (0, before), "without --release, it stays what it was"
    assert script(node.folder, "eval", "rabbit_misc:version()").stdout.startswith('{ok, "4.')


@pytest.mark.only_rabbitmq4
@pytest.mark.timeout(600)  # the userland is made by whoever comes first
def test_a_broker_of_this_system_is_not_replaced_by_one_of_another_release(node: RabbitMQNode, tmp_path: Path) -> None:
    kept = json.loads((Path(node.folder) / "state.json").read_text())
    del kept["release"]
    (tmp_path / "state.json").write_text(json.dumps(kept))
    refused = script(tmp_path, "up", "--release=13")
    assert refused.returncode == 1
    assert f"{tmp_path} holds one node, running" in refused.stderr
    assert f"TIDINGS_LOCAL={tmp_path}-debian13 deploy/local/rabbitmq up --release 13" in refused.stderr


@pytest.mark.only_rabbitmq4
@pytest.mark.timeout(600)  # the userland is made by whoever comes first
def test_nothing_stays_mounted_where_this_machine_sees_it(node: RabbitMQNode) -> None:
    assert node.url
    there = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    assert there.isdisjoint({"/usr", "/etc"} - MOUNTED_BEFORE)
    assert not [place for place in there if "debian13-" in place]


MOUNTED_BEFORE = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


# ---- where it cannot -------------------------------------------------------------------------------------------------


def test_who_is_not_root_is_told_that_it_takes_root(tmp_path: Path) -> None:
    if shutil.which("apt-get") is None or debian() == "13":
        pytest.skip("this system needs no userland, or can have none")
    refused = run(["-c", NOBODY, "install", "--release=13"], tmp_path, TIDINGS_LOCAL_PROGRAMS=str(tmp_path))
    assert refused.returncode == 1
    assert "rabbitmq-server of Debian 13 needs root on this machine" in refused.stderr
    assert "sudo" in refused.stderr
    assert list(tmp_path.iterdir()) == []


@needs_root_on_debian
def test_what_debootstrap_says_without_a_network_is_shown_and_nothing_half_made_is_taken(tmp_path: Path) -> None:
    if debian() == "13":
        pytest.skip("this system is Debian 13: it needs no userland")
    tools = tmp_path / "tools"
    tools.mkdir()
    program(tools / "debootstrap", 'mkdir -p "$4/usr/half"; echo "E: Failed getting release file $5"; exit 1')
    program(tools / "apt-get", 'echo "http://mirror.test/debian/ Debian Debian"')
    places = {"TIDINGS_LOCAL_PROGRAMS": str(tmp_path / "made"), "PATH": f"{tools}:{os.environ['PATH']}"}
    for _ in range(2):
        refused = script(tmp_path, "up", "--release=13", "--port=0", **places)
        assert refused.returncode == 1
        assert "E: Failed getting release file http://mirror.test/debian/" in refused.stderr
        assert "See whether http://mirror.test/debian/ can be reached" in refused.stderr
        assert [place.name for place in (tmp_path / "made").iterdir() if place.is_dir()] == []
    assert script(tmp_path, "status").returncode == 1


@needs_root_on_debian
def test_sources_without_a_mirror_of_debian_are_named(tmp_path: Path) -> None:
    if debian() == "13":
        pytest.skip("this system is Debian 13: it needs no userland")
    tools = tmp_path / "tools"
    tools.mkdir()
    program(tools / "debootstrap", "echo never; exit 1")
    program(tools / "apt-get", 'echo "http://mirror.test/ubuntu/ Ubuntu Ubuntu"')
    places = {"TIDINGS_LOCAL_PROGRAMS": str(tmp_path / "made"), "PATH": f"{tools}:{os.environ['PATH']}"}
    refused = script(tmp_path, "install", "--release=13", **places)
    assert refused.returncode == 1
    assert "apt's sources name no mirror of Debian" in refused.stderr


def test_the_mirror_is_that_of_debian_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    mirror_in = import_module("userland").mirror_in
    lines = [
        "https://tools.test/apt Tools Tools",
        "cdrom://Debian/ Debian Debian",
        "http://mirror.test/debian-security/ Debian Debian-Security",
        "http://mirror.test/debian/ Debian Debian",
        "http://other.test/debian/ Debian Debian",
    ]
    assert mirror_in("\n".join(lines)) == "http://mirror.test/debian/"
    assert mirror_in("\n".join(lines[:3])) is None


def program(place: Path, shell: str) -> None:
    place.write_text(f"#!/bin/sh\n{shell}\n")
    place.chmod(0o755)


def debian() -> str:
    """The release of this Debian; an empty text on another system."""
    said = Path("/etc/os-release").read_text() if Path("/etc/os-release").exists() else ""
    return dict(line.split("=", 1) for line in said.splitlines() if "=" in line).get("VERSION_ID", "").strip('"')
