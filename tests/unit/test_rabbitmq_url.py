"""The RabbitMQ URL: what it means, what is refused, and that its password is never shown."""

from __future__ import annotations

from importlib import metadata

import pytest

from tidings.adapters import open_bus
from tidings.buses.rabbitmq import address
from tidings.buses.rabbitmq.address import address_of
from tidings.buses.rabbitmq.bus import RabbitMQBus, open_rabbitmq
from tidings.errors import BusUnavailable, ConfigurationError


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("amqp://broker", "broker:5672, vhost '/', user 'guest'"),
        ("amqp://broker/", "broker:5672, vhost '/', user 'guest'"),
        ("amqp://me:secret@broker:1/shop", "broker:1, vhost 'shop', user 'me'"),
        ("amqp://m%40e:se%2Fcret@broker/a%2Fb", "broker:5672, vhost 'a/b', user 'm@e'"),
        ("amqps://broker/%2F?heartbeat=5", "broker:5671, vhost '/', user 'guest'"),
        ("AMQP://[::1]:5", "::1:5, vhost '/', user 'guest'"),
        ("amqp://me:secret@a,b:1,[::1]:2/shop", "a:5672,b:1,::1:2, vhost 'shop', user 'me'"),
        ("amqp://me:se,cret@a,b", "a:5672,b:5672, vhost '/', user 'me'"),
        ("amqps://a,b:1", "a:5671,b:1, vhost '/', user 'guest'"),
    ],
)
async def test_a_url_says_where_and_as_whom(url: str, shown: str) -> None:
    assert repr(await open_rabbitmq(url)) == f"RabbitMQBus({shown})"


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("amqp://", "cannot be read"),
        ("amqp://me:se/cret@broker/", "%2F"),
        ("amqp://me:se#cret@broker/", "%23"),
        ("amqp://me:se?cret@broker/", "%3F"),
        ("amqp://me:secret@broker:port/", "cannot be read"),
        ("amqp://me:secret@broker/a/b", "%2F"),
        ("amqp://me:secret@a,", "host1:5672,host2:5672"),
        ("amqp://me:secret@a:1,,b:1/", "host1:5672,host2:5672"),
        ("amqp://me:secret@a:1,b:port/", "host1:5672,host2:5672"),
        ("amqp://me:secret@a:1,me:secret@b:1/", "host1:5672,host2:5672"),
        ("amqp://me:secret@a:1,amqp://me:secret@b:1/", "host1:5672,host2:5672"),
        ("amqp://me:secret@broker/?hartbeat=5", "'hartbeat'"),
        ("amqp://me:secret@broker/?heartbeat=0", "1 to 60"),
        ("amqp://me:secret@broker/?heartbeat=soon", "1 to 60"),
        ("amqp://me:secret@broker/?client=pika", "'pika': it must be pamqp or aio-pika"),
        ("amqp://me:secret@broker/?cafile=/ca.pem", "amqps://"),
        ("amqps://me:secret@broker/?cafile=/no/such/file.pem", "certificates"),
    ],
)
async def test_a_url_that_cannot_work_is_refused_without_showing_it(url: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint) as raised:
        await open_rabbitmq(url)
    assert "cret" not in str(raised.value)
    assert "cret" not in f"{raised.value.__cause__} {raised.value.__context__}"


async def test_a_closed_bus_says_so_without_its_password() -> None:
    bus = await open_rabbitmq("amqp://me:secret@broker/")
    await bus.close()
    assert isinstance(bus, RabbitMQBus)
    with pytest.raises(BusUnavailable, match="closed") as raised:
        await bus.provision()
    assert "secret" not in str(raised.value)


async def test_when_no_node_of_a_cluster_lets_us_in_each_is_named_with_its_reason() -> None:
    bus = await open_rabbitmq("amqp://me:secret@127.0.0.1:1,127.0.0.1:2/shop")
    with pytest.raises(BusUnavailable) as raised:
        await bus.provision()
    said = str(raised.value)
    assert "RabbitMQ at 127.0.0.1:1,127.0.0.1:2, vhost 'shop'" in said
    assert "127.0.0.1:1: [Errno" in said
    assert "127.0.0.1:2: [Errno" in said
    assert "secret" not in said


@pytest.mark.parametrize(("url", "client"), [("amqp://a", "pamqp"), ("amqp://a/?client=aio-pika", "aio-pika")])
async def test_the_client_is_an_option(url: str, client: str) -> None:
    assert address_of(url).client == client
    assert "pika" not in repr(await open_rabbitmq(url))


async def test_an_aio_pika_that_is_too_old_or_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(address, "version", lambda package: "6.9.4")
    with pytest.raises(ConfigurationError, match=r"aiormq 6\.9\.4 .*pip install 'aio-pika>=10' 'aiormq>=7\.1'"):
        async with open_bus("amqp://me:secret@broker/?client=aio-pika"):
            pass
    monkeypatch.setattr(address, "version", _missing)
    with pytest.raises(ConfigurationError, match=r"needs the package 'aiormq'.*pip install 'tidings\[rabbitmq\]'"):
        async with open_bus("amqp://me:secret@broker/?client=aio-pika"):
            pass


def _missing(name: str) -> str:
    raise metadata.PackageNotFoundError(name)


async def test_a_bus_needs_a_connection() -> None:
    with pytest.raises(ConfigurationError, match=r"needs a connection of aio-pika; for a URL .*open_bus"):
        RabbitMQBus()
