"""Secrets in texts that people read, masked: passwords of URLs, tokens, values of what is called a secret.

Logs, `/ready`, held events and dead letters show texts that nobody here has written, such as an exception's message.
Every search below looks at each character a bounded number of times: the text may be a stranger's megabyte.
"""

from __future__ import annotations

import binascii
import re
from base64 import b64decode
from typing import Any, Final

__all__ = ["masked", "masked_text", "redact"]

MASK: Final = "***"
QUOTED: Final = 500
"""Characters of a quoted secret in which spaces may stand."""

_NAME: Final = (
    r"(?:pass(?:word|wd|phrase|code)|pwd|secret|token|api[_-]?key|(?:access|private|account|shared|signing)[_-]?key"
    r"|authorization|credentials?|signature|cookie|session[_-]?id)"
)
_NAMED: Final = re.compile(rf"{_NAME}[\"']{{0,2}}\s{{0,4}}[=:]\s{{0,4}}", re.IGNORECASE)
"""The name of a secret, or the end of one, and what separates it from its value."""
_IN_QUERY: Final = re.compile(rf"(?:{_NAME}|\bpass)=", re.IGNORECASE)
_IS_NAME: Final = re.compile(rf"[\w.-]*{_NAME}", re.IGNORECASE)
_KIND: Final = re.compile(r"(?:bearer|basic|digest|negotiate|token)\s{1,4}", re.IGNORECASE)
_BEARER: Final = re.compile(r"\bbearer\s{1,4}(?=\S{4})", re.IGNORECASE)
_BASIC: Final = re.compile(r"\bbasic\s{1,4}([A-Za-z0-9+/]{4,2000}={0,2})", re.IGNORECASE)
_TOKEN: Final = re.compile(
    r"\b(?:[spr]k_(?:live|test)_\w{4,200}|gh[pousr]_\w{20,200}|github_pat_\w{20,200}|xox[abeprs]-[\w-]{8,200}"
    r"|AKIA[0-9A-Z]{16}|eyJ[\w-]{8,4000}\.[\w-]{4,8000}(?:\.[\w-]{0,2000})?)"
)
"""Tokens that are known by their looks."""
_SPACE: Final = re.compile(r"(\s+)")
_WORD_END: Final = re.compile(r"\s|\Z")
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}\Z")
_WHOLE_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")


def masked(value: Any) -> Any:
    """Return the value with all secrets in it masked: in texts, lists and dictionaries. Anything else that is not a
    number becomes its `repr`."""
    if isinstance(value, str):
        return masked_text(value)
    if isinstance(value, dict):
        return {
            key: MASK if isinstance(inner, str) and inner and _is_name(key) else masked(inner)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [masked(inner) for inner in value]
    if value is None or isinstance(value, int | float):
        return value
    return masked_text(repr(value))


def _is_name(key: object) -> bool:
    return isinstance(key, str) and len(key) < 100 and _IS_NAME.fullmatch(key) is not None


def masked_text(text: str) -> str:
    """Return the text with all secrets in it masked. Masking it again changes nothing."""
    if "://" in text and "@" in text:
        text = "".join(map(_without_password, _SPACE.split(text)))
    text = _without_named(text)
    text = _without(_BEARER, text)
    text = _BASIC.sub(_without_credentials, text)
    return _TOKEN.sub(MASK, text)


def redact(url: str) -> str:
    """A URL that may be shown: without password and query, also where the password was not escaped as it should be.

    What stands before the last '@' is taken for user and password, whatever characters are in it.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or not _WHOLE_SCHEME.fullmatch(scheme):
        # No URL: it may be a user, a password and a host just as well, so it is shown only without any of their signs.
        return "<not a URL>" if re.search(r"[@=:\s]", url) else url
    shown, place = "", rest
    if "@" in rest and not (rest.startswith("/") and scheme.lower().startswith(("sqlite", "memory"))):
        secret, _, place = rest.rpartition("@")
        user, _, password = secret.partition(":")
        # A password that the mask would spell is shown with its user, so both are masked.
        shown = f"{user}:{MASK}@" if user and password not in ("", "*", "**") else f"{MASK}@"
        if _IN_QUERY.search(secret):  # the '@' is part of a secret in the query
            return f"{scheme}://{MASK}"
    return f"{scheme}://{shown}{re.split(r'[?#;&=]', place)[0]}"


def _without_password(word: str) -> str:
    """Mask the password of a URL, with one search for each sign."""
    colon = word.find("://", 0, max(word.rfind("@"), 0))
    if colon < 0:
        return word
    scheme = _SCHEME.search(word[max(colon - 31, 0) : colon])
    if scheme is None:  # not a valid scheme, but a password may follow
        return word[:colon] + redact(f"x{word[colon:]}")[1:]
    begins = colon - len(scheme[0])
    return word[:begins] + redact(word[begins:])


def _without_named(text: str) -> str:
    """Mask what follows the name of a secret: the rest of the word, and of the quotation that begins with it."""
    parts: list[str] = []
    at = 0
    while (found := _NAMED.search(text, at)) is not None:
        begins = found.end()
        if kind := _KIND.match(text, begins):
            begins = kind.end()
        ends = _end_of_word(text, begins)
        quote = text[begins : begins + 1]
        if quote in ("'", '"'):
            ends = max(ends, text.find(quote, begins + 1, begins + QUOTED) + 1)
        parts.append(text[at:begins])
        if ends > begins:
            parts.append(MASK)
        at = ends
    return "".join(parts) + text[at:]


def _without(pattern: re.Pattern[str], text: str) -> str:
    parts: list[str] = []
    at = 0
    while (found := pattern.search(text, at)) is not None:
        parts += (text[at : found.end()], MASK)
        at = _end_of_word(text, found.end())
    return "".join(parts) + text[at:]


def _end_of_word(text: str, at: int) -> int:
    found = _WORD_END.search(text, at)
    return found.start() if found else len(text)


def _without_credentials(found: re.Match[str]) -> str:
    try:
        credentials = b64decode(found[1] + "=" * (-len(found[1]) % 4))
    except binascii.Error:
        return found[0]
    return found[0].replace(found[1], MASK) if b":" in credentials else found[0]
