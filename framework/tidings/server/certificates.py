"""Certificates for TLS, and whether an address is this machine's alone. It knows no users."""

from __future__ import annotations

import ipaddress
import shutil
import ssl
import subprocess
from pathlib import Path

from tidings.errors import ConfigurationError

__all__ = ["generated_certificate", "is_loopback", "tls_context"]


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def tls_context(certificate: str, key: str) -> ssl.SSLContext:
    """For HTTP/2 alone. Raises `ConfigurationError` for files that cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"the server's certificate {certificate} and key {key} cannot be used: {error}. Give PEM files that belong "
            "together, or none, and a certificate for localhost is made."
        ) from error
    return context


def generated_certificate(folder: Path, host: str) -> tuple[str, str]:
    """Certificate and key in `folder`, made with the program `openssl` unless they are there. For tests and laptops."""
    certificate, key = folder / "server.crt", folder / "server.key"
    if certificate.exists() and key.exists():
        return str(certificate), str(key)
    program = shutil.which("openssl")
    if program is None:
        raise ConfigurationError("no certificate was given, and none can be made without the program openssl")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    kind = "IP" if host.replace(".", "").isdigit() or ":" in host else "DNS"
    names = sorted({"DNS:localhost", "IP:127.0.0.1", "IP:::1", f"{kind}:{host}"})
    made = subprocess.run(
        [
            *(program, "req", "-x509", "-nodes", "-days", "825", "-subj", "/CN=localhost"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"),
            *("-addext", f"subjectAltName={','.join(names)}"),
            *("-addext", "keyUsage=critical,digitalSignature,keyCertSign", "-addext", "extendedKeyUsage=serverAuth"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        capture_output=True,
        check=False,
    )
    if made.returncode:
        raise ConfigurationError(f"openssl made no certificate: {made.stderr.decode(errors='replace').strip()}")
    key.chmod(0o600)
    return str(certificate), str(key)
