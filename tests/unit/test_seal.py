"""The seal: what was sealed is known again, whatever is changed of it is not, and keys can change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.unit.command_line import invoke
from tests.unit.test_message import LOG, events, recorded, sent
from tidings.buses.rabbitmq.content import pack, unpack
from tidings.buses.rabbitmq.messages import message_of, properties_of
from tidings.errors import ConfigurationError
from tidings.protocol.message import MARKER, Marker, Message
from tidings.protocol.seal import HEADER, Seal, new_key, read_keys
from tidings.settings import Settings

OLD, NEW = (Seal(read_keys(key)) for key in ("aa" * 16, "bb" * 32))
BOTH = Seal(read_keys(f"{'bb' * 32}, {'aa' * 16}"))


def holds(seal: Seal, message: Message) -> bool:
    return seal.holds(message.type, message.content_type, message.headers, message.body)


def carried_by_amqp(message: Message) -> Message:
    return message_of(unpack(pack(properties_of(message), len(message.body))), message.body)


def resealed(message: Message, **changes: Any) -> Message:
    """The message with other headers, and the seal that it had."""
    return replace(message, headers={**message.headers, **changes})


@given(events, st.data())
def test_a_sealed_event_is_known_again_and_no_changed_one_is(event: Any, data: Any) -> None:
    message = sent(event, seal=OLD)
    assert holds(OLD, message)
    assert holds(OLD, carried_by_amqp(message))
    assert not holds(NEW, message)
    assert not holds(OLD, replace(message, body=message.body + b"x"))
    assert not holds(OLD, replace(message, type=message.type + "x"))
    assert not holds(OLD, replace(message, content_type="text/plain"))
    assert not holds(OLD, Message(message.body, message.message_id, message.type, {}, message.content_type))
    header = data.draw(
        st.sampled_from([name for name in message.headers if name.startswith(("tidings-", "cloudEvents_"))])
    )
    if header in ("cloudEvents_source", "cloudEvents_specversion"):  # no service reads them
        return
    was = message.headers[header]
    other = was + 1 if isinstance(was, int) else was + b"x" if isinstance(was, bytes) else f"{was}x"
    assert not holds(OLD, resealed(message, **{header: other}))


@pytest.mark.parametrize("kind", ["e" * 255, "e" * 256, "é" * 200])
def test_a_type_that_amqp_leaves_out_breaks_no_seal(kind: str) -> None:
    message = sent(recorded(type=kind), seal=OLD)
    carried = carried_by_amqp(message)
    assert carried.type == ("" if len(kind.encode()) > 255 else kind)
    assert holds(OLD, carried)
    assert not holds(OLD, resealed(carried, cloudEvents_type=kind[1:]))


@given(st.text(max_size=8), st.text(max_size=8), st.text(max_size=8), st.text(max_size=8))
def test_what_is_moved_from_one_name_to_another_breaks_the_seal(a: str, b: str, c: str, d: str) -> None:
    def seal(stream: str, kind: str) -> str:
        return OLD.of("Placed", "application/json", {"cloudEvents_subject": stream, "cloudEvents_type": kind}, b"")

    assert (seal(a, b) == seal(c, d)) == ((a, b) == (c, d))


def test_a_marker_is_sealed_too() -> None:
    message = Marker(LOG, 7, 3, {0: 5}).encode(OLD)
    assert message.type == MARKER
    assert Marker.decode(message) == Marker(LOG, 7, 3, {0: 5})
    assert holds(OLD, message)
    assert not holds(OLD, replace(message, body=message.body.replace(b"7", b"8")))
    assert not holds(OLD, Marker(LOG, 7, 3, {0: 5}).encode())


@pytest.mark.parametrize("seal", [None, 5, b"ab", "é" * 32, "", "0" * 32])
def test_a_seal_that_is_none_holds_nothing(seal: Any) -> None:
    message = Marker(LOG, 7, 3, {}).encode(OLD)
    assert not holds(OLD, resealed(message, **{HEADER: seal}))


def test_two_keys_are_accepted_while_they_change_and_the_first_seals() -> None:
    marker = Marker(LOG, 7, 3, {})
    assert holds(BOTH, marker.encode(OLD))
    assert holds(BOTH, marker.encode(NEW))
    assert marker.encode(BOTH) == marker.encode(NEW)


@pytest.mark.parametrize(
    "keys", ["", "secret", "ab" * 15, "ab" * 65, "abc" * 11, f"{'ab' * 16},", ",".join(["ab" * 16] * 3)]
)
def test_keys_that_are_none_are_refused_and_not_shown(keys: str) -> None:
    with pytest.raises(ConfigurationError, match="TIDINGS_BUS_KEYS") as refused:
        Settings(bus_keys=SecretStr(keys))
    assert "ab" * 15 not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_settings_hold_keys_and_show_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TIDINGS_BUS_KEYS", "ab" * 16)
    settings = Settings()
    assert settings.seal is not None
    assert "abab" not in f"{settings!r} {settings}"
    monkeypatch.delenv("TIDINGS_BUS_KEYS")
    assert Settings().seal is None
    (tmp_path / "keys").write_text(f"{'cd' * 16},{'ab' * 16}\n")
    monkeypatch.setenv("TIDINGS_BUS_KEYS__FILE", str(tmp_path / "keys"))
    assert holds(Settings().seal or NEW, Marker(LOG, 7, 3, {}).encode(settings.seal))


def test_a_new_key_is_one() -> None:
    ended = invoke("keys", "new")
    assert ended.code == 0
    assert len(read_keys(ended.out.strip())[0]) == 32
    assert new_key() != new_key()
