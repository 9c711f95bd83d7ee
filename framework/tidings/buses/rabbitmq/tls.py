"""TLS for AMQP: certificates from a URL's options, and what to do when a broker's is refused. It never trusts blindly.

The broker's certificate must come from an authority that is trusted (the system's, or those of `cafile`), be valid now,
and be for the host that the URL names. Nothing switches that off: what would is refused with what to do instead.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from typing import Final

from tidings.errors import ConfigurationError

__all__ = ["FILES", "context_of", "remedy_of", "refuse_blindness"]

FILES: Final = ("cafile", "certfile", "keyfile")
_BLIND: Final = ("verify", "insecure", "check_hostname")
"""Parts of the names by which other clients' URLs switch verification off: `verify=verify_none`, `ssl_verify`,
`no_verify_ssl`, `tlsInsecure`, `tlsVerifyCert`."""
_HOST, _NOT_YET, _EXPIRED = (62, 64), 9, 10
"""Of OpenSSL's X509_V_ERR: HOSTNAME_MISMATCH and IP_ADDRESS_MISMATCH, CERT_NOT_YET_VALID, CERT_HAS_EXPIRED."""


def refuse_blindness(option: str) -> None:
    """Raises `ConfigurationError` for an option that other clients know for trusting any certificate."""
    if any(part in option.lower() for part in _BLIND):
        raise ConfigurationError(
            f"the RabbitMQ URL has the option {option!r}: certificates are always verified, because whoever is between "
            "could read and forge everything otherwise. For an authority of your own name its certificate: "
            "amqps://...?cafile=/path/ca.pem"
        )


def context_of(options: Mapping[str, str]) -> ssl.SSLContext:
    """By the options `cafile`, `certfile` and `keyfile`, paths of PEM files. Raises `ConfigurationError`."""
    if empty := [name for name in FILES if options.get(name) == ""]:
        raise ConfigurationError(f"the RabbitMQ URL says {empty[0]}= and names no file")
    if "keyfile" in options and "certfile" not in options:
        raise ConfigurationError("the RabbitMQ URL names a keyfile, but no certfile that it belongs to")
    try:
        context = ssl.create_default_context(cafile=options.get("cafile"))
        if "certfile" in options:
            # A password, because OpenSSL would ask the terminal for the one of a locked key, and wait for ever.
            context.load_cert_chain(options["certfile"], options.get("keyfile"), password=b"")
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(f"the certificates that the RabbitMQ URL names cannot be used: {error}") from error
    return context


_COMPARE: Final = (
    "Compare TLS versions and client certificates (certfile=, keyfile=) with what the broker's log asks for"
)


def remedy_of(error: BaseException | None, *, secured: bool) -> str | None:
    """What to do about a handshake that failed; None when TLS is not what failed.

    `secured`: the connection was to use TLS. Then a reset may be all that is seen of a refused certificate.
    """
    while error is not None and not isinstance(error, ssl.SSLError):
        if secured and isinstance(error, ConnectionResetError):
            return f"Connect again once it is there. If it refuses always: {_COMPARE[0].lower()}{_COMPARE[1:]}"
        error = error.__cause__
    if error is None:
        return None
    if not isinstance(error, ssl.SSLCertVerificationError):
        if error.reason in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"):
            return "That port speaks no TLS: name the one that does (5671 by default)"
        return _COMPARE
    if error.verify_code in _HOST:
        return "Name the host in TIDINGS_BUS as the certificate does, or give the broker a certificate for this name"
    if error.verify_code == _EXPIRED:
        return "Give the broker a new certificate; if it has one, compare the clocks"
    if error.verify_code == _NOT_YET:
        return "Compare the clocks of both machines: the broker's certificate is of the future"
    return (
        "Name the certificate of the broker's authority in TIDINGS_BUS, amqps://...?cafile=/path/ca.pem; if you did, "
        "somebody else may be answering"
    )
