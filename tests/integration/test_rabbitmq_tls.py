"""amqps:// against a real RabbitMQ with certificates made for the test: a wrong identity is refused, with the remedy,
before a password is sent."""

from __future__ import annotations

import asyncio
import os
import shutil
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from services.demo.fleet.processes import free_ports
from tidings import open_bus
from tidings.buses import Subscription
from tidings.buses.rabbitmq.client import ConnectionLost
from tidings.buses.rabbitmq.tls import remedy_of
from tidings.errors import BusUnavailable, ConfigurationError
from tidings.testing.brokers import RabbitMQNode, node_for_tests
from tidings.testing.bus_conformance import event, take

SERVICE = Subscription("inventory")


def openssl(*arguments: str | Path) -> None:
    program = shutil.which("openssl")
    assert program is not None, "apt-get install openssl"
    subprocess.run([program, *map(str, arguments)], check=True, capture_output=True, stdin=subprocess.DEVNULL)


class Authority:
    """Makes certificates with the program `openssl`."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder, self.cafile, self._key = folder, folder / "ca.pem", folder / "ca.key"
        openssl("req", "-x509", *self._new(self._key), "-subj", f"/CN={folder.name}", "-out", self.cafile)

    @staticmethod
    def _new(key: Path) -> tuple[str | Path, ...]:
        return "-nodes", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-keyout", key

    def certificate(self, name: str, names: str = "DNS:localhost", *, days: int = 30) -> tuple[Path, Path]:
        """Make certificate and key for `names`. With negative days it has expired."""
        request, certificate, key = (self.folder / f"{name}.{end}" for end in ("csr", "pem", "key"))
        openssl("req", *self._new(key), "-subj", f"/CN={name}", "-out", request)
        extensions = self.folder / "extensions"
        extensions.write_text(f"subjectAltName={names}\n")
        signing = ("-CA", self.cafile, "-CAkey", self._key, "-CAcreateserial", "-days", str(days))
        openssl("x509", "-req", "-in", request, *signing, "-extfile", extensions, "-out", certificate)
        os.chmod(key, 0o644)
        return certificate, key


@dataclass(frozen=True)
class Secured:
    """A node that speaks AMQP only over TLS, to clients with a certificate of its authority, and the certificates."""

    node: RabbitMQNode
    port: int
    authority: Authority
    stranger: Authority
    client: tuple[Path, Path]

    def url(self, host: str = "localhost", **options: object) -> str:
        chosen = {"cafile": self.authority.cafile, "certfile": self.client[0], "keyfile": self.client[1]} | options
        query = "&".join(f"{name}={value}" for name, value in chosen.items() if value is not None)
        parts = urlsplit(self.node.url)
        return f"amqps://{parts.username}:{parts.password}@{host}:{self.port}/?{query}"


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    folder = tmp_path_factory.mktemp("certificates")
    authority, stranger = Authority(folder / "authority"), Authority(folder / "stranger")
    certificate, key = authority.certificate("broker")
    (port,) = free_ports(1)
    settings = {
        "listeners.ssl.local": f"127.0.0.1:{port}",
        "ssl_options.cacertfile": str(authority.cafile),
        "ssl_options.certfile": str(certificate),
        "ssl_options.keyfile": str(key),
        "ssl_options.verify": "verify_peer",
        "ssl_options.fail_if_no_peer_cert": "true",
    }
    with node_for_tests(settings) as node:
        yield Secured(node, port, authority, stranger, authority.certificate("client"))


async def refused(url: str, says: str) -> None:
    async with open_bus(url) as bus:
        with pytest.raises(BusUnavailable, match=says) as unavailable:
            await bus.provision()
    password = urlsplit(url).password
    assert password
    assert password not in str(unavailable.value)


async def test_everything_works_over_tls_with_certificates_on_both_sides(secured: Secured) -> None:
    async with open_bus(secured.url()) as bus:
        await bus.provision(SERVICE)
        async with bus.publisher(lock="tls") as publisher, bus.consume(SERVICE) as consumer:
            messages = [event(1), event(2, data=b'"' + b"x" * 500_000 + b'"')]
            for message in messages:
                await publisher.send(message)
            assert [delivery.message for delivery in await take(consumer, 2)] == messages


async def test_an_authority_that_is_not_trusted_is_refused(secured: Secured) -> None:
    for stranger in (secured.stranger.cafile, None):
        await refused(secured.url(cafile=stranger), r"CERTIFICATE_VERIFY_FAILED.*cafile=/path/ca\.pem")


async def test_another_host_than_the_certificate_is_for_is_refused(secured: Secured) -> None:
    await refused(secured.url("127.0.0.1"), r"not valid for '127\.0\.0\.1'.*Name the host in TIDINGS_BUS as the")


async def test_a_client_without_a_certificate_is_told_what_to_compare(secured: Secured) -> None:
    await refused(secured.url(certfile=None, keyfile=None), r"certfile=, keyfile=")
    certificate, key = secured.stranger.certificate("impostor")
    await refused(secured.url(certfile=certificate, keyfile=key), r"certfile=, keyfile=")


def test_a_reset_may_be_the_answer_to_a_certificate() -> None:
    """A broker that closes at once may overtake what it said about the certificate."""
    broken = ConnectionLost("the connection broke")
    broken.__cause__ = ConnectionResetError(104, "Connection reset by peer")
    assert "certfile=, keyfile=" in str(remedy_of(broken, secured=True))
    assert remedy_of(broken, secured=False) is None


async def test_of_a_cluster_the_remedy_is_said_too(secured: Secured) -> None:
    hosts = f"127.0.0.1:{secured.port},127.0.0.1"
    await refused(secured.url(hosts), r"not valid for '127\.0\.0\.1'.*Name the host in TIDINGS_BUS as the")


async def test_tls_on_one_side_only_is_named(secured: Secured) -> None:
    clear = urlsplit(secured.node.url)
    await refused(secured.url().replace(f":{secured.port}/", f":{clear.port}/"), "That port speaks no TLS")
    login = f"{clear.username}:{clear.password}"
    await refused(f"amqp://{login}@localhost:{secured.port}/", "it speaks TLS, so its URL begins with amqps://")


@asynccontextmanager
async def answering(certificate: Path, key: Path, heard: bytearray) -> AsyncIterator[int]:
    """A port on which a stranger answers with a certificate and keeps what it receives."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.read())
        writer.close()

    server = await asyncio.start_server(hear, "127.0.0.1", 0, ssl=context)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_a_certificate_that_is_over_is_refused(tmp_path: Path) -> None:
    authority, heard = Authority(tmp_path / "authority"), bytearray()
    certificate, key = authority.certificate("old", days=-1)
    async with answering(certificate, key, heard) as port:
        url = f"amqps://me:hush@localhost:{port}/?cafile={authority.cafile}"
        await refused(url, "certificate has expired.*Give the broker a new certificate")


async def test_who_is_in_between_hears_no_password(tmp_path: Path) -> None:
    authority, impostor, heard = Authority(tmp_path / "authority"), Authority(tmp_path / "impostor"), bytearray()
    for made, names in ((impostor, "DNS:localhost"), (authority, "DNS:somebody.else")):
        certificate, key = made.certificate("middle", names)
        async with answering(certificate, key, heard) as port:
            url = f"amqps://me:hush@localhost:{port}/?cafile={authority.cafile}"
            await refused(url, "CERTIFICATE_VERIFY_FAILED")
    assert heard == b""


@pytest.mark.parametrize(
    "option",
    [
        "verify=verify_none",
        "verify=0",
        "ssl_verify=false",
        "no_verify_ssl=1",
        "verify_ssl=False",
        "tlsInsecure=true",
        "tlsVerifyCert=false",
        "check_hostname=no",
        "server_name_indication=disable",
        "ssl_version=SSLv3",
        "fail_if_no_peer_cert=false",
    ],
)
async def test_no_option_of_a_url_switches_verification_off(option: str) -> None:
    with pytest.raises(ConfigurationError, match=option.partition("=")[0]):
        async with open_bus(f"amqps://me:hush@localhost/?{option}"):
            raise AssertionError("it was opened")


async def test_an_attempt_to_trust_blindly_is_answered_with_what_to_do_instead() -> None:
    with pytest.raises(ConfigurationError, match=r"always verified.*cafile=/path/ca\.pem"):
        async with open_bus("amqps://me:hush@localhost/?verify=verify_none"):
            raise AssertionError("it was opened")


async def test_files_that_cannot_be_meant_are_refused_and_a_locked_key_asks_nobody(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    certificate, key = authority.certificate("client")
    locked, nothing = tmp_path / "locked.key", tmp_path / "nothing.pem"
    openssl("ec", "-in", key, "-aes256", "-passout", "pass:hush", "-out", locked)
    nothing.write_text("nothing")
    for options, says in (
        ("cafile=", "names no file"),
        (f"cafile={nothing}", "cannot be used"),
        (f"cafile={tmp_path}/none.pem", "cannot be used"),
        (f"keyfile={key}", "no certfile"),
        (f"certfile={certificate}&keyfile={locked}", "cannot be used"),
        (f"certfile={nothing}&keyfile={key}", "cannot be used"),
    ):
        with pytest.raises(ConfigurationError, match=says):
            async with open_bus(f"amqps://me:hush@localhost/?{options}"):
                raise AssertionError("it was opened")
