"""No secret survives in a text that people read, whatever it is made of and wherever it stands."""

from __future__ import annotations

import json
from base64 import b64encode
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from tidings._support.masking import MASK, masked, masked_text, redact
from tidings.delivery.failure import Failure

PRINTABLE = "".join(map(chr, range(33, 127)))


def unlike_other_words(text: str) -> str:
    """The same with a sign that no other word here has."""
    return f"{text[:3]}~{text[3:]}"


secrets = st.text(PRINTABLE, min_size=6, max_size=20).map(unlike_other_words)
schemes = st.sampled_from(
    [
        *("amqp", "amqps", "AMQP", "postgresql+asyncpg", "mysql+aiomysql"),
        *("esdb", "esdb+discover", "kurrentdb", "kurrentdb+discover", "kdb", "kdb+discover"),
    ]
)
urls = st.sampled_from(
    [
        "{scheme}://user:{secret}@host:5672/v",
        "{scheme}://:{secret}@host:5672/v",
        "{scheme}://a:b:{secret}@h1:1,h2:2/v?x=y",
        "{scheme}://host/db?user=x&password={secret}",
        "{scheme}://host/db?api_key={secret}",
        "{scheme}://host/db;PWD={secret}",
        "{scheme}://{secret}@host/",
    ]
)
places = st.sampled_from(
    ["error: {} failed", "'{}'", "x={};", "({})", "line\n{}\nline", "a@b {} c://d", '{{"url": "{}"}}', "{}"]
)


@given(secrets, schemes, urls, places)
@example("+Vi?bc+!:", "postgresql+asyncpg", "{scheme}://{secret}@host/", "{}")
@example("@/[O%Gb:", "amqps", "{scheme}://host/db?user=x&password={secret}", "{}")
@example("/)qV;8>.i", "AMQP", "{scheme}://host/db?user=x&password={secret}", "line\n{}\nline")
@example("pITCJIF6`:*", "AMQP", "{scheme}://{secret}@host/", "x={};")
@example("}EM3H&a=b", "amqp", "{scheme}://host/db?user=x&password={secret}", "({})")
def test_the_password_of_a_url_is_masked_wherever_it_stands(secret: str, scheme: str, url: str, place: str) -> None:
    assume(secret.strip("*"))
    whole = url.format(scheme=scheme, secret=secret)
    text = place.format(whole)
    assert secret not in redact(whole)
    assert secret not in masked_text(text)
    assert secret not in str(masked({"said": [text, (text,)]}))
    assert masked_text(masked_text(text)) == masked_text(text)


NAMES = ["password", "Passwd", "api_key", "X-Api-Key", "client_secret", "access_token", "Set-Cookie", "SessionId"]
NAMES += ["TIDINGS_BUS_KEYS", "TIDINGS_ID_KEYS", "TIDINGS_SERVER_USERS", "ssh_key"]


@given(
    st.sampled_from(NAMES),
    st.sampled_from(["=", ": ", ":", " = ", "': '", '":"', " => ", "=>", "' => '", " := ", " == ", " -> "]),
    secrets,
    places,
)
@example("token", "=", "'half' and half'", "{}")
def test_what_is_called_a_secret_is_masked(name: str, separator: str, secret: str, place: str) -> None:
    assume("*" not in secret)
    assert secret not in masked_text(place.format(f"{name}{separator}{secret}"))


@given(
    st.sampled_from(["passwords", "tokens", "API_KEYS", "client_secrets", "pass", "DB_PASS", "userPass"]),
    st.sampled_from(["=", " = ", "': ", '":']),
    st.lists(secrets.filter(lambda text: not {"*", "'", '"', "\\"} & set(text)), min_size=1, max_size=4),
    st.sampled_from(["[{}]", "({})", "{{'a': [{}]}}"]),
    places,
)
def test_every_one_of_several_secrets_is_masked(
    name: str, separator: str, several: list[str], form: str, place: str
) -> None:
    assume(not any(set("[](){}") & set(secret) for secret in several))
    said = place.format(f"{name}{separator}{form.format(', '.join(map(repr, several)))}") + " oklast"
    shown = masked_text(said)
    assert not any(secret in shown for secret in several)
    assert shown.endswith("oklast")
    assert masked_text(shown) == shown


@pytest.mark.parametrize(
    "said",
    [
        "tokens: ['a]', 'hunter2'] oklast",
        "passwords=['x)', 'hunter2'] oklast",
        "secrets={'a': 'p} q', 'b': 'hunter2'} oklast",
        r"tokens: ['it\'] ', 'hunter2'] oklast",
        r'"{\"tokens\": [\"a]\", \"hunter2\"]} oklast',
    ],
)
def test_brackets_within_a_secret_do_not_end_the_list_of_secrets(said: str) -> None:
    assert "hunter2" not in masked_text(said)
    assert masked_text(said).endswith(" oklast")


tokens = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-", min_size=24, max_size=60)


@given(tokens, places)
def test_a_token_is_masked_by_its_looks(token: str, place: str) -> None:
    for said in (
        f"Authorization: Bearer {token}",
        f"authorization: basic {b64encode(f'user:{token}'.encode()).decode()}",
        f"401 of bearer {token}",
        f"Authorization: ApiKey {token}",
        f"authorization => api-key {token}",
        f"sent apikey {token}7",
        f"sent Basic {b64encode(f'user:{token}'.encode()).decode()}",
        f"sk_live_{token.replace('-', '_')}",
        f"eyJ{token}.{token}.{token}",
    ):
        shown = masked_text(place.format(said))
        assert token not in shown
        assert b64encode(f"user:{token}".encode()).decode() not in shown


@pytest.mark.parametrize(
    "said",
    [
        "mail me@home about http://plain/x",
        "a basic understanding of tokens: none",
        "the user has no password",
        "stream 'order-1': expected version 3, found 4",
        "bearer of bad news",
        "the apikey setting is missing",
        "an ApiKey header was expected",
        "the bearer token is missing",
        "basic authentication: none",
        '{"author": "x", "authorised": true}',
        "max_tokens=4096, pass_rate=0.5",
        "tokens_used: 12, api_keys: 3.",
        "compass=north; bypass=1; trespass: none",
        "PASS: test_forged_rows",
        "first pass: done, second pass -> none",
    ],
)
def test_what_is_no_secret_is_shown(said: str) -> None:
    assert masked_text(said) == said


SECRET_NAMES = [
    *NAMES,
    "SECRET_KEY",
    "DJANGO_SECRET_KEY",
    "SECRET_KEY_BASE",
    "aws_secret_access_key",
    "token2",
    "AccessToken",
    "passwords",
    "CLIENT_SECRETS",
    "db_pass",
    "userPass",
]
HARMLESS_NAMES = ["order_id", "tokens_used", "user", "passwordless", "country", "signatures_count", "design"]
HARMLESS_NAMES += ["pass_rate", "compass", "bypass", "passes", "PassThrough"]
COUNTING_NAMES = ["tokens", "max_tokens", "api_keys", "signatures", "cookies"]
words = st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=6, max_size=12).map(lambda word: f"ok{word}")
texts = st.text(PRINTABLE + " ", min_size=6, max_size=20).filter(lambda text: "*" not in text).map(unlike_other_words)
numbers = st.integers(10**6, 10**12)


@given(
    st.sampled_from(SECRET_NAMES),
    texts | numbers,
    st.lists(
        st.tuples(st.sampled_from(HARMLESS_NAMES), words | numbers)
        | st.tuples(st.sampled_from(COUNTING_NAMES), st.integers(10**5, 10**9 - 1)),
        max_size=3,
        unique_by=lambda item: item[0],
    ),
    st.integers(0, 3),
    st.sampled_from(["compact", "spaced", "twice", "repr", "nested", "call"]),
)
@example("token", "a,b}c", [("order_id", "ok7654321")], 0, "compact")
@example("token", '"}', [("order_id", "ok7654321")], 0, "compact")
@example("password", "back\\", [("order_id", "ok7654321")], 0, "twice")
@example("password", 'a", b~c', [("order_id", "ok7654321")], 0, "compact")
@example("password", 100000000, [("order_id", 3750000000)], 0, "compact")
@example("password", 'a", b~c', [("order_id", "ok7654321")], 0, "twice")
def test_a_document_shows_all_but_its_secret(
    name: str, secret: str | int, others: list[tuple[str, str | int]], place: int, form: str
) -> None:
    entries: list[tuple[str, Any]] = [*others]
    entries.insert(place, (name, secret))
    document = dict(entries)
    assume(not any(str(secret) in f"{key}{value}" for key, value in others))
    said = {
        "compact": lambda: json.dumps(document, separators=(",", ":")),
        "spaced": lambda: f"answer: {json.dumps(document)} of 401",
        "twice": lambda: json.dumps({"body": json.dumps(document, separators=(",", ":")), "last": "oklast"}),
        "repr": lambda: f"refused {document!r}, tried again",
        "nested": lambda: json.dumps([{"a": {"b": document}}, {"c": "okc"}], separators=(",", ":")),
        "call": lambda: f"Client({', '.join(f'{key}={value!r}' for key, value in entries)})",
    }[form]()
    shown = masked_text(said)
    quoted = json.dumps(secret)
    for spelled in (str(secret), quoted.strip('"'), json.dumps(quoted).strip('"'), repr(str(secret))[1:-1]):
        if len(spelled) >= 6:
            assert spelled not in shown, said
    assert "~" not in shown, "a part of the secret is shown"
    for key, value in others:
        assert key in shown
        assert str(value) in shown, said
    assert masked_text(shown) == shown


@given(st.sampled_from(SECRET_NAMES), st.sampled_from(["=", ": ", " = "]), texts, words)
def test_an_assignment_of_a_quoted_secret_ends_with_its_quote(name: str, sign: str, secret: str, other: str) -> None:
    assume(not {"'", '"', "\\"} & set(secret))
    for value in (f"'{secret}'", f'"{secret}"', f"b'{secret}'", f"SecretStr('{secret}')"):
        shown = masked_text(f"{name}{sign}{value}, order={other}")
        assert secret not in shown
        assert other in shown


@given(
    st.sampled_from(["", "RSA ", "EC ", "OPENSSH ", "ENCRYPTED "]),
    st.integers(1, 200),
    st.sampled_from(["\n", "\\n", "\r\n"]),
    places,
)
def test_a_private_key_is_masked_however_long_it_is(kind: str, lines: int, end: str, place: str) -> None:
    body = [f"{'MIIEowIBAAKCAQEA' * 3}{line:016}" for line in range(lines)]
    key = end.join([f"-----BEGIN {kind}PRIVATE KEY-----", *body, f"-----END {kind}PRIVATE KEY-----"])
    for said in (f"{key}{end}after", f"private_key: {key}, after", key[: len(key) * 2 // 3], key[len(key) // 3 :]):
        shown = masked_text(place.format(said))
        assert not [line for line in body if line in shown]
        assert "MIIEow" not in shown or "BEGIN" not in said
        assert masked_text(shown) == shown
    assert masked_text(f"{key} after").endswith("after")
    public = key.replace("PRIVATE", "PUBLIC")
    assert masked_text(public) == public


errors = st.sampled_from(["Unexpected", "Invalid", "Expired", "Missing", "Bad", "Malformed"])
nouns = st.sampled_from(["Token", "Password", "Signature", "Credentials", "Cookie"])


@given(errors, nouns, words, words)
def test_what_an_error_is_called_is_no_name_of_a_secret(error: str, noun: str, word: str, other: str) -> None:
    for said in (f"{error}{noun}: {word} at line 3", f"tokens.{error}{noun}: {word}", f"{error}{noun}Error: {word}"):
        assert masked_text(said) == said
    assert masked_text(f"Unexpected token: {word} {other}") == f"Unexpected token: {word} {other}"
    assert word not in masked_text(f"Unexpected {noun.replace('Token', 'Secret')}: {word}")
    assert word not in masked_text(f"Access{noun}: {word}")


@given(
    st.sampled_from(
        [
            "/srv/app@{}/lib/x.py",
            "https://cdn.example/npm/pkg@{}/index.js",
            "http://localhost:80/a@{}",
            "file:///srv/app@{}/x.py",
            "git://host/repo.git/at@{}",
            "https://host/?mail=a@{}",
            "mail {}@home",
        ]
    ),
    words,
    places,
)
def test_a_path_with_an_at_sign_is_shown(path: str, word: str, place: str) -> None:
    assume("://d" not in place)
    said = place.format(path.format(word))
    assert masked_text(said) == said


@given(st.sampled_from(["http", "https", "ftp"]), secrets, places)
def test_the_password_of_a_web_address_is_masked(scheme: str, secret: str, place: str) -> None:
    assume(not {"/", "?", "#", "*", "@"} & set(secret))
    assert secret not in masked_text(place.format(f"{scheme}://user:{secret}@host/path"))
    assert secret not in masked_text(place.format(f"{scheme}://{secret}@host/path"))
    assert secret not in masked_text(place.format(f"{scheme}://host/blob?sv=2020&sig={secret}"))


scalars = st.integers(10**5, 10**9) | st.floats(1.5, 1e6) | st.binary(min_size=4) | st.text(min_size=1)


@given(
    st.sampled_from(SECRET_NAMES),
    st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3)),
)
def test_whatever_lies_under_the_name_of_a_secret_is_masked(name: str, value: Any) -> None:
    def leaves(shown: Any) -> list[Any]:
        if isinstance(shown, dict):
            return [leaf for inner in shown.values() for leaf in leaves(inner)]
        if isinstance(shown, list):
            return [leaf for inner in shown for leaf in leaves(inner)]
        return [shown]

    shown = masked({name: value, "order_id": "ok7"})
    assert set(map(str, leaves(shown[name]))) <= {MASK}
    assert shown["order_id"] == "ok7"
    assert set(map(str, leaves(masked([(name, value)])[0][1:]))) <= {MASK}
    assert set(map(str, leaves(masked([(name.encode(), value)])[0][1:]))) <= {MASK}


def test_yes_no_and_nothing_are_no_secrets() -> None:
    entry = {"password": True, "token": None, "secret": ""}
    assert masked(entry) == entry
    said = '{"password":true,"token":null,"order_id":7}'
    assert masked_text(said) == said


def test_an_entry_whose_key_is_the_name_of_a_secret_is_masked() -> None:
    entry = {"db_password": "hush", "token": "", "tokens": 3, "nested": {"Authorization": "hush"}, "compass": "north"}
    shown = entry | {"db_password": MASK, "nested": {"Authorization": MASK}}
    assert masked(entry) == shown


@given(
    st.recursive(
        st.none() | st.booleans() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_masking_keeps_the_shape_of_a_value(value: Any) -> None:
    shown = masked(value)
    json.dumps(shown)
    assert type(shown) is type(value)


@pytest.mark.parametrize(
    "piece",
    [
        "a://@",
        "password=",
        "'token':'",
        "bearer ",
        "basic YTpi",
        "eyJaaaaaaaa.",
        '="',
        "x@",
        '"token":"a",',
        "cookie: a=b; ",
        "token=\\",
        "-----BEGIN PRIVATE KEY-----",
        "-----END PRIVATE KEY-----",
        "InvalidToken: ",
        "http://h/@",
        "tokens=['",
        "tokens=['a'] ",
        "tokens=['[",
        "pass='",
    ],
)
def test_a_megabyte_made_to_take_long_is_masked(piece: str) -> None:
    """Searches that look at a character again and again take minutes, and pytest's timeout ends them."""
    masked_text(piece * (1_000_000 // len(piece)))


def test_a_failure_keeps_no_secret_of_its_exception() -> None:
    def fail() -> None:
        raise RuntimeError(
            "401 for https://api.example/charge?api_key=sk_live_SECRET1 with Authorization: Bearer SECRET2; "
            "amqp://u:SECRET3@h/v " + "x" * 1950 + " amqp://u:SECRET4@host"
        )

    handler = cast("Any", SimpleNamespace(retry=SimpleNamespace(permanent=())))
    with pytest.raises(RuntimeError) as caught:
        fail()
    failure = Failure.of(caught.value, handler)
    assert "401 for https://api.example/charge" in failure.reason
    assert "SECRET" not in failure.reason
    # The traceback quotes this test's own source, where the words stand in pieces of code.
    assert "SECRET3" not in failure.detail.rpartition("RuntimeError:")[2]
    assert "SECRET" not in Failure("password=SECRET", "token: SECRET", permanent=True).reason
