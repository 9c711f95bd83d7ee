"""A service that is added late reads a long history while traffic goes on: no gap, no duplicate, bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from uuid import uuid4

import pytest

from tests.faults.auditing import EVERY, Counted
from tests.faults.conftest import Recovered
from tests.faults.stage import KEYS, STREAMS, Stage, now
from tidings import open_store
from tidings.modelling.codec import encode
from tidings.relay.checkpoints import write_checkpoint
from tidings.testing.brokers import RabbitMQ

FEW, MANY = 3_000, 30_000
BATCH = 500
SOME = 50
MOST_MB = 40.0
"""MiB that ten times the history may add to the peak of memory. The events in the lanes take a few."""
LONG = 200.0
"""Seconds to wait: the two cores have other work, too."""


def numbers() -> Iterator[int]:
    """Numbers of the history: below those of the traffic, and none that a service answers."""
    return (-number for number in count(1) if number % EVERY)


async def write_history(stage: Stage, length: int) -> None:
    """Append events as if a relay had published them before anybody listened: only the log has them."""
    async with open_store(stage.store_url) as store:
        left = islice(numbers(), length)
        while batch := list(islice(left, BATCH)):
            events = [Counted(key=f"key{number % KEYS}", number=number, at=now()) for number in batch]
            stream = f"history-{-batch[0] // BATCH % STREAMS}"
            done = await store.append(stream, [encode(event, id=uuid4()) for event in events])
            first = done.position - len(batch) + 1
            stage.acknowledged |= {number: first + n for n, number in enumerate(batch)}
        await write_checkpoint(store, "main", await store.head())


def peak_mb(process: int) -> float:
    """Return the peak of a process's resident memory so far, in MiB."""
    status = Path(f"/proc/{process}/status").read_text()
    return float(status.partition("VmHWM:")[2].split()[0]) / 1024


async def join_late(stage: Stage, history: int) -> tuple[int, float, float]:
    """Run a newcomer. Return the audited events, the seconds until live traffic had effects, and its peak of memory."""
    await write_history(stage, history)
    stage.relay()
    async with stage.traffic() as traffic:
        await traffic.reached(SOME)
        began = now()
        newcomer = stage.service()
        seconds = await stage.recovered(began, seconds=LONG)
        if history == MANY:
            await newcomer.says("pass.progressed", '"head"')
        await newcomer.says("pass.finished")
        await stage.handles(SOME)
    events = await stage.keeps_promises()
    return events, seconds, peak_mb(newcomer.pid)


@pytest.mark.faults
@pytest.mark.timeout(300)
async def test_newcomer_reads_a_long_history_amid_traffic_in_bounded_memory(
    tmp_path: Path, tidings_rabbitmq: RabbitMQ, recovered: Recovered
) -> None:
    peaks = {}
    for history in (FEW, MANY):
        folder = tmp_path / str(history)
        folder.mkdir()
        async with tidings_rabbitmq.isolated() as url:
            with Stage(folder, url) as stage:
                events, seconds, peaks[history] = await join_late(stage, history)
        assert events > history + SOME
    recovered(events, seconds)
    assert peaks[MANY] - peaks[FEW] < MOST_MB, f"peak of memory in MiB: {peaks}"
