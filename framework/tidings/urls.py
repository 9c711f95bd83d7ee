"""URLs that may be shown: without their secrets.

Internal: settings, logs and errors use it.
"""

from __future__ import annotations

import re
from typing import Final

__all__ = ["redact"]


def redact(url: str) -> str:
    """A URL that may be shown: without password and query, also where the password was not escaped as it should be.

    What stands before the last '@' is taken for user and password, whatever characters are in it.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        # No URL: it may be a user, a password and a host just as well, so it is shown only without any of their signs.
        return "<not a URL>" if re.search(r"[@=:\s]", url) else url
    shown, place = "", rest
    if "@" in rest and not (rest.startswith("/") and scheme.lower().startswith(("sqlite", "memory"))):
        secret, _, place = rest.rpartition("@")
        user, colon, _ = secret.partition(":")
        shown = f"{user}:***@" if colon and user else "***@"
    return f"{scheme}://{shown}{re.split(r'[?#;&=]', place)[0]}"


_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
