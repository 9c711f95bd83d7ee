"""`tidings why` as people and scripts read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.unit.command_line import OrderCreated, Poisoned, invoke, run_shop

SHOP = "tests.unit.command_line:shop"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STORE", "BUS", "DATABASE", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.setenv("TIDINGS_SERVICES", SHOP)
    monkeypatch.chdir(tmp_path)
    run_shop(tmp_path, ("order-1", OrderCreated(order_id="1")), ("bad@1", Poisoned()))
    return tmp_path


def facts(*arguments: str) -> dict[str, Any]:
    ended = invoke("why", *arguments, "--json")
    assert ended.code == 0, ended.err
    found: dict[str, Any] = json.loads(ended.out)
    return found


def append(*arguments: str) -> str:
    return str(json.loads(invoke("streams", "append", *arguments, "--json").out)["id"])


def test_a_settled_event_tells_when_how_and_where() -> None:
    found = facts("order-1@0")
    event = found["event"]
    assert facts(event["event_id"]) == facts(str(event["position"])) == found
    assert found["published"] is True
    assert [(one["service"], one["state"]) for one in event["services"]] == [("shop", "settled")]
    first, *rest = invoke("why", "order-1@0").out.splitlines()
    assert first == f"OrderCreated {event['event_id']} at order-1@0, position {event['position']}"
    assert [line.split()[0] for line in rest] == ["recorded", "correlation", "caused", "published", "shop", "caused"]
    assert rest[2].endswith("no event: it was appended from outside")
    assert f"yes: the checkpoint of relay main is {found['relay']['checkpoint']}" in rest[3]
    assert rest[5].split() == ["caused", "nothing"]


def test_a_dead_event_tells_why_and_nothing_of_it_moves_a_cursor() -> None:
    ended = invoke("why", "bad@1@0")
    assert ended.code == 0
    (line,) = [line for line in ended.out.splitlines() if line.startswith("  shop")]
    assert "dead since " in line
    assert r"1 attempt of die: ValueError: it is \x1b[31mpoison (tidings dead show 1)" in line
    assert "\x1b" not in ended.out


def test_foreign_names_are_shown_with_their_control_characters_escaped() -> None:
    cause = append("evil\x1b[2J", "Ty\u202epe")
    append("evil-2", "Caused", "{}", "--metadata", json.dumps({"$causationId": cause, "tidingsHandler": "a.\x1b[5m"}))
    ended = invoke("why", cause)
    assert r"Ty\u202epe" in ended.out
    assert r"evil\x1b[2J@0" in ended.out
    assert r"by a.\x1b[5m" in ended.out
    assert all(line.isprintable() for line in ended.out.split("\n"))


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({"actor": "dr. bob"}, "dr. bob"),
        ({"actor": "carol", "principal": "shop"}, "carol, as shop says"),
        ({"actor": "shop", "principal": "shop"}, "shop"),
        ({"principal": "shop\x1b[2J"}, r"shop\x1b[2J"),
        ({"actor": 7}, None),
    ],
)
def test_who_wanted_it_is_told_as_its_producer_said(said: dict[str, object], line: str | None) -> None:
    event = append("who", "Root", "{}", "--metadata", json.dumps(said))
    told = [each.removeprefix("  actor").strip() for each in invoke("why", event).out.splitlines() if "actor" in each]
    assert told == ([] if line is None else [line])
    assert facts(event)["event"]["principal"] == said.get("principal")


def test_what_it_caused_is_indented_below_it() -> None:
    root = append("a-1", "Root")
    child = append("b-1", "Child", "{}", "--metadata", json.dumps({"$causationId": root}))
    grandchild = append("c-1", "OrderCreated", '{"order_id": "1"}', "--metadata", json.dumps({"$causationId": child}))
    lines = invoke("why", root).out.splitlines()
    at = next(at for at, line in enumerate(lines) if "2 events" in line)
    assert lines[at + 1].startswith(f"    -> Child {child} at b-1@0, position ")
    assert lines[at + 2].startswith(f"      -> OrderCreated {grandchild} at c-1@0")
    assert lines[at + 2].endswith("; shop pending")
    found = facts(root)
    assert [(one["depth"], one["causation_id"]) for one in found["caused"]] == [(1, root), (2, child)]
    assert found["published"] is False
    assert "not known: the checkpoint of relay main is" in invoke("why", root).out
    assert [cause["event_id"] for cause in facts(grandchild)["causes"]] == [root, child]


def test_what_is_not_there_is_1_and_says_what_was_searched() -> None:
    missing = uuid4()
    ended = invoke("why", str(missing))
    assert (ended.code, ended.out) == (1, "")
    assert f"no event has the id {missing}. Searched: held, dead and staged rows of shop, and all " in ended.err
    assert invoke("why", "999").code == 1
    assert invoke("why", "order-1@5").code == 1
    assert invoke("why", "nowhere@0").code == 1


@pytest.mark.parametrize("text", ["order-1", "@1", "order-1@x", "not-an-id", "-"])
def test_what_names_no_event_is_2(text: str) -> None:
    ended = invoke("why", text)
    assert (ended.code, ended.out) == (2, "")
    assert "STREAM@VERSION" in ended.err


def test_without_services_the_log_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIDINGS_SERVICES")
    assert facts("order-1@0")["event"]["services"] == []
    assert "Searched: all " in invoke("why", str(UUID(int=5))).err
