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
secrets = st.text(PRINTABLE, min_size=6, max_size=20)
schemes = st.sampled_from(["amqp", "amqps", "esdb", "esdb+discover", "postgresql+asyncpg", "mysql+aiomysql", "AMQP"])
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


@given(st.sampled_from(NAMES), st.sampled_from(["=", ": ", ":", " = ", "': '", '":"']), secrets, places)
@example("token", "=", "'half' and half'", "{}")
def test_what_is_called_a_secret_is_masked(name: str, separator: str, secret: str, place: str) -> None:
    assume("*" not in secret)
    assert secret not in masked_text(place.format(f"{name}{separator}{secret}"))


tokens = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-", min_size=24, max_size=60)


@given(tokens, places)
def test_a_token_is_masked_by_its_looks(token: str, place: str) -> None:
    for said in (
        f"Authorization: Bearer {token}",
        f"authorization: basic {b64encode(f'user:{token}'.encode()).decode()}",
        f"401 of bearer {token}",
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
        '{"author": "x", "authorised": true}',
    ],
)
def test_what_is_no_secret_is_shown(said: str) -> None:
    assert masked_text(said) == said


def test_an_entry_whose_key_is_the_name_of_a_secret_is_masked() -> None:
    entry = {"db_password": "hush", "token": "", "tokens": "three", "nested": {"Authorization": "hush"}}
    shown = {"db_password": MASK, "token": "", "tokens": "three", "nested": {"Authorization": MASK}}
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
    "piece", ["a://@", "password=", "'token':'", "bearer ", "basic YTpi", "eyJaaaaaaaa.", '="', "x@"]
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
