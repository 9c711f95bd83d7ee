"""`python -m services.demo` as people meet it: run, run again, interrupted, killed, with a file that is broken."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from asyncio.subprocess import PIPE, STDOUT, Process
from dataclasses import dataclass
from pathlib import Path

import pytest

from tidings import open_store
from tidings.protocol.position import CARRIED

ROOT = Path(__file__).parents[2]
DATA = ROOT / "services" / "data" / "online-retail.csv"
CHECKS = 8

pytestmark = pytest.mark.timeout(600)


@dataclass
class Ended:
    """A run that has ended."""

    status: int
    text: str

    def number(self, pattern: str) -> float:
        found = re.search(pattern, self.text, re.MULTILINE)
        assert found, f"{pattern!r} is not in:\n{self.text}"
        return float(found[1].replace(",", ""))


async def start(folder: Path, *, data: Path = DATA) -> Process:
    arguments = ("-m", "services.demo", "--folder", str(folder), "--data", str(data))
    return await asyncio.create_subprocess_exec(sys.executable, *arguments, cwd=ROOT, stdout=PIPE, stderr=STDOUT)


async def end(process: Process, before: str = "") -> Ended:
    out, _ = await process.communicate()
    assert process.returncode is not None
    return Ended(process.returncode, before + out.decode())


async def run(folder: Path, *, data: Path = DATA) -> Ended:
    return await end(await start(folder, data=data))


async def until(process: Process, pattern: str) -> str:
    """Read the output up to the first line that matches."""
    assert process.stdout is not None
    text = ""
    async for line in process.stdout:
        text += line.decode()
        if re.search(pattern, line.decode()):
            return text
    raise AssertionError(f"{pattern!r} never came:\n{text}")


def proves_its_invariants(ended: Ended) -> None:
    assert ended.status == 0, ended.text
    assert "BROKEN" not in ended.text
    assert len(re.findall(r"^ok  ", ended.text, re.MULTILINE)) == CHECKS, ended.text


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """The first 2,000 rows."""
    path = tmp_path / "few.csv"
    path.write_text("".join(DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:2001]), encoding="utf-8")
    return path


@pytest.mark.slow("five days twice; the next test trades a few of them, and test_flow.py a day in one process")
async def test_five_days_of_real_orders_and_a_second_run_that_does_nothing_twice(tmp_path: Path) -> None:
    first = await run(tmp_path / "demo")
    proves_its_invariants(first)
    assert "423 orders imported" in first.text
    assert first.number(r"^([\d.]+) % of the orders failed") >= 5
    for happened in ("out of stock", "payment declined", "by the customer", "just in time to stop the parcel"):
        assert first.number(rf"^ *(\d+) .*{happened}") > 0
    assert first.number(r"(\d+) of them just in time") + first.number(r"^ *(\d+)  refused") > 0
    assert "from 0 sales there to 3, £37.50" in first.text
    assert "0 pending, 0 staged, 0 dead" in first.text
    assert first.number(r"Done in ([\d.]+) s") > 0

    second = await run(tmp_path / "demo")
    proves_its_invariants(second)
    assert "Continues an earlier run" in second.text
    assert "0 orders imported" in second.text
    assert "423 existed already" in second.text
    assert "from 3 sales there to 6, £75.00" in second.text
    assert "Stock: 0 of 1,958 articles received now" in second.text
    on_hand = r"^Stock: ([\d,]+) pieces on hand"
    for same in (on_hand, r"^ *(\d+)  cancelled   out of stock", r"^ *(\d+)  refused", r"£([\d,.]+) refunded"):
        assert second.number(same) == first.number(same)
    pieces = r"= ([\d,]+) \+ [\d,]+$"
    assert second.number(pieces) == first.number(pieces) + 3, "more came in than the goods for the live orders"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
async def test_a_run_that_was_stopped_in_the_middle_is_continued_by_the_next(
    tmp_path: Path, few: Path, how: signal.Signals
) -> None:
    process = await start(tmp_path / "demo", data=few)
    seen = await until(process, r"Importing: [1-9]\d* of")
    process.send_signal(how)
    stopped = await end(process, seen)
    if how is signal.SIGINT:
        assert stopped.status == 130
        assert stopped.text.rstrip().endswith("run it again, and it continues there.")
        assert "Traceback" not in stopped.text
    continued = await run(tmp_path / "demo", data=few)
    proves_its_invariants(continued)
    there = continued.number(r"(\d+) existed already")
    assert there > 0
    assert continued.number(r"^(\d+) orders imported") + there == continued.number(r"Importing (\d+) orders")


async def test_a_broken_file_is_refused_with_the_line_before_anything_is_written(tmp_path: Path, few: Path) -> None:
    with few.open("a", encoding="utf-8") as file:
        file.write("536999,X1,CUP,many,2010-12-05T10:00:00,1.00,,France\n")
    refused = await run(tmp_path / "demo", data=few)
    assert refused.status == 1
    assert "Stopped: line 2002: Quantity 'many' is not a whole number" in refused.text
    assert "Traceback" not in refused.text
    async with open_store(f"sqlite:///{tmp_path}/demo/events.db") as store:
        assert [event async for event in store.read_all(filter=CARRIED)] == []


async def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    missing = await run(tmp_path / "demo", data=tmp_path / "nothing.csv")
    assert missing.status == 1
    assert f"No such file or directory: '{tmp_path / 'nothing.csv'}'" in missing.text
