"""`tidings capture`: the file that it writes fails as the event failed, and passes if it did not fail."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from tests.integration.databases import database_url
from tests.unit.captured import Asked, Kind, Line, Opened, Paid, Told, bank, branch, office
from tests.unit.command_line import invoke, pytest_in
from tidings import Event, Runtime, Service, Settings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(300)  # seconds: pytest in a process of its own, beside other tests

OWNER = "jane.doe@example.org"
EVIL = "a \"\"\" \\ \x1b[31m\n''' {x} \u202e $y"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, and settings for three services."""
    for name in ("STORE", "BUS", "DATABASE", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.setenv("TIDINGS_SERVICES", "tests.unit.captured:bank")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def happen(folder: Path, *events: tuple[str, Event], services: tuple[Service, ...] = (bank,), **metadata: str) -> None:
    """Run services until these events are settled, one after the other."""

    async def work() -> None:
        settings = Settings(store=f"sqlite:///{folder}/tidings.db", bus="memory://", database=database_url(folder))
        async with Runtime(*services, settings=settings) as runtime:
            for stream, event in events:
                await services[0].append(stream, event, metadata=metadata)
                await runtime.settled()
            await runtime.settled()

    with structlog.testing.capture_logs():
        asyncio.run(work())


def captured(*arguments: str) -> str:
    ended = invoke("capture", *arguments)
    assert ended.code == 0, ended.err
    return ended.out


def outcome(folder: Path, *texts: str) -> str:
    """Run each text as a test file. Return what pytest prints."""
    for number, text in enumerate(texts):
        (folder / f"test_{number}.py").write_text(text, encoding="utf-8")
    return pytest_in(folder)


def letters(service: str = "bank") -> list[dict[str, object]]:
    ended = invoke("dead", "list", "--json")
    rows = [json.loads(line) for line in ended.out.splitlines()]
    return [row for row in rows if row.get("service") == service]


HISTORY: tuple[tuple[str, Event], ...] = (
    ("account-1", Opened(account="1", owner="somebody else")),
    ("account-7", Opened(account="7", owner=OWNER)),
    ("account-7", Paid(account="7", pence=5, lines=(Line(text=EVIL), Line(text="x" * 90, kind=Kind.CARD)))),
)


def test_a_decision_that_an_aggregate_refuses_is_refused_again(folder: Path) -> None:
    happen(folder, *HISTORY, ("desk", Asked(account="7", pence=9)))
    (letter,) = letters()
    text = captured("dead:1")
    assert "somebody else" not in text
    said = outcome(folder, text)
    assert "1 failed in" in said
    assert f"tests.unit.captured.{letter['reason']}\n" in said


def test_position_id_place_and_dead_letter_name_the_same_event(folder: Path) -> None:
    happen(folder, *HISTORY, ("desk", Asked(account="7", pence=9)))
    (letter,) = letters()
    names = [str(letter["position"]), str(letter["event_id"]), "desk@0", "dead:1"]
    texts = {captured(name).replace(f"tidings capture {name}'", "tidings capture'") for name in names}
    assert len({" ".join(text.split()) for text in texts}) == 1


def test_rows_are_there_because_the_earlier_events_are_handled(folder: Path) -> None:
    asked = Asked(account="7", pence=1)
    happen(folder, *HISTORY, ("desk", asked), ("desk", asked))
    (letter,) = letters()
    assert "IntegrityError" in str(letter["reason"])
    text = captured(str(letter["position"]))
    assert text.count("Withdrawn(") == 1, "the first one is emitted again, and not stated"
    said = outcome(folder, text)
    assert "1 failed in" in said
    assert "UNIQUE constraint failed: withdrawals.account" in said


def test_an_event_that_was_handled_passes(folder: Path) -> None:
    happen(folder, *HISTORY, ("desk", Asked(account="7", pence=3)), actor="clerk 4")
    text = captured("desk@0")
    assert "(\"account-7\", Withdrawn(account='7', pence=3))".replace("'", '"') in text
    assert 'metadata={"actor": "clerk 4"}' in text
    said = outcome(folder, text, text.replace('Withdrawn(account="7", pence=3)', 'Withdrawn(account="7", pence=4)'))
    assert "1 failed, 1 passed in" in said
    assert "pence: expected 4, was 3" in said


def test_what_it_writes_is_formatted(folder: Path) -> None:
    happen(folder, *HISTORY, ("desk", Asked(account="7", pence=9)), ("desk", Asked(account="1", pence=0)))
    for name in ("desk@0", "desk@1"):
        (folder / "test_it.py").write_text(captured(name), encoding="utf-8")
        for command in (("format", "--diff"), ("check",)):
            options = ["--no-cache", f"--config={ROOT / 'pyproject.toml'}"]
            done = subprocess.run(
                [sys.executable, "-m", "ruff", *command, *options, "test_it.py"],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 0, done.stdout


def test_personal_values_are_replaced_everywhere_alike(folder: Path) -> None:
    happen(folder, *HISTORY, ("desk", Asked(account="7", pence=9)), actor=OWNER)
    text = captured("desk@0", "--redact", "owner", "--redact", "account")
    assert OWNER not in text
    (owner,) = set(re.findall(r'owner="(.*?)"', text))
    assert re.fullmatch(r"[a-z]{4}\.[a-z]{3}@[a-z]{7}\.[a-z]{3}", owner)
    (account,) = set(re.findall(r'account="(.*?)"', text))
    assert account in "12345689"
    assert set(re.findall(r'"account-(.*?)"', text)) == {account}
    assert f"'{OWNER}'" not in text
    assert f'"actor": "{owner}"' in text
    said = outcome(folder, text)
    assert "1 failed in" in said
    assert f"Overdrawn: account {account} of {owner} has 5 pence, not 9" in said


def test_a_field_that_is_nowhere_is_refused_so_that_nothing_stays_unnoticed(folder: Path) -> None:
    happen(folder, *HISTORY, ("desk", Asked(account="7", pence=9)))
    ended = invoke("capture", "desk@0", "--redact", "owner", "--redact", "onwer")
    assert (ended.code, ended.out) == (2, "")
    assert "--redact onwer: none of these events has this field" in ended.err


def test_a_value_that_the_class_checks_cannot_be_replaced(folder: Path) -> None:
    happen(folder, *HISTORY, ("desk", Asked(account="7", pence=9)))
    ended = invoke("capture", "desk@0", "--redact", "kind")
    assert (ended.code, ended.out) == (2, "")
    assert "no longer fits Paid" in ended.err


def test_data_that_does_not_fit_is_stated_as_it_is(folder: Path) -> None:
    happen(folder, *HISTORY)
    data = '{"account": "7", "pence": "much"}'
    assert invoke("streams", "append", "desk", "Asked", data, "--unchecked").code == 0
    happen(folder)
    text = captured("dead:1")
    assert '                    b\'{"account": "7", "pence": "much"}\',\n' in text
    said = outcome(folder, text)
    assert "1 failed in" in said
    assert "SchemaError: event 'Asked' at desk@0" in said


def test_resources_are_replaced_and_never_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_SERVICES", "tests.unit.captured:office")
    happen(folder, ("letter-7", Told(account="7", text="hello")), services=(office,))
    text = captured("dead:1")
    assert "    Office: create_autospec(Office, instance=True),\n" in text
    assert ", resources=RESOURCES)" in text
    assert "}\nRESOURCES[Office].write.side_effect = AssertionError('the real one was called')\n" in text.replace(
        '"', "'"
    )
    mended = "\n".join(line for line in text.splitlines() if ".side_effect" not in line) + "\n"
    said = outcome(folder, text, mended)
    assert "1 failed, 1 passed in" in said
    assert "AssertionError: the real one was called" in said


def test_of_several_services_the_one_is_meant_in_which_it_failed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_SERVICES", "tests.unit.captured:bank,tests.unit.captured:branch")
    asked = [("desk", Asked(account="7", pence=pence)) for pence in (9, 2000, 1)]
    happen(folder, *HISTORY, *asked, services=(bank, branch))
    assert "Asked at desk@0, as service bank was given it." in captured("desk@0")
    for name, both in (("desk@1", "failed in"), ("desk@2", "is handled by")):
        ended = invoke("capture", name)
        assert (ended.code, ended.out) == (1, "")
        assert f"{both} several services: say --service with one of " in ended.err
    text = captured("desk@1", "--service", "branch")
    assert "def test_complain_asked_at_position_" in text
    assert "ValueError: nobody asks for 2000" in text
    ended = invoke("capture", "dead:1")
    assert ended.code == 2
    assert "Several have a dead letter 1: say --service with one of bank, branch" in ended.err
    assert "def test_complain_" in captured("dead:1", "-s", "branch")
    ended = invoke("capture", "dead:99")
    assert ended.code == 1
    assert "none of the services bank, branch has dead letter 99" in ended.err


def test_a_dead_letter_that_only_one_service_has_needs_no_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_SERVICES", "tests.unit.captured:bank,tests.unit.captured:branch")
    happen(folder, *HISTORY, services=(bank,))
    happen(folder, ("desk", Asked(account="7", pence=2000)), services=(branch,))
    assert letters("bank") == []
    assert "def test_complain_" in captured("dead:1")


def test_what_no_handler_was_given_is_refused(folder: Path) -> None:
    happen(folder, *HISTORY, ("desk", Asked(account="7", pence=9)))
    assert invoke("streams", "append", "desk", "Strange").code == 0
    for name, said in (
        ("desk@1", "none of the services bank handles 'Strange'"),
        ("desk@9", "shows no version 9"),
        ("dead:9", "has no dead letter 9"),
        ("999", "no event is at position 999"),
    ):
        ended = invoke("capture", name)
        assert (ended.code, ended.out) == (1, "")
        assert said in ended.err
    ended = invoke("capture", "dead:x")
    assert (ended.code, ended.out) == (2, "")


def test_it_only_reads(folder: Path) -> None:
    happen(folder, *HISTORY, ("desk", Asked(account="7", pence=9)))
    before = invoke("dead", "list", "--json").out, invoke("streams", "list", "--json").out
    captured("dead:1")
    assert (invoke("dead", "list", "--json").out, invoke("streams", "list", "--json").out) == before
