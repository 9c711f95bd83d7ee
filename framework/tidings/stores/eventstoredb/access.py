"""Access lists (`$acl`) of Tidings' own streams, which EventStoreDB keeps in their metadata. It grants nobody anything
that EventStoreDB's defaults do not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Final

from tidings.errors import StoreError
from tidings.stores import EventStore
from tidings.stores.eventstoredb.leader import LOG_STREAM

__all__ = ["close_identity", "document_with_access"]

ADMINS: Final = "$admins"
_OWN: Final = "tidings_"


def document_with_access(stream: str, values: Mapping[str, Any], user: str) -> bytes:
    """Return a stream's metadata as JSON. A stream of Tidings' own, as a relay's checkpoint, gets an access list: only
    `user` and administrators write it, and only administrators delete it."""
    document = dict(values)
    if user and stream.startswith(_OWN):
        document.setdefault("$acl", _list([user, ADMINS]))
    return json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":")).encode()


async def close_identity(store: EventStore) -> None:
    """Leave the log's identity, which has just been written, to administrators; where the user may not, as it is."""
    with suppress(StoreError):
        if "$acl" not in (await store.get_metadata(LOG_STREAM)).values:
            await store.set_metadata(LOG_STREAM, {"$acl": _list([ADMINS])})


def _list(writers: list[str]) -> dict[str, Any]:
    return {"$r": "$all", "$w": writers, "$d": [ADMINS], "$mr": "$all", "$mw": writers}
