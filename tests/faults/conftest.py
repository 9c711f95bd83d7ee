"""What the tests of faults share: how long each recovery took is recorded, and shown in one table at the end."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Final, NamedTuple

import pytest

from tests.faults.disk import SmallDisk, mounted
from tests.faults.stage import Stage

Recovered = Callable[[int, float], None]
"""Records the number of audited events, and the seconds from the end of the fault to the first effect."""


class Row(NamedTuple):
    fault: str
    events: int
    seconds: float


ROWS: Final = pytest.StashKey[list[Row]]()


@pytest.fixture
def recovered(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Recovered:
    """Record a recovery: a row of the table and two properties of the JUnit report. Each test calls it once, at its
    end."""
    rows = request.config.stash.setdefault(ROWS, [])

    def record(events: int, seconds: float) -> None:
        rows.append(Row(request.node.name.removeprefix("test_").replace("_", " "), events, seconds))
        record_property("events", events)
        record_property("recovery_seconds", round(seconds, 3))

    return record


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the logs of a stage's processes after a failed test. No fixture could do that."""
    report = yield
    if report.when == "call" and report.failed and isinstance(item, pytest.Function):
        stages = [given for given in item.funcargs.values() if isinstance(given, Stage)]
        report.sections += [("logs of the stage", found.logs) for found in stages]
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("faults survived")
    width = max(len(row.fault) for row in rows)
    terminalreporter.write_line(f"{'fault':{width}}  events  recovery s")
    for row in rows:
        terminalreporter.write_line(f"{row.fault:{width}}  {row.events:6}  {row.seconds:10.2f}")


@pytest.fixture
def stage(tmp_path: Path, amqp_url: str) -> Iterator[Stage]:
    """A stage on a vhost of its own, on the broker that tests share."""
    with Stage(tmp_path, amqp_url) as found:
        yield found


@pytest.fixture
def harmed(tmp_path: Path, harmed_url: str) -> Iterator[Stage]:
    """A stage on the test module's own broker, `rabbitmq_node`, which may be stopped, killed and starved."""
    with Stage(tmp_path, harmed_url) as found:
        yield found


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with mounted(tmp_path / "small") as disk:
        yield disk
