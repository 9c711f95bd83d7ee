"""`python -m services.demo.fleet` as people meet it: real processes, a real RabbitMQ, faults, Ctrl-C, a sudden end."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import structlog

from services.demo.fleet.__main__ import main
from services.demo.fleet.faults import ACTS
from services.demo.fleet.processes import Died, environment, fleet, free_ports
from services.demo.fleet.scene import TARGETS

ROOT = Path(__file__).parents[2]
DATA = ROOT / "services" / "data" / "online-retail.csv"
INVOICES = 66
"""Number of invoices, of which two are dropped, three are returns, and five are declined."""

pytestmark = [pytest.mark.timeout(400), pytest.mark.faults]


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """A file with the first invoices."""
    header, *rows = DATA.read_text(encoding="utf-8").splitlines(keepends=True)
    numbers = list(dict.fromkeys(row.partition(",")[0] for row in rows))[:INVOICES]
    path = tmp_path / "few.csv"
    path.write_text("".join([header, *(row for row in rows if row.partition(",")[0] in numbers)]), encoding="utf-8")
    return path


@pytest.fixture
def rabbitmq_installed() -> None:
    """Skip the test without an installed RabbitMQ: the demo starts its own."""
    if shutil.which("rabbitmq-server", path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
        missing = "no RabbitMQ for the demo to start: apt-get install rabbitmq-server"
        pytest.fail(missing) if os.environ.get("CI", "").lower() == "true" else pytest.skip(missing)


@pytest.fixture
def own_settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the settings of logs and the gateway's ledger, which `main` changes for the whole process."""
    before = structlog.get_config() if structlog.is_configured() else None
    monkeypatch.setenv("PAYMENT_LEDGER", "")
    yield
    structlog.reset_defaults()
    if before is not None:
        structlog.configure(**before)


class Demo:
    """A run of the demo, in a process group of its own as at a terminal."""

    def __init__(self, folder: Path, data: Path) -> None:
        arguments = ("--folder", str(folder / "runs"), "--data", str(data))
        self._out = folder / "out"
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "services.demo.fleet", *arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def text(self) -> str:
        return self._out.read_text(encoding="utf-8")

    async def says(self, pattern: str, seconds: float = 180) -> re.Match[str]:
        """Wait for a line that matches."""
        async with asyncio.timeout(seconds):
            while (found := re.search(pattern, self.text, re.MULTILINE)) is None:
                assert self.process.poll() is None, self.text
                await asyncio.sleep(0.05)
        return found

    async def ended(self) -> int:
        async with asyncio.timeout(200):
            while (status := self.process.poll()) is None:
                await asyncio.sleep(0.05)
        return status

    def left_nothing_running(self) -> bool:
        """Assert that no process named in the output runs, nor the broker."""
        pids = re.findall(r"^[a-z]+ +(\d+)  tidings ", self.text, re.MULTILINE)
        assert len(pids) == 6
        port = re.search(r"^TIDINGS_BUS=amqp://\S+?:(\d+)/", self.text, re.MULTILINE)
        assert port
        with socket.socket() as probe:
            broker_runs = probe.connect_ex(("127.0.0.1", int(port[1]))) == 0
        return not broker_runs and not any(runs(int(pid)) for pid in pids)


@contextmanager
def demo(folder: Path, data: Path) -> Iterator[Demo]:
    found = Demo(folder, data)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


def runs(pid: int) -> bool:
    """Return whether a process is a `tidings` command; its id may belong to another process by now."""
    try:
        return b"tidings" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def become(condition: Iterator[bool], seconds: float = 90) -> None:
    async with asyncio.timeout(seconds):
        while not next(condition):
            await asyncio.sleep(0.05)


@pytest.mark.usefixtures("rabbitmq_installed")
async def test_real_orders_through_killed_processes_a_restarted_broker_and_a_deleted_queue(
    tmp_path: Path, few: Path
) -> None:
    with demo(tmp_path, few) as run:
        status = await run.ended()
        text = run.text
    assert status == 0, text
    for place, act in enumerate(ACTS, 1):
        assert re.search(rf"^{place}\. {re.escape(act.title)}, with \d+ of 64 invoices taken in", text, re.MULTILINE)
    assert text.count("All processes were ready") == len(ACTS)
    assert re.search(r"Events wait: [1-9]\d* for inventory and [1-9]\d* for payment", text)
    assert re.search(r"deleted with [1-9]\d* messages, which are lost", text)
    assert re.search(r"^All 61 orders were answered.* [1-9]\d* requests had to be repeated", text, re.MULTILINE)
    equal = {"orders": "61", "lines": "1,003", "returns": "3", "gross value": "£24,681.50", "payment declines": "5"}
    for what, number in equal.items():
        assert re.search(rf"^{what} +{number} +{number}  equal$", text, re.MULTILINE), text
    assert "all settled up to position" in text
    assert len(re.findall(r"^\w+: settled up to position \d+ \(0 pending, 0 staged, 0 dead", text, re.MULTILINE)) == 5
    assert "BROKEN" not in text
    assert len(re.findall(r"^ok  ", text, re.MULTILINE)) == 8 + 7
    assert "All 7 processes drained after SIGTERM and ended with exit status 0" in text
    assert "\x1b" not in text
    assert run.left_nothing_running()


@pytest.mark.usefixtures("rabbitmq_installed")
async def test_ctrl_c_in_the_middle_ends_every_process_and_the_broker(tmp_path: Path, few: Path) -> None:
    with demo(tmp_path, few) as run:
        await run.says(r"^ +Process \d+ is dead")
        os.killpg(run.process.pid, signal.SIGINT)
        assert await run.ended() == 130
        assert run.text.rstrip().endswith("The next run begins anew.")
        assert "Traceback" not in run.text
        assert run.left_nothing_running()


# ---- processes -----------------------------------------------------------------------


def one_service(folder: Path) -> dict[str, str]:
    return environment(folder, f"sqlite:///{folder}/events.db", "memory://", [TARGETS["sales"]])


async def test_a_process_that_dies_by_itself_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Died) as died:
            async with fleet(tmp_path, one_service(tmp_path)) as processes:
                await (await processes.start("sales", ["run", TARGETS["sales"], f"--health={port}"], port)).ready()
    assert re.match(
        r"sales \(process \d+\) ended with exit status [1-9]\. The end of .*/sales\.log:\n", str(died.value)
    )
    assert f"the health probes cannot listen at 127.0.0.1:{port}" in str(died.value)


async def test_a_killed_process_is_started_again_and_stops_in_good_order(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    async with fleet(tmp_path, one_service(tmp_path)) as processes:
        child = await processes.start("sales", ["run", TARGETS["sales"], f"--health={port}"], port)
        await child.ready()
        first = child.pid
        await child.kill()
        assert not runs(first)
        await child.start()
        await child.ready()
        assert child.pid != first
        assert await processes.stop() == {"sales": 0}
    log = child.log.read_text(encoding="utf-8")
    assert log.count("service.joined") == 2, "one file holds what both processes said"


ABANDONED = """
import asyncio, sys
from pathlib import Path
from services.demo.fleet.processes import fleet
from tests.services.test_demo_rabbitmq import TARGETS, one_service

async def main(folder):
    async with fleet(folder, one_service(folder)) as processes:
        child = await processes.start("sales", ["run", TARGETS["sales"]], 1)
        print(child.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1])))
"""


async def test_no_process_outlives_a_demo_that_is_killed(tmp_path: Path) -> None:
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ABANDONED, str(tmp_path)), cwd=ROOT, stdout=subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    await become(runs(pid) for _ in iter(int, 1))
    parent.kill()
    await parent.wait()
    await become(not runs(pid) for _ in iter(int, 1))


def test_a_port_that_somebody_has_is_not_taken_for_free() -> None:
    found = free_ports(5)
    assert len(set(found)) == 5
    with socket.create_server(("127.0.0.1", found[0])) as taken:
        assert taken.getsockname()[1] not in {port for _ in range(20) for port in free_ports(50)}


# ---- what cannot be run --------------------------------------------------------------


@pytest.mark.usefixtures("own_settings")
def test_without_rabbitmq_it_says_what_the_script_says(
    tmp_path: Path, few: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    refusing = tmp_path / "rabbitmq"
    refusing.write_text("import sys; sys.exit(0 if 'guard' in sys.argv else 'RabbitMQ is missing. Do this: ...')")
    monkeypatch.setattr("services.demo.fleet.broker.SCRIPT", refusing)
    monkeypatch.setattr("services.demo.fleet.broker.ROOT", tmp_path)
    assert main(["--folder", str(tmp_path / "runs"), "--data", str(few)]) == 1
    said = capfd.readouterr().out
    assert "Stopped: rabbitmq up: RabbitMQ is missing. Do this: ..." in said
    assert "Traceback" not in said


@pytest.mark.usefixtures("own_settings")
def test_a_file_with_too_few_invoices_for_the_faults_is_refused(
    tmp_path: Path, few: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few.write_text("".join(few.read_text(encoding="utf-8").splitlines(keepends=True)[:100]), encoding="utf-8")
    assert main(["--folder", str(tmp_path / "runs"), "--data", str(few)]) == 1
    assert re.search(r"Stopped: .*few\.csv has \d+ orders and returns: 63 are needed", capfd.readouterr().out)
