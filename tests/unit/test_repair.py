"""The marker of a repair: whoever is behind reads the log, and nobody else notices anything."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import uuid4

from hypothesis import given
from hypothesis import strategies as st

from tidings.buses import EventBus
from tidings.operations.repair import publish_marker
from tidings.protocol.message import Marker, Message
from tidings.protocol.position import ALL_BUCKETS, Accepted, Arrival

LOG = uuid4()
positions = st.integers(-1, 50)


class Remembering:
    """A bus that keeps the messages."""

    def __init__(self) -> None:
        self.sent: list[Message] = []

    async def provision(self) -> None:
        pass

    @asynccontextmanager
    async def publisher(self, *, lock: str | None = None) -> AsyncIterator[Any]:
        assert lock is None, "a relay that leads keeps its lock"
        yield self

    async def send(self, message: Message) -> None:
        self.sent.append(message)


async def sent(position: int) -> Marker:
    bus = Remembering()
    await publish_marker(cast("EventBus", bus), LOG, position)
    (message,) = bus.sent
    assert message.bucket is None, "it goes to every partition"
    return Marker.decode(message)


@given(floor=positions, marks=st.dictionaries(st.sampled_from(ALL_BUCKETS), positions), position=positions)
async def test_it_is_a_gap_to_who_is_behind_and_a_duplicate_to_who_is_not(
    floor: int, marks: dict[int, int], position: int
) -> None:
    accepted = Accepted(ALL_BUCKETS, floor, marks)
    before = [accepted.tail(bucket) for bucket in ALL_BUCKETS]
    marker = await sent(position)
    assert marker.log == LOG
    arrival = accepted.hear(marker.position, marker.base, marker.touched)
    assert arrival is (Arrival.GAP if accepted.reached < position else Arrival.DUPLICATE)
    # It moves nothing by itself: what is accepted, and so what is settled, the pass must have read.
    assert (accepted.reached, [accepted.tail(bucket) for bucket in ALL_BUCKETS]) == (floor, before)


@given(
    position=positions,
    later=positions,
    base=positions,
    touched=st.dictionaries(st.sampled_from(ALL_BUCKETS), positions),
)
async def test_the_relays_next_marker_means_what_it_meant_before(
    position: int, later: int, base: int, touched: dict[int, int]
) -> None:
    """A service that has heard the repair's marker and not begun its pass judges messages as before."""
    one, other = Accepted(ALL_BUCKETS, 5, {}), Accepted(ALL_BUCKETS, 5, {})
    marker = await sent(position)
    one.hear(marker.position, marker.base, marker.touched)
    assert one.hear(later, base, touched) is other.hear(later, base, touched)
    assert one.reached == other.reached
