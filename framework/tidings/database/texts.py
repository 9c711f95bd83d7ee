"""Texts in a service's database, which cannot hold every text: what is written reads back equal.

PostgreSQL refuses NUL and lone surrogates, one whose encoding is not UTF8 also every character that it lacks. Names of
streams, wire names, partition keys and errors come from anywhere, so what cannot be written as it is, is written in
another way. Everything else stays as it is, for operators to read and to search. It opens no connection.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from contextlib import suppress
from typing import Any, Final

import sqlalchemy as sa

__all__ = ["MARK", "Text", "decoded", "encoded", "learn_encoding"]

ESCAPED: Final = "tidings-escaped:"
"""Prefix of a text in which a backslash is `\\\\`, and a character that could not be written `\\u{hexadecimal}`."""
BASE64: Final = "tidings-base64:"
"""Prefix of a long text in base64. Escaping would multiply its length, and indexes have limits."""
_MARKED: Final = (ESCAPED, BASE64)
MARK: Final = "tidings-"
"""How each text that is written in another way begins."""
LONG: Final = 1000
"""Characters of an escaped text from which on base64 is written if it is shorter."""

_CODECS: Final = {"UTF8": "utf-8", "SQL_ASCII": "utf-8", "LATIN1": "latin-1"}
"""Python's codecs by PostgreSQL's names of encodings. Any other encoding is only certain to contain ASCII."""
_CODEC: Final = "_tidings_codec"
_ESCAPE: Final = re.compile(r"\\(?:\\|u\{([0-9a-f]{1,6})\})")


def encoded(text: str, codec: str = "utf-8") -> str:
    """Return the text in a form that a database of this encoding can hold."""
    if not text.startswith(_MARKED) and _fits(text, codec):
        return text
    escaped = ESCAPED + "".join(
        "\\\\" if one == "\\" else one if _fits(one, codec) else f"\\u{{{ord(one):x}}}" for one in text
    )
    if len(escaped) < LONG:
        return escaped
    return min(escaped, BASE64 + b64encode(text.encode("utf-8", "surrogatepass")).decode("ascii"), key=len)


def decoded(text: str) -> str:
    """Undo `encoded`. A text of somebody else that only begins with a prefix is returned as it is."""
    if text.startswith(ESCAPED):
        body = text[len(ESCAPED) :]
        if "\\" not in _ESCAPE.sub("", body):
            with suppress(ValueError):
                return _ESCAPE.sub(_unescape, body)
    elif text.startswith(BASE64):
        with suppress(ValueError):
            return b64decode(text[len(BASE64) :], validate=True).decode("utf-8", "surrogatepass")
    return text


def _unescape(found: re.Match[str]) -> str:
    return "\\" if found[1] is None else chr(int(found[1], 16))


def _fits(text: str, codec: str) -> bool:
    if "\0" in text:
        return False
    try:
        return text.isascii() or bool(text.encode(codec))
    except UnicodeEncodeError:
        return False


class Text(sa.TypeDecorator[str]):
    """The type of Tidings' columns that hold text from elsewhere."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> Any:
        if not isinstance(value, str) or (value.isascii() and "\0" not in value and not value.startswith(_MARKED)):
            return value
        return encoded(value, getattr(dialect, _CODEC, "utf-8"))

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> str | None:
        return value if value is None or not value.startswith(_MARKED) else decoded(value)


def learn_encoding(dialect: sa.Dialect, connection: Any) -> None:
    """Ask a fresh DBAPI connection, once for each dialect object, for the server's encoding."""
    if dialect.name != "postgresql" or hasattr(dialect, _CODEC):
        return
    cursor = connection.cursor()
    try:
        cursor.execute("SHOW server_encoding")
        (name,) = cursor.fetchone()
    finally:
        cursor.close()
    connection.rollback()
    setattr(dialect, _CODEC, _CODECS.get(name, "ascii"))
