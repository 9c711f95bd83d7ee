"""Who ends cleanly has said so before another process is given its queue, and is not taken for one that crashed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from tests.integration.embedded import Happened, auditing, many, until
from tests.integration.test_partitions_embedded import site
from tidings.delivery.succession import Succession


async def test_a_process_that_stops_is_not_taken_for_one_that_crashed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave = Succession.leave

    async def slowly(succession: Succession) -> None:
        await asyncio.sleep(0.15)
        await leave(succession)

    monkeypatch.setattr(Succession, "leave", slowly)
    one, two = auditing(), auditing()
    with capture_logs() as logs:
        async with site(tmp_path) as here, here.process(one) as first:
            await here.append([Happened(key="k", n=1)])
            await here.settled(one)
            (before,) = await here.shares()
            assert before is not None
            async with here.process(two) as second:
                await until(lambda: second.consuming)
                feeding = asyncio.create_task(here.append(many(100, 5), pause=0.005))
                first.stopping.set()

                async def taken_over() -> bool:
                    return set(await here.shares()).isdisjoint({before, None})

                await until(taken_over)
                await feeding
                await here.settled(two)
    events = [entry["event"] for entry in logs]
    assert events.count("service.consuming") == 2
    assert "service.unclean_end_found" not in events
