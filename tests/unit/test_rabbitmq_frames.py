"""AMQP frames however the network cuts them, confirms in every order, and bytes that are no frames."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import body, commands, frame, header

from tidings.buses.amqp import Address, AmqpError, Channel, ChannelClosed, Connection, ConnectionLost, Outcome

Properties = commands.Basic.Properties


class _Wire(asyncio.Transport):
    """Remembers what was written; nothing comes back."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.aborted = False

    def write(self, data: Any) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True


def connection(heartbeat: int = 10) -> Connection:
    made = Connection(heartbeat, None)
    made.connection_made(_Wire())
    return made


async def channel(of: Connection) -> Channel:
    opening = asyncio.create_task(of.channel())
    await asyncio.sleep(0)
    of.data_received(frame.marshal(commands.Channel.OpenOk(), 1))
    return await opening


def delivery(tag: int, data: bytes, cut: int = 50) -> bytes:
    parts = [
        frame.marshal(commands.Basic.Deliver("tidings", tag, False, "tidings.events", ""), 1),
        frame.marshal(header.ContentHeader(body_size=len(data), properties=Properties(message_id=str(tag))), 1),
    ]
    parts += [frame.marshal(body.ContentBody(data[at : at + cut]), 1) for at in range(0, len(data), cut)]
    return b"".join(parts)


def run(check: Callable[[], Any]) -> None:
    asyncio.run(check())


@given(bodies=st.lists(st.binary(max_size=200), max_size=5), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=20))
@settings(max_examples=100, deadline=None)
def test_deliveries_are_the_same_however_the_network_cuts_them(bodies: list[bytes], cuts: list[int]) -> None:
    async def check() -> None:
        link = connection()
        received: list[tuple[int, str | None, bytes]] = []

        def on_delivery(tag: int, properties: Properties | None, data: bytes) -> None:
            received.append((tag, properties.message_id if properties is not None else None, data))

        consuming = await channel(link)
        begin = asyncio.create_task(consuming.consume("q", 10, on_delivery, lambda _: None))
        await asyncio.sleep(0)
        link.data_received(frame.marshal(commands.Basic.QosOk(), 1))
        for _ in range(3):
            await asyncio.sleep(0)
        stream = frame.marshal(commands.Basic.ConsumeOk("tidings"), 1)
        stream += b"".join(delivery(tag, data) for tag, data in enumerate(bodies, 1))
        at = turn = 0
        while at < len(stream):
            step = cuts[turn % len(cuts)]
            link.data_received(stream[at : at + step])
            at, turn = at + step, turn + 1
        await begin
        assert received == [(tag, str(tag), data) for tag, data in enumerate(bodies, 1)]

    run(check)


@given(data=st.binary(min_size=1, max_size=100))
@settings(max_examples=200, deadline=None)
def test_bytes_that_are_no_frames_end_the_connection_and_nothing_else(data: bytes) -> None:
    async def check() -> None:
        link = connection()
        used = await channel(link)
        link.data_received(data + b"\x01\x00\x01\x00\x00\x00\x01\x00\x00")
        link.connection_lost(None)
        assert isinstance(link.lost, ConnectionLost)
        assert isinstance(used.closed, AmqpError)

    run(check)


async def test_one_confirm_can_settle_many_and_a_return_marks_its_message() -> None:
    link = connection()
    publishing = await channel(link)
    futures = [publishing.publish("x", Properties(message_id=str(number)), b"") for number in range(1, 6)]
    link.data_received(
        frame.marshal(commands.Basic.Return(312, "NO_ROUTE", "x", ""), 1)
        + frame.marshal(header.ContentHeader(properties=Properties(message_id="2")), 1)
        + frame.marshal(commands.Basic.Ack(3, multiple=True), 1)
        + frame.marshal(commands.Basic.Nack(5), 1)
        + frame.marshal(commands.Basic.Ack(99), 1)
    )
    assert [future.result() for future in futures[:3]] == [Outcome.CONFIRMED, Outcome.RETURNED, Outcome.CONFIRMED]
    assert not futures[3].done()
    assert futures[4].result() is Outcome.REFUSED
    link.data_received(frame.marshal(commands.Basic.Ack(0, multiple=True), 1))
    link.fail(ConnectionLost("over"))
    with pytest.raises(ConnectionLost, match="over"):
        await futures[3]


async def test_two_messages_of_one_id_are_both_returned_rather_than_one_lost() -> None:
    link = connection()
    publishing = await channel(link)
    futures = [publishing.publish("x", Properties(message_id="1"), b"") for _ in range(2)]
    link.data_received(
        frame.marshal(commands.Basic.Return(312, "NO_ROUTE", "x", ""), 1)
        + frame.marshal(header.ContentHeader(properties=Properties(message_id="1")), 1)
        + frame.marshal(commands.Basic.Ack(2, multiple=True), 1)
    )
    assert [future.result() for future in futures] == [Outcome.RETURNED] * 2


async def test_a_closed_channel_ends_its_calls_and_sends_and_frees_its_number() -> None:
    link = connection()
    closing = await channel(link)
    sent = closing.publish("x", Properties(), b"")
    asking = asyncio.create_task(closing.call(commands.Queue.Declare(queue="q"), commands.Queue.DeclareOk))
    await asyncio.sleep(0)
    link.data_received(frame.marshal(commands.Channel.Close(404, "NOT_FOUND", 0, 0), 1))
    for waiting in (sent, asking):
        with pytest.raises(ChannelClosed, match="404 NOT_FOUND"):
            await waiting
    assert link.lost is None
    await channel(link)


async def test_a_call_that_was_given_up_ends_its_channel() -> None:
    link = connection()
    used = await channel(link)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(used.call(commands.Queue.Declare(queue="q"), commands.Queue.DeclareOk), 0.01)
    link.data_received(frame.marshal(commands.Queue.DeclareOk("q", 0, 0), 1))
    with pytest.raises(ChannelClosed, match="cancelled"):
        await used.call(commands.Queue.Declare(queue="other"), commands.Queue.DeclareOk)


async def test_silence_is_counted_in_turns_of_the_timer_and_any_byte_ends_it() -> None:
    link = connection(heartbeat=60)
    for _ in range(4):
        link._tick()
    link.data_received(frame.marshal(commands.Connection.Unblocked(), 0)[:1])
    for _ in range(4):
        link._tick()
    assert link.lost is None
    link._tick()
    assert "nothing was heard for 120 s" in str(link.lost)


async def test_the_password_is_in_no_text_of_an_address() -> None:
    address = Address("broker", 5672, "me", "secret", "/")
    assert "secret" not in f"{address} {address!r}"
