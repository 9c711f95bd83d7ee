"""AMQP frames however the network cuts them, confirms in every order, and bytes that are no frames."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import body, commands, frame, header

from tidings.buses.rabbitmq.address import Address
from tidings.buses.rabbitmq.bus import RabbitMQBus, _Publisher
from tidings.buses.rabbitmq.channel import Channel
from tidings.buses.rabbitmq.client import AmqpError, ChannelClosed, ConnectionLost, Outcome, version_of
from tidings.buses.rabbitmq.connection import Connection
from tidings.buses.rabbitmq.content import Properties
from tidings.errors import BusUnavailable
from tidings.protocol.message import Message

Theirs = commands.Basic.Properties
"""Encode frames as the broker sends them."""


class _Wire(asyncio.Transport):
    """A transport that remembers what was written and answers nothing."""

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
        frame.marshal(header.ContentHeader(body_size=len(data), properties=Theirs(message_id=str(tag))), 1),
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
        begin = asyncio.create_task(consuming.consume("q", 10, on_delivery, lambda _: None, body_limit=1000))
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
    futures = [publishing.publish("x", Properties({}, message_id=str(number)), b"") for number in range(1, 6)]
    link.data_received(
        frame.marshal(commands.Basic.Return(312, "NO_ROUTE", "x", ""), 1)
        + frame.marshal(header.ContentHeader(properties=Theirs(message_id="2")), 1)
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


async def test_a_return_without_an_id_loses_no_message_whose_id_was_too_long_to_send() -> None:
    link = connection()
    publishing = await channel(link)
    future = publishing.publish("x", Properties({}, message_id="i" * 256), b"")
    link.data_received(
        frame.marshal(commands.Basic.Return(312, "NO_ROUTE", "x", ""), 1)
        + frame.marshal(header.ContentHeader(properties=Theirs()), 1)
        + frame.marshal(commands.Basic.Ack(1), 1)
    )
    assert future.result() is Outcome.RETURNED


async def test_two_messages_of_one_id_are_both_returned_rather_than_one_lost() -> None:
    link = connection()
    publishing = await channel(link)
    futures = [publishing.publish("x", Properties({}, message_id="1"), b"") for _ in range(2)]
    link.data_received(
        frame.marshal(commands.Basic.Return(312, "NO_ROUTE", "x", ""), 1)
        + frame.marshal(header.ContentHeader(properties=Theirs(message_id="1")), 1)
        + frame.marshal(commands.Basic.Ack(2, multiple=True), 1)
    )
    assert [future.result() for future in futures] == [Outcome.RETURNED] * 2


async def test_a_closed_channel_ends_its_calls_and_sends_and_frees_its_number() -> None:
    link = connection()
    closing = await channel(link)
    sent = closing.publish("x", Properties({}), b"")
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


# ---- slow brokers, and what they may make us hold -----------------------------------------


async def sending(link: Connection) -> _Publisher:
    return _Publisher(RabbitMQBus(Address("broker", 5672, "me", "secret", "/")), await channel(link))


def written(link: Connection) -> bytes:
    wire = link._transport
    assert isinstance(wire, _Wire)
    return wire.written


async def turns(count: int = 5) -> None:
    """Let every ready task run."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_nothing_is_published_while_the_broker_does_not_read_and_the_order_stays() -> None:
    link = connection()
    publisher = await sending(link)
    link.pause_writing()
    before = written(link)
    sends = [asyncio.create_task(publisher.send(Message(b"", f"early{number}", "t"))) for number in range(3)]
    await turns()
    assert written(link) == before
    link.resume_writing()
    sends.append(asyncio.create_task(publisher.send(Message(b"", "late", "t"))))
    await turns(10)
    found = [written(link).find(name) for name in (b"early0", b"early1", b"early2", b"late")]
    assert -1 < found[0] < found[1] < found[2] < found[3]
    link.data_received(frame.marshal(commands.Basic.Ack(4, multiple=True), 1))
    await asyncio.gather(*sends)


async def test_a_send_stops_again_when_the_broker_does_and_one_given_up_leaves_the_line() -> None:
    link = connection()
    publisher = await sending(link)
    link.pause_writing()
    first, given_up, last = (asyncio.create_task(publisher.send(Message(b"", name, "t"))) for name in "abc")
    await turns()
    given_up.cancel()
    await turns()
    link.resume_writing()
    link.pause_writing()
    await turns()
    assert written(link).count(b"tidings.events") == 1
    link.resume_writing()
    await turns()
    assert written(link).count(b"tidings.events") == 2
    link.data_received(frame.marshal(commands.Basic.Ack(2, multiple=True), 1))
    await asyncio.gather(first, last)


async def test_sends_that_wait_for_a_broker_end_with_its_connection() -> None:
    link = connection()
    publisher = await sending(link)
    link.pause_writing()
    sends = [asyncio.create_task(publisher.send(Message(b"", name, "t"))) for name in "abc"]
    await turns()
    link.connection_lost(None)
    ends = await asyncio.gather(*sends, return_exceptions=True)
    assert [type(end) for end in ends] == [BusUnavailable] * 3


async def test_a_body_over_the_limit_is_delivered_cut_and_the_next_message_whole() -> None:
    link = connection()
    consuming, received = await consumer(link, limit=100)
    link.data_received(delivery(1, b"x" * 5_000) + delivery(2, b"y" * 100))
    assert received == [(1, "1", b"x" * 101), (2, "2", b"y" * 100)]
    assert consuming.closed is None


async def test_a_frame_over_the_agreed_size_ends_the_connection_before_it_is_held() -> None:
    link = connection()
    link.data_received(b"\x03\x00\x01" + (link.frame_max + 1).to_bytes(4, "big"))
    assert isinstance(link.lost, ConnectionLost)


async def test_methods_that_nobody_asked_for_are_not_collected_for_ever() -> None:
    link = connection()
    link.data_received(frame.marshal(commands.Connection.OpenOk(), 0) * 100)
    assert "out of turn" in str(link.lost)


# ---- a whole conversation, broken ----------------------------------------------------------

BODIES = [b"", b"one", b"x" * 51, b"four" * 30]


async def consumer(link: Connection, limit: int = 1000) -> tuple[Channel, list[tuple[int, str | None, bytes]]]:
    """Return a channel that consumes, and the list of its deliveries."""
    received: list[tuple[int, str | None, bytes]] = []

    def on_delivery(tag: int, properties: Properties | None, data: bytes) -> None:
        received.append((tag, properties.message_id if properties is not None else None, data))

    consuming = await channel(link)
    begin = asyncio.create_task(consuming.consume("q", 10, on_delivery, lambda _: None, body_limit=limit))
    await turns()
    link.data_received(frame.marshal(commands.Basic.QosOk(), 1))
    await turns()
    link.data_received(frame.marshal(commands.Basic.ConsumeOk("tidings"), 1))
    await begin
    return consuming, received


def conversation() -> tuple[bytes, list[int]]:
    """Return the bytes of deliveries, confirms, a return and a close, and the offsets at which each delivery is
    complete."""
    stream, complete = b"", []
    for tag, data in enumerate(BODIES, 1):
        stream += delivery(tag, data)
        complete.append(len(stream))
        stream += frame.marshal(commands.Basic.Ack(tag), 1)
    stream += frame.marshal(commands.Basic.Return(312, "NO_ROUTE", "x", ""), 1)
    stream += frame.marshal(header.ContentHeader(properties=Theirs(message_id="5")), 1)
    stream += frame.marshal(commands.Basic.Ack(5), 1) + frame.marshal(commands.Basic.Nack(6), 1)
    return stream + frame.marshal(commands.Channel.Close(404, "NOT_FOUND", 0, 0), 1), complete


STREAM, COMPLETE = conversation()


@given(
    cuts=st.lists(st.integers(1, 60), min_size=1, max_size=10),
    flips=st.lists(st.integers(0, 8 * len(STREAM) - 1), max_size=4),
    end=st.integers(0, len(STREAM)),
)
@settings(max_examples=400, deadline=None)
def test_a_broken_conversation_gives_what_was_whole_and_ends_everything_else_with_a_typed_error(
    cuts: list[int], flips: list[int], end: int
) -> None:
    async def check() -> None:
        link = connection()
        consuming, received = await consumer(link)
        sent = [consuming.publish("x", Properties({}, message_id=str(number)), b"") for number in range(1, 8)]
        broken = bytearray(STREAM)
        for flip in flips:
            broken[flip // 8] ^= 1 << flip % 8
        at = turn = 0
        while at < end:
            step = min(cuts[turn % len(cuts)], end - at)
            link.data_received(bytes(broken[at : at + step]))
            at, turn = at + step, turn + 1
        link.connection_lost(None)
        whole = min([end, *(flip // 8 for flip in flips)])
        good = [number for number, complete in enumerate(COMPLETE, 1) if complete <= whole]
        assert received[: len(good)] == [(number, str(number), BODIES[number - 1]) for number in good]
        assert isinstance(consuming.closed, AmqpError)
        assert isinstance(link.lost, ConnectionLost)
        for future in sent:
            assert future.done()
            error = future.exception()
            assert isinstance(error, AmqpError) or future.result() in Outcome

    run(check)


async def test_a_broker_whose_frames_are_smaller_than_amqp_allows_is_none() -> None:
    link = connection()
    login = asyncio.create_task(link._log_in(Address("broker", 5672, "me", "secret", "/"), "test"))
    await turns(1)
    link.data_received(LOGGING_IN[0])
    await turns()
    link.data_received(frame.marshal(commands.Connection.Tune(2047, 4095, 60), 0))
    with pytest.raises(ConnectionLost, match="4095"):
        await asyncio.wait_for(login, 5)


LOGGING_IN = [
    frame.marshal(commands.Connection.Start(server_properties={"product": "RabbitMQ"}, mechanisms="PLAIN"), 0),
    frame.marshal(commands.Connection.Tune(2047, 131_072, 60), 0),
    frame.marshal(commands.Connection.OpenOk(), 0),
]


@given(
    flips=st.lists(st.integers(0, 8 * len(b"".join(LOGGING_IN)) - 1), max_size=3),
    step=st.integers(1, 50),
    end=st.integers(0, len(b"".join(LOGGING_IN))),
)
@settings(max_examples=300, deadline=None)
def test_a_broken_greeting_ends_in_a_login_or_a_typed_error(flips: list[int], step: int, end: int) -> None:
    async def check() -> None:
        link = connection()
        login = asyncio.create_task(link._log_in(Address("broker", 5672, "me", "secret", "/"), "test"))
        stream = bytearray(b"".join(LOGGING_IN))
        for flip in flips:
            stream[flip // 8] ^= 1 << flip % 8
        await turns(1)
        for at in range(0, end, step):
            link.data_received(bytes(stream[at : min(at + step, end)]))
            await turns(3)
        link.connection_lost(None)
        async with asyncio.timeout(5):
            [ended] = await asyncio.gather(login, return_exceptions=True)
        assert ended is None or isinstance(ended, ConnectionLost)
        if ended is None:
            assert link.frame_max >= 4096

    run(check)


@pytest.mark.parametrize(
    ("properties", "version"),
    [
        ({"product": "RabbitMQ", "version": "4.0.5"}, (4, 0)),
        ({"product": "RabbitMQ", "version": "3.13.7+rc.1"}, (3, 13)),
        ({"product": "RabbitMQ", "version": "10.2.1"}, (10, 2)),
        ({"product": "LavinMQ", "version": "4.0.5"}, ()),
        ({"product": "RabbitMQ"}, ()),
        ({"product": "RabbitMQ", "version": "main"}, ()),
        ({}, ()),
        (None, ()),
    ],
)
def test_the_version_is_that_of_rabbitmq_alone(properties: dict[str, object] | None, version: tuple[int, ...]) -> None:
    assert version_of(properties) == version
