"""The command line's answers: exit codes, plain text, one line of JSON per thing, and errors with a remedy."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import pytest

from tests.unit.command_line import Ended, OrderCreated, invoke, run_shop
from tidings import EventData, EventStore, __version__, open_store
from tidings.cli.streams import _of_all
from tidings.protocol.position import CARRIED

pytestmark = pytest.mark.lower_bounds

SHOP = "tests.unit.command_line:shop"
OTHER = "tests.unit.command_line:other"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, without settings."""
    for name in ("STORE", "BUS", "DATABASE", "SERVICES", "DEBUG"):
        monkeypatch.delenv(f"TIDINGS_{name}", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def objects(ended: Ended) -> list[dict[str, Any]]:
    return [json.loads(line) for line in ended.out.splitlines()]


def append(stream: str = "order-1", type: str = "OrderCreated", data: str = "{}", *options: str) -> dict[str, Any]:
    ended = invoke("streams", "append", stream, type, data, "--json", *options)
    assert ended.code == 0, ended.err
    return objects(ended)[0]


# ---- the whole -----------------------------------------------------------------------


def test_help_has_the_table_of_exit_codes_and_no_boxes() -> None:
    ended = invoke("--help")
    assert ended.code == 0
    for line in ("Exit codes:", "  1    the answer is no", "  130  ended by Ctrl-C", "TIDINGS_SERVICES"):
        assert line in ended.out
    assert ended.out.isascii()


@pytest.mark.parametrize(
    "command",
    [["new"], ["add", "service"], ["capture"], ["run"], ["relay"], ["dev"], ["verify"], ["status"]]
    + [["streams", name] for name in ("list", "show", "tail", "append")]
    + [["dead", name] for name in ("list", "show", "retry", "drop")]
    + [["topology", name] for name in ("plan", "apply", "diff")],
    ids=" ".join,
)
def test_each_command_explains_itself(command: list[str]) -> None:
    ended = invoke(*command, "--help")
    assert ended.code == 0
    assert ended.out.startswith(f"Usage: tidings {' '.join(command)}")


def test_the_version_is_printed() -> None:
    assert invoke("--version") == Ended(0, f"tidings {__version__}\n", "")


def test_help_imports_nothing_that_only_commands_need() -> None:
    code = (
        "import sys; from tidings.cli import main; sys.argv = ['tidings', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = ('sqlalchemy', 'pamqp', 'uvicorn', 'fastapi', 'aio_pika')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_its_packages_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['typer'] = None\n"
        "import importlib.util, tidings.cli as cli\n"
        "cli.find_spec = lambda name: None if name == 'typer' else object()\n"
        "cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tidings: the command line needs typer: pip install 'tidings[cli]'\n"


@pytest.mark.parametrize("arguments", [["nonsense"], ["streams", "show"], ["streams", "tail", "-n", "-1"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    ended = invoke(*arguments)
    assert (ended.code, ended.out) == (2, "")
    assert ended.err


# ---- errors are for people -----------------------------------------------------------


def test_wrong_settings_are_one_line_and_2(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, said in (
        ("TIDINGS_STORE", "mysql://u:hush@x", "TIDINGS_STORE: no store adapter"),
        ("TIDINGS_BUSS", "memory://", "TIDINGS_BUSS is no setting of Tidings"),
        ("TIDINGS_SERVICES", "a:b,,c:d", "TIDINGS_SERVICES is set, but names nothing"),
        ("TIDINGS_STORE", "memory://x", "no command can look into it"),
    ):
        monkeypatch.setenv(name, value)
        ended = invoke("streams", "list")
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.startswith(f"tidings: {said}") or said in ended.err
        assert ended.err.count("\n") == 1
        assert "hush" not in ended.err
        monkeypatch.delenv(name)


def test_a_store_that_is_not_there_is_3_and_looking_makes_none(folder: Path) -> None:
    for command in (["streams", "list"], ["streams", "tail"], ["status"], ["verify", SHOP], ["dead", "list", SHOP]):
        ended = invoke(*command)
        assert (ended.code, ended.out) == (3, "")
        assert f"there is no log at {folder / 'tidings.db'}" in ended.err
    assert list(folder.iterdir()) == []


def test_a_store_that_cannot_be_read_is_3(folder: Path) -> None:
    (folder / "tidings.db").mkdir()
    ended = invoke("streams", "list")
    assert ended.code == 3
    assert ended.err.count("\n") == 1


def test_tracebacks_are_shown_when_asked_for_and_the_code_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Traceback" not in invoke("verify", "absent").err
    monkeypatch.setenv("TIDINGS_DEBUG", "1")
    ended = invoke("verify", "absent")
    assert ended.code == 2
    assert "Traceback" in ended.err
    assert "ModuleNotFoundError" in ended.err


def test_an_error_that_nobody_expected_is_70_and_says_how_to_see_more(monkeypatch: pytest.MonkeyPatch) -> None:
    append()

    def fail(*_: object) -> None:
        raise ZeroDivisionError("in \x1b[31mred\nand more")

    monkeypatch.setattr("tidings.cli.streams.one_line", fail)
    ended = invoke("streams", "tail")
    assert ended.code == 70
    assert ended.err == (
        "tidings: unexpected ZeroDivisionError: in \\x1b[31mred\nTIDINGS_DEBUG=1 shows where it comes from.\n"
    )


def test_ctrl_c_is_130_and_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    append()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tidings.cli.streams.one_line", interrupt)
    assert invoke("streams", "tail") == Ended(130, "", "")


# ---- streams -------------------------------------------------------------------------


def test_what_is_appended_is_listed_shown_and_tailed() -> None:
    done = append("order-1", "OrderCreated", '{"order_id": "1"}', "--metadata", '{"actor": "me"}')
    append("order-1", "OrderPaid", "{}")
    append("parcel-1", "ParcelSent", "{}")
    assert (done["stream"], done["version"], done["position"] > 0) == ("order-1", 0, True)
    listed = objects(invoke("streams", "list", "--json"))
    assert [(row["stream"], row["version"], row["events"]) for row in listed] == [("parcel-1", 0, 1), ("order-1", 1, 2)]
    (event, paid) = objects(invoke("streams", "show", "order-1", "--json"))
    assert (event["type"], event["data"], event["id"]) == ("OrderCreated", {"order_id": "1"}, done["id"])
    assert event["metadata"] == {"$correlationId": done["id"], "actor": "me"}
    assert paid["version"] == 1
    assert [row["type"] for row in objects(invoke("streams", "tail", "-n", "2", "--json"))] == [
        "OrderPaid",
        "ParcelSent",
    ]
    assert [row["type"] for row in objects(invoke("streams", "tail", "order-1", "-n", "1", "--json"))] == ["OrderPaid"]


def test_text_has_a_line_per_stream_with_columns_that_stay() -> None:
    append("order-1", "OrderCreated", "{}")
    ended = invoke("streams", "list")
    titles, row = ended.out.splitlines()
    assert titles.split() == ["STREAM", "VERSION", "EVENTS", "POSITION", "RECORDED", "TYPE"]
    assert len(row.split()) == 6
    assert ended.out.isprintable() or "\x1b" not in ended.out


def test_an_event_is_shown_whole_in_text() -> None:
    append("order-1", "OrderCreated", '{"lines": [1, 2], "name": "\\u001b[2J größe"}')
    ended = invoke("streams", "show", "order-1")
    assert ended.code == 0
    assert ended.out.startswith("order-1@0  OrderCreated  20")
    assert "größe" in ended.out
    assert "\x1b" not in ended.out


def test_a_part_of_a_stream_is_shown() -> None:
    for number in range(5):
        append("order-1", "OrderCreated", f'{{"n": {number}}}')

    def numbers(*options: str) -> list[int]:
        return [row["data"]["n"] for row in objects(invoke("streams", "show", "order-1", "--json", *options))]

    assert numbers("--from", "3") == [3, 4]
    assert numbers("--backwards", "--limit", "2") == [4, 3]
    assert numbers("--from", "1", "--backwards") == [1, 0]


def test_lists_are_narrowed_by_category_and_limit_and_tidings_own_streams_are_left_out() -> None:
    for name in ("order-1", "order-2", "orders-1", "parcel-1"):
        append(name)
    assert [row["stream"] for row in objects(invoke("streams", "list", "--category", "order", "--json"))] == [
        "order-2",
        "order-1",
    ]
    ended = invoke("streams", "list", "--limit", "2", "--json")
    assert [row["stream"] for row in objects(ended)] == ["parcel-1", "orders-1"]
    assert ended.err == "Only the newest 2 events were read; --limit reads more.\n"
    everything = [row["stream"] for row in objects(invoke("streams", "list", "--system", "--json"))]
    assert "tidings_log" in everything


def test_an_unknown_stream_is_1_and_says_so() -> None:
    append()
    for command in (["show", "nope"], ["tail", "nope"]):
        ended = invoke("streams", *command)
        assert (ended.code, ended.out) == (1, "")
        assert "stream 'nope' has no events" in ended.err


def test_data_comes_from_standard_input_and_octets_as_they_are() -> None:
    ended = invoke("streams", "append", "order-1", "T", "-", "--json", input='{"n": 1}')
    assert ended.code == 0
    ended = invoke("streams", "append", "order-1", "T", "-", "--octets", "--json", input=b"\xff\x00")
    assert ended.code == 0
    first, second = objects(invoke("streams", "show", "order-1", "--json"))
    assert (first["data"], first["content_type"]) == ({"n": 1}, "application/json")
    assert (second["data"], second["content_type"]) == ({"base64": "/wA="}, "application/octet-stream")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["order-1", "T", "{nonsense"], "DATA is not JSON"),
        (["order-1", "T", "NaN"], "DATA is not JSON"),
        (["order-1", "T", "{}", "--metadata", "[]"], "--metadata is JSON, but not an object"),
        (["order-1", "T", "{}", "--metadata", "x"], "--metadata is not JSON"),
        (["order-1", "T", "[" * 300 + "]" * 300], "DATA is not JSON that services can read: it nests"),
        (["order-1", "T", "1e999"], "DATA is not JSON that services can read"),
        (["order-1", "T", "{}", "--metadata", '{"a":' * 300 + "1" + "}" * 300], "it nests more than"),
        (["order-1", "T", "{}", "--key", "a", "--metadata", '{"partitionKey":"b"}'], "'b' differ: give one"),
        (["order-1", "T", "{}", "--expected", "-1"], "--expected '-1'"),
        (["tidings_x", "T"], "stream 'tidings_x': names that begin with"),
        (["$x", "T"], "are reserved"),
        (["order-1", "tidings.marker"], "type 'tidings.marker'"),
        (["", "T"], "is not a stream name"),
    ],
)
def test_what_cannot_be_appended_is_refused_before_anything_is_written(arguments: list[str], said: str) -> None:
    ended = invoke("streams", "append", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert ended.err.count("\n") == 1
    assert not Path("tidings.db").exists()


def test_the_expected_version_is_kept_and_a_repetition_with_an_id_is_written_once() -> None:
    identity = str(uuid4())
    first = append("order-1", "T", "{}", "--expected", "no-stream", "--id", identity)
    again = append("order-1", "T", "{}", "--expected", "no-stream", "--id", identity)
    assert first == again
    assert append("order-1", "T", "{}", "--expected", "0")["version"] == 1
    assert append("order-1", "T", "{}", "--expected", "exists")["version"] == 2
    for wrong in ("0", "7", "no-stream"):
        ended = invoke("streams", "append", "order-1", "T", "--expected", wrong)
        assert (ended.code, ended.out) == (1, "")
        assert "its last version is 2" in ended.err


class Racing:
    """A store to which another process appends after every read of its head."""

    def __init__(self, store: EventStore) -> None:
        self._store = store
        self.read_all, self.subscribe_all = store.read_all, store.subscribe_all

    async def head(self) -> int:
        head = await self._store.head()
        await self._store.append("order-1", [EventData("T", b"{}")])
        return head


@pytest.mark.parametrize("count", [0, 1, 10])
async def test_what_is_appended_while_tail_begins_is_shown_once(count: int) -> None:
    async with open_store(f"memory://{uuid4()}") as store:
        for _ in range(3):
            await store.append("order-1", [EventData("T", b"{}")])
        following = _of_all(cast("EventStore", Racing(store)), CARRIED, count, True)
        expected = list(range(4))[-count:] if count else [3]
        async with asyncio.timeout(20):
            shown = [(await anext(following)).version for _ in expected]
            await store.append("order-1", [EventData("T", b"{}")])
            shown.append((await anext(following)).version)
    assert shown == [*expected, 4]


# ---- verify --------------------------------------------------------------------------


def test_verify_is_0_when_all_is_settled_and_1_with_names_when_not(folder: Path) -> None:
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    ended = invoke("verify", SHOP)
    assert ended.code == 0
    assert "all settled up to position" in ended.out
    pending = append("order-2", "OrderCreated", '{"order_id": "2"}')
    ended = invoke("verify", SHOP)
    assert ended.code == 1
    assert f"pending OrderCreated {pending['id']} at order-2@0" in ended.out
    (report,) = objects(invoke("verify", SHOP, "--json"))
    assert (report["ok"], report["services"][0]["ok"], report["services"][0]["pending_count"]) == (False, False, 1)
    assert report["services"][0]["pending"][0]["event_id"] == pending["id"]


def test_a_service_that_never_ran_is_named_and_not_made_by_looking(folder: Path) -> None:
    append("order-1", "OrderCreated", '{"order_id": "1"}')
    before = set(folder.iterdir())
    ended = invoke("verify", SHOP)
    assert ended.code == 1
    assert "shop: NOT settled up to position 2 (1 pending" in ended.out
    assert "has no database: it has never run" in ended.out
    assert set(folder.iterdir()) == before


def test_verify_takes_its_services_from_the_setting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_shop(folder, ("order-1", OrderCreated(order_id="1")))
    assert invoke("verify").code == 2
    monkeypatch.setenv("TIDINGS_SERVICES", f"{SHOP}, {OTHER}")
    (report,) = objects(invoke("verify", "--json"))
    assert [part["service"] for part in report["services"]] == ["shop", "other"]
    (report,) = objects(invoke("verify", SHOP, "--json"))
    assert [part["service"] for part in report["services"]] == ["shop"]


def test_a_database_that_is_none_is_3_and_one_of_another_tidings_is_2(folder: Path) -> None:
    append()
    (folder / "shop.db").write_bytes(b"no database at all, not in the least" * 40)
    ended = invoke("verify", SHOP)
    assert (ended.code, ended.out) == (3, "")
    assert "shop.db" in ended.err
    (folder / "shop.db").unlink()

    async def of_the_future() -> None:
        import sqlalchemy as sa

        from tidings.database.engine import open_database

        async with (
            open_database(f"sqlite:///{folder}/shop.db") as database,
            database.transaction() as connection,
        ):
            await connection.execute(sa.text("UPDATE tidings_schema SET version = 1000"))

    asyncio.run(of_the_future())
    ended = invoke("verify", SHOP)
    assert ended.code == 2
    assert "version 1000" in ended.err


def test_a_service_that_dies_ends_its_process_although_a_thread_of_it_hangs() -> None:
    code = (
        "import sys, threading, time\n"
        "from tidings.cli.run import _serve\n"
        "from tidings.errors import LogChanged\n"
        "from uuid import UUID\n"
        "async def work():\n"
        "    threading.Thread(target=time.sleep, args=(600,)).start()\n"
        "    raise LogChanged('service', UUID(int=1), UUID(int=2))\n"
        "sys.exit(_serve(work()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("tidings: service has followed log 00000000")
