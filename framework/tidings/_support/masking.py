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
LISTED: Final = 4000
"""Characters of a list of secrets."""
MANY: Final = 10**9
"""A number behind the plural of a name is a secret from here on."""

_NAME: Final = (
    r"(?:pass(?:word|wd|phrase|code)|pwd|secret|token|api[_-]?key"
    r"|(?:access|private|account|shared|signing|secret|encryption|master|storage|license|client|ssh)[_-]?key"
    r"|tidings_(?:bus_keys|id_keys|server_users)"
    r"|authorization|credentials?|signature|cookie|session[_-]?id|(?<![a-z])sig)(?:[_-]base)?\d{0,3}(?P<many>s)?"
)
_PASS: Final = r"(?:(?<=_)pass|(?-i:(?<=[a-z])Pass))"
"""`db_pass` and `userPass`, but neither `compass` nor `pass_rate`."""
_QUOTE: Final = r"\\{0,3}[\"']"
"""A quote, which is escaped where the text is quoted itself."""
_IS: Final = r"\s{0,4}(?:[=-]>|:=|={1,3}|:)"
_NAMED: Final = re.compile(
    rf"(?:(?:{_NAME}|{_PASS})(?:{_QUOTE}){{0,2}}{_IS}"
    rf"|(?<![a-z])pass(?:(?:{_QUOTE}){{1,2}}{_IS}|\s{{0,4}}(?::=|={{1,3}})))\s{{0,4}}",
    re.IGNORECASE,
)
"""The name of a secret, or the end of one, and what separates it from its value. `pass` alone is also a word."""
_COUNT: Final = re.compile(r"-?\d{1,9}(?:\.\d{1,9})?(?=[,;.:)\]}]{0,8}(?:[\s{\[\"'\\&]|\Z))")
"""A number behind the plural of a name, which counts secrets and is none."""
_LISTED: Final = re.compile(rf"[\[({{]\s{{0,4}}[bBrRuU]{{0,2}}{_QUOTE}")
_BRACKET: Final = re.compile(r"[\[({]|[\])}](?P<ends>(?=[\])}]{0,8}(?:[\s,;.:\"'\\]|\Z)))?")
"""How a list of quoted secrets begins; its brackets, and which of them may end it."""
_ITEM: Final = re.compile(rf"(?<=[\[({{,:\sbBrRuU])({_QUOTE})")
"""The quote that opens a secret of a list, which may have brackets in it."""
_HARMLESS: Final = re.compile(
    r"(?:\b(?:Unexpected|Invalid|Expired|Missing|Bad|Unknown|Malformed|Wrong|Revoked|No|Incorrect|Unsupported|Illegal"
    r"|Empty|Weak|Duplicate|Unrecognized|Unterminated|Stale|Undefined))\Z"
)
"""What makes the name of an error of what follows it."""
_PARSED: Final = re.compile(r"unexpected token\s{0,4}:", re.IGNORECASE)
"""What a parser says of what it found."""
_IN_QUERY: Final = re.compile(rf"(?:{_NAME}|{_PASS}|(?<![a-z])pass)=", re.IGNORECASE)
_IS_NAME: Final = re.compile(rf"([\w.-]*)(?:{_NAME}|{_PASS}|(?<![a-z])pass)", re.IGNORECASE)
_KIND: Final = re.compile(
    r"(?:bearer|basic|digest|negotiate|ntlm|token|jwt|oauth|hmac|api[_-]?(?:key|token)|sso-key)\s{1,4}", re.IGNORECASE
)
_OPENS: Final = re.compile(rf"(?:\w{{1,30}}\()?[bBrRuU]{{0,2}}({_QUOTE})")
"""What opens a quoted value, maybe within a call as in `SecretStr('...')`."""
_NEXT: Final = rf"(?:{_QUOTE}[^\"'\\\s]{{1,100}}{_QUOTE}\s{{0,4}}:|[\w.-]{{1,50}}=)"
"""The name of the next value, with what separates it from that."""
_ENDS: Final = re.compile(rf"\s|\Z|[}}\])]{{1,8}}(?:[\s,;.:\"'\\]|\Z)|[,;](?:\s|\Z|{_NEXT})")
"""What follows the quote that ends a value, rather than one inside it."""
_MASK_ENDS: Final = re.compile(r"[.:,;)\]}\"'\\]{0,8}(?:\s|\Z)")
"""What may follow a value that was masked before, beside what ends any value."""
_BARE_ENDS: Final = re.compile(r"\s{0,4}[,}\]]")
_BARE: Final = re.compile(rf"[\w.+-]{{1,400}}(?={_BARE_ENDS.pattern})")
"""A number, or a word, of JSON."""
_NOTHING: Final = ("null", "true", "false", "None", "True", "False")
_NONE: Final = re.compile(r"(?:none|null|no)\b", re.IGNORECASE)
_COOKIE: Final = re.compile(r"\s{1,4}[\w.-]{1,100}=\S{0,4000}")
_BEARER: Final = re.compile(
    r"\b(bearer\s{1,4})(?!(?:tokens?|auth\w*|schemes?|headers?|formats?)\b)[^\s\"'\\]{4,8000}", re.IGNORECASE
)
_API_KEY: Final = re.compile(r"\b(api[_-]?key\s{1,4})(?=\S{0,8000}?\d)[^\s\"'\\]{8,8000}", re.IGNORECASE)
_BASIC: Final = re.compile(r"\bbasic\s{1,4}([A-Za-z0-9+/]{4,2000}={0,2})", re.IGNORECASE)
_TOKEN: Final = re.compile(
    r"\b(?:[spr]k_(?:live|test)_\w{4,200}|sk-[\w-]{20,200}|gh[pousr]_\w{20,200}|github_pat_\w{20,200}"
    r"|glpat-[\w-]{20,200}|xox[abeprs]-[\w-]{8,200}|A[KS]IA[0-9A-Z]{16}|AIza[\w-]{35}|hvs\.[\w-]{20,200}"
    r"|npm_\w{36}|SG\.[\w-]{16,100}\.[\w-]{16,100}|eyJ[\w-]{8,4000}\.[\w-]{4,8000}(?:\.[\w-]{0,2000})?)"
)
"""Tokens that are known by their looks."""
_KEY_BEGINS: Final = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_KEY_ENDS: Final = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
_KEY_SIGNS: Final = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=\\ \r\n\t")
_WEB: Final = re.compile(r"(?:https?|wss?|file|git|ftp)\Z", re.IGNORECASE)
"""Schemes whose paths often hold an '@', and whose clients take no password with a '/'."""
_HOST: Final = re.compile(r"(?:[\w.-]{0,255}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{0,5})?\Z")
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
        return {key: _under(key, inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        if len(value) == 2 and _name_in(value[0]):  # as in a list of headers
            return [masked(value[0]), _under(value[0], value[1])]
        return [masked(inner) for inner in value]
    if value is None or isinstance(value, int | float):
        return value
    return masked_text(repr(value))


def _under(key: object, value: Any) -> Any:
    """Mask the value that stands under a key."""
    name = _name_in(key)
    if name is None:
        return masked(value)
    return value if _counts(name) and isinstance(value, int | float) and abs(value) < MANY else _hidden(value)


def _counts(name: re.Match[str]) -> bool:
    """Whether a number under this name may count secrets, as in `tokens: 12`."""
    return bool(name["many"]) and not re.search("pass|pwd|secret", name[0], re.IGNORECASE)


def _hidden(value: Any) -> Any:
    """Mask all that a secret may be: everything but yes, no and nothing."""
    if value is None or isinstance(value, bool) or value in ("", b""):
        return masked(value)
    if isinstance(value, dict):
        return {key: _hidden(inner) for key, inner in value.items()}
    return [_hidden(inner) for inner in value] if isinstance(value, list | tuple) else MASK


def _name_in(key: object) -> re.Match[str] | None:
    """Return the match of a key that is the name of a secret."""
    if isinstance(key, bytes):
        key = key.decode("latin-1")
    if not isinstance(key, str) or len(key) >= 100:
        return None
    found = _IS_NAME.fullmatch(key)
    return None if found is None or _HARMLESS.search(found[1]) else found


def masked_text(text: str) -> str:
    """Return the text with all secrets in it masked. Masking it again changes nothing."""
    if "PRIVATE KEY" in text:
        text = _without_keys(text)
    if "://" in text and "@" in text:
        text = "".join(map(_without_password, _SPACE.split(text)))
    text = _without_named(text)
    text = _BEARER.sub(rf"\1{MASK}", text)
    text = _API_KEY.sub(rf"\1{MASK}", text)
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
    if _WEB.match(scheme[0]):
        authority = re.split(r"[/?#]", word[colon + 3 :], maxsplit=1)[0]
        if "@" not in authority and _HOST.match(authority):
            return word  # the '@' is part of a path
    return word[:begins] + redact(word[begins:])


def _without_keys(text: str) -> str:
    """Mask private keys in PEM, also where their beginning or their end was cut off."""
    parts: list[str] = []
    at = 0
    while (found := _KEY_BEGINS.search(text, at)) is not None:
        ends = _KEY_ENDS.search(text, found.end())
        parts += (text[at : found.end()], MASK)
        at = len(text) if ends is None else ends.start()
        if ends is not None:
            parts.append(text[at : ends.end()])
            at = ends.end()
    if not parts and (ends := _KEY_ENDS.search(text)) is not None:
        begins = ends.start()
        while begins and text[begins - 1] in _KEY_SIGNS:
            begins -= 1
        if text[begins : ends.start()].strip():
            parts += (text[:begins], MASK)
            at = ends.start()
    return "".join(parts) + text[at:]


def _without_named(text: str) -> str:
    """Mask what follows the name of a secret: the quotation that begins there, or the rest of the word."""
    parts: list[str] = []
    at = word = 0
    while (found := _NAMED.search(text, at)) is not None:
        begins = found.end()
        before = max(found.start() - 20, 0)
        if ":" in found[0] and (
            _HARMLESS.search(text, before, found.start()) or _PARSED.search(text, before, found.end())
        ):
            parts.append(text[at:begins])
            at = begins
            continue
        if found["many"] and ((_counts(found) and _COUNT.match(text, begins)) or _NONE.match(text, begins)):
            parts.append(text[at:begins])
            at = begins
            continue
        if kind := _KIND.match(text, begins):
            begins = kind.end()
        if word <= begins:  # looked for once in each word, however many names are in it
            word = _end_of_word(text, begins)
        ends = _end_of_value(text, found, begins, word)
        parts.append(text[at:begins])
        if ends > begins:
            parts.append(MASK)
        at = ends
    return "".join(parts) + text[at:]


def _end_of_value(text: str, name: re.Match[str], begins: int, word: int) -> int:
    """Where the value ends, whose word ends at `word`; `begins` for one that is no secret."""
    quoted = name[0].rstrip(" =:>-")[-1:] in ("'", '"')
    if text.startswith(MASK, begins):
        after = begins + len(MASK)
        if _ENDS.match(text, after) or _MASK_ENDS.match(text, after) or (quoted and _BARE_ENDS.match(text, after)):
            return after  # it was masked before
    if _LISTED.match(text, begins):
        return _end_of_list(text, begins)
    opens = _OPENS.match(text, begins)
    if opens is not None:
        quote, most = opens[1][-1], max(word, begins + QUOTED)
        at = first = opens.end()
        while (at := text.find(quote, at, most)) >= 0:
            if _closes(text, at, first, len(opens[1]) - 1) and _ENDS.match(text, at + 1):
                return at + 1
            at += 1
        return word
    bare = _BARE.match(text, begins, word) if quoted else None
    if bare is not None:
        return begins if bare[0] in _NOTHING else bare.end()
    ends = word
    if "cookie" in name[0].lower():
        while text[ends - 1 : ends] == ";" and (more := _COOKIE.match(text, ends)):
            ends = more.end()
    return ends - 1 if ends - begins > 1 and text[ends - 1] == "," else ends


def _end_of_list(text: str, begins: int) -> int:
    depth, at, most = 0, begins, min(begins + LISTED, len(text))
    item = _ITEM.search(text, at, most)
    while (bracket := _BRACKET.search(text, at, most)) is not None:
        if item is not None and item.start() < at:
            item = _ITEM.search(text, at, most)
        if item is not None and item.start() < bracket.start():
            escaped = "" if len(item[1]) > 1 else r"(?<!\\)"
            closes = re.compile(rf"{escaped}{re.escape(item[1])}(?=\s{{0,4}}(?:[,:\])}}]|\Z))").search(
                text, item.end(), most
            )
            if closes is None:
                return most
            at = closes.end()
            continue
        depth += 1 if bracket[0] in "[({" else -1
        if depth <= 0 and bracket["ends"] is not None:
            return bracket.end()
        at = bracket.end()
    return most


def _closes(text: str, at: int, first: int, level: int) -> bool:
    """Whether a quote closes one that has `level` backslashes before it, by the backslashes before this one.

    Each time that a text is quoted, a backslash becomes two, and a quote gets one.
    """
    begins = at
    while begins > first and text[begins - 1] == "\\":
        begins -= 1
    escapes, rest = divmod(at - begins - level, level + 1)
    return escapes >= 0 and not rest and escapes % 2 == 0


def _end_of_word(text: str, at: int) -> int:
    found = _WORD_END.search(text, at)
    return found.start() if found else len(text)


def _without_credentials(found: re.Match[str]) -> str:
    try:
        credentials = b64decode(found[1] + "=" * (-len(found[1]) % 4))
    except binascii.Error:
        return found[0]
    return found[0].replace(found[1], MASK) if b":" in credentials else found[0]
