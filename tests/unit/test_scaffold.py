"""`tidings new` and `tidings add`: what they write is right as it is, and what exists is never touched."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from services.demo.fleet.processes import free_ports
from tests.unit.command_line import Ended, invoke
from tidings.cli._scaffold import LONGEST
from tidings.cli._source import source_of
from tidings.cli.new import EXTRAS, TRY_API, project

LONG = "n" * LONGEST
SECONDS = 280
"""Seconds that a tool may take. mypy has to read all of SQLAlchemy on a machine that is busy with other tests."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, without settings."""
    for name in [name for name in os.environ if name.startswith("TIDINGS_") and not name.startswith("TIDINGS_TEST_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files(folder: Path) -> Mapping[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(folder: Path, *command: str) -> str:
    """Run a tool in a project and return what it prints. Fails unless it ends with 0."""
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def new(*arguments: str) -> Ended:
    ended = invoke("new", *arguments)
    assert ended.code == 0, ended.err
    return ended


# ---- new -----------------------------------------------------------------------------


def test_it_says_the_three_commands_that_come_next() -> None:
    ended = new("shop")
    assert [line.strip() for line in ended.out.splitlines()[1:]] == ["cd shop", "make install", "make test", "make run"]
    readme = Path("shop/README.md").read_text()
    makefile = Path("shop/Makefile").read_text()
    for target in ("install", "test", "run"):
        assert f"\nmake {target} " in readme
        assert f"\n{target}: " in makefile


def test_without_an_extra_nothing_of_it_is_there() -> None:
    plain = "".join(project("shop", ()).values()).lower()
    assert "fastapi" not in plain
    assert "httpx" not in plain
    assert "postgresql" not in plain
    both = project("shop", EXTRAS)
    assert {"shop/api.py", "tests/test_shop_api.py", "tests/test_shop_postgresql.py"} <= both.keys()
    assert "fastapi,postgresql" in both["pyproject.toml"]
    assert "postgresql+asyncpg://" in both["settings/rabbitmq.env"]


@pytest.mark.parametrize(
    ("url", "more", "given"),
    [
        ("file://{folder}", {"dir_info": {"editable": True}}, "--editable '{folder}'"),
        ("file://{folder}", {"dir_info": {}}, "'{folder}'"),
        ("file://{folder}/a%20%24%23.whl", {"archive_info": {}}, "'{folder}/a $#.whl'"),
        ("file://{folder}/gone.whl", {"archive_info": {}}, None),
        ("file://{folder}/it's.whl", {"archive_info": {}}, None),
        ("https://example.org/t.whl", {"archive_info": {}}, "'tidings @ https://example.org/t.whl'"),
        (
            "https://example.org/t.git",
            {"vcs_info": {"vcs": "git", "commit_id": "ab12"}},
            "'tidings @ git+https://example.org/t.git@ab12'",
        ),
    ],
)
def test_where_tidings_was_installed_from_is_what_make_gives_to_pip(
    folder: Path, url: str, more: dict[str, object], given: str | None
) -> None:
    for name in ("a $#.whl", "it's.whl"):
        (folder / name).touch()
    found = source_of(json.dumps({"url": url.format(folder=folder), **more}))
    assert found == (None if given is None else given.format(folder=folder))
    place = folder / "shop"
    for path, text in project("shop", (), found).items():
        (place / path).parent.mkdir(parents=True, exist_ok=True)
        (place / path).write_text(text)
    assert (place / "local.mk").exists() == (found is not None)
    assert ("`local.mk`" in (place / "README.md").read_text()) == (found is not None)
    assert "/local.mk\n" in (place / ".gitignore").read_text()
    told = subprocess.run(["make", "-n", "install"], cwd=place, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in told.splitlines() if "pip install" in line]
    words = shlex.split(line.partition("--disable-pip-version-check")[2])
    assert words == [*shlex.split(found or ""), "--editable", ".[dev]"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"url": 1, "dir_info": 2}'])
def test_what_says_no_source_is_as_if_it_came_from_an_index(text: str) -> None:
    assert source_of(text) is None


def test_a_new_project_uses_the_tidings_that_has_made_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tidings.cli.new.source", lambda: "'/there/tidings.whl'")
    new("shop")
    assert "TIDINGS_SOURCE := '/there/tidings.whl'\n" in Path("shop/local.mk").read_text()
    monkeypatch.setattr("tidings.cli.new.source", lambda: None)
    new("stall")
    assert not Path("stall/local.mk").exists()


def test_extras_are_named_together_or_one_by_one() -> None:
    new("one", "--with", "api,postgresql")
    new("two", "--with", "postgresql", "--with", "api")
    assert {name.replace("one", "two") for name in files(Path("one"))} == set(files(Path("two")))
    ended = invoke("new", "three", "--with", "api,mysql")
    assert (ended.code, ended.out) == (2, "")
    assert "'mysql': choose from api and postgresql" in ended.err
    assert not Path("three").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Shop", "such as shop"),
        ("order-desk", "such as order_desk"),
        ("../shop", "such as shop"),
        ("2shop", "such as shop"),
        ("sh\x1bop", "such as sh_op"),
        ("", "cannot name a Python package"),
        ("n" * (LONGEST + 1), f"use 1 to {LONGEST}"),
        ("class", "a Python keyword"),
        ("json", "that Python already has"),
        ("pydantic", "that Python already has"),
        ("tidings", "that Python already has"),
        ("tests", "a folder of every project"),
        ("events", "cannot name a service"),
    ],
)
def test_a_name_that_cannot_be_a_package_is_refused(folder: Path, name: str, said: str) -> None:
    ended = invoke("new", "--", name)
    assert (ended.code, ended.out) == (2, "")
    assert said in ended.err
    assert "\x1b" not in ended.err
    assert not list(folder.iterdir())


def test_a_folder_with_something_in_it_is_left_as_it_is(folder: Path) -> None:
    Path("shop").mkdir()
    Path("shop/precious").write_text("mine")
    ended = invoke("new", "shop")
    assert (ended.code, ended.out) == (1, "")
    assert "is not empty, so nothing was written" in ended.err
    assert files(folder) == {"shop/precious": b"mine"}


def test_a_file_or_a_link_in_the_way_is_left_as_it_is(folder: Path) -> None:
    Path("shop").write_text("mine")
    Path("elsewhere").mkdir()
    Path("desk").symlink_to("elsewhere")
    for name in ("shop", "desk"):
        ended = invoke("new", name)
        assert (ended.code, ended.out) == (1, "")
        assert "is not a folder, so nothing was written" in ended.err
    assert files(folder) == {"shop": b"mine"}


def test_an_empty_folder_is_filled() -> None:
    Path("shop").mkdir()
    new("shop")
    assert Path("shop/Makefile").exists()


def test_a_disk_that_fails_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail)
    ended = invoke("new", "shop")
    assert (ended.code, ended.out) == (1, "")
    assert "cannot be written: No space left on device" in ended.err
    assert not list(folder.iterdir())


# ---- add -----------------------------------------------------------------------------


def test_a_second_service_is_added_beside_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    new("shop")
    before = files(Path("shop"))
    monkeypatch.chdir("shop")
    ended = invoke("add", "service", "billing")
    assert ended.code == 0
    assert "billing/ follows OrderConfirmed of shop; its tests are in tests/test_billing.py" in ended.out
    after = files(Path.cwd())
    assert after.keys() - before.keys() == {
        "billing/__init__.py",
        "billing/events.py",
        "billing/service.py",
        "tests/test_billing.py",
        "tests/test_shop_and_billing.py",
    }
    assert "tests/test_shop_and_billing.py tests both together" in ended.out
    assert {name for name in before if after[name] != before[name]} == {
        "settings/embedded.env",
        "settings/rabbitmq.env",
    }
    for name in ("embedded", "rabbitmq"):
        (line,) = [line for line in after[f"settings/{name}.env"].decode().splitlines() if "SERVICES=" in line]
        assert line == "TIDINGS_SERVICES=shop.service:service,billing.service:service"


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [
        ("billing", 1, "this project already has a service billing; nothing was written"),
        ("shop", 1, "this project already has a service shop; nothing was written"),
        ("Billing", 2, "such as billing"),
        ("tests", 2, "a folder of every project"),
    ],
)
def test_what_cannot_be_added_changes_nothing(monkeypatch: pytest.MonkeyPatch, name: str, code: int, said: str) -> None:
    new("shop")
    monkeypatch.chdir("shop")
    assert invoke("add", "service", "billing").code == 0
    before = files(Path.cwd())
    ended = invoke("add", "service", name)
    assert (ended.code, ended.out) == (code, "")
    assert said in ended.err
    assert files(Path.cwd()) == before


def test_outside_a_project_nothing_is_added(folder: Path) -> None:
    ended = invoke("add", "service", "billing")
    assert (ended.code, ended.out) == (2, "")
    assert "go to the folder of a project that 'tidings new' made" in ended.err
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("line", "then"),
    [
        ("shop.service:service", "shop.service:service,billing.service:service"),
        ('"shop.service:service"', '"shop.service:service,billing.service:service"'),
        ("'shop.service:service, more.service'", "'shop.service:service,more.service,billing.service:service'"),
        ("shop.service:service,  # all", "shop.service:service,billing.service:service  # all"),
        ("shop.service:service\r", "shop.service:service,billing.service:service\r"),
        (
            "gone:gone\nexport TIDINGS_SERVICES=shop:service",
            "gone:gone\nexport TIDINGS_SERVICES=shop:service,billing.service:service",
        ),
    ],
)
def test_quotes_comments_and_line_ends_of_settings_stay(monkeypatch: pytest.MonkeyPatch, line: str, then: str) -> None:
    new("shop")
    monkeypatch.chdir("shop")
    for name in ("embedded", "rabbitmq"):
        Path(f"settings/{name}.env").write_bytes(f"# mine\nTIDINGS_SERVICES={line}\n# end".encode())
    ended = invoke("add", "service", "billing")
    assert ended.code == 0, ended.err
    for name in ("embedded", "rabbitmq"):
        assert Path(f"settings/{name}.env").read_bytes() == f"# mine\nTIDINGS_SERVICES={then}\n# end".encode()


@pytest.mark.parametrize("file", ["embedded", "rabbitmq"])
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "'TIDINGS_SERVICES=' names no service"),
        ('""', "names no service"),
        ('"shop.service:service', "cannot be read"),
        ("'a:b','c:d'", "cannot be read"),
        ("$SHOP", "cannot be read"),
        ("shop.service:service,,more:more", "cannot be read"),
        ("\xff", "is not in UTF-8"),
    ],
)
def test_settings_that_cannot_be_read_are_named_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, file: str, line: str, said: str
) -> None:
    new("shop")
    monkeypatch.chdir("shop")
    Path(f"settings/{file}.env").write_bytes(f"TIDINGS_SERVICES={line}\n".encode("latin-1"))
    before = files(Path.cwd())
    ended = invoke("add", "service", "billing")
    assert (ended.code, ended.out) == (2, "")
    assert f"settings/{file}.env" in ended.err
    assert said in ended.err
    assert "Nothing was written" in ended.err
    assert files(Path.cwd()) == before


def test_settings_without_services_stay_as_they_are_and_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    new("shop")
    monkeypatch.chdir("shop")
    Path("settings/rabbitmq.env").write_text("# TIDINGS_SERVICES=none\nTIDINGS_BUS=amqp://localhost\n")
    before = files(Path.cwd())
    ended = invoke("add", "service", "billing")
    assert ended.code == 0
    assert "settings/rabbitmq.env has no line TIDINGS_SERVICES=..., so it stays as it is" in ended.out
    assert files(Path.cwd())["settings/rabbitmq.env"] == before["settings/rabbitmq.env"]
    Path("settings/embedded.env").write_text("TIDINGS_BUS=memory://\n")
    before = files(Path.cwd())
    ended = invoke("add", "service", "mails")
    assert (ended.code, ended.out) == (2, "")
    assert "write that line, with the project's services: TIDINGS_SERVICES=shop.service:service" in ended.err
    assert files(Path.cwd()) == before


@pytest.mark.parametrize("fails", range(1, 6))
def test_whatever_cannot_be_written_nothing_is_left_of_an_added_service(
    folder: Path, monkeypatch: pytest.MonkeyPatch, fails: int
) -> None:
    """Of the package, its two tests, and two files of settings, one fails at a time."""
    new("shop")
    monkeypatch.chdir("shop")
    for path in Path("tests").iterdir():
        path.unlink()
    Path("tests").rmdir()
    before, calls = files(Path.cwd()), list[str]()
    opened, replaced, renamed = Path.open, Path.replace, Path.rename

    def count(path: Path) -> None:
        calls.append(path.name)
        if len(calls) == fails:
            raise OSError(28, "No space left on device", str(path))

    def open_(self: Path, mode: str = "r", **options: Any) -> Any:
        if mode == "x":
            count(self)
        return opened(self, mode, **options)

    def replace(self: Path, target: Path) -> Path:
        count(self)
        return replaced(self, target)

    def rename(self: Path, target: Path) -> Path:
        count(self)
        return renamed(self, target)

    monkeypatch.setattr(Path, "open", open_)
    monkeypatch.setattr(Path, "replace", replace)
    monkeypatch.setattr(Path, "rename", rename)
    ended = invoke("add", "service", "billing")
    assert (ended.code, ended.out) == (1, "")
    assert "cannot be written: No space left on device" in ended.err
    assert files(Path.cwd()) == before
    assert not Path("tests").exists()
    assert not Path("billing").exists()


def test_settings_behind_a_link_are_changed_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    new("shop")
    monkeypatch.chdir("shop")
    real = Path("settings/rabbitmq.env").rename("shared.env")
    real.chmod(0o640)
    Path("settings/rabbitmq.env").symlink_to("../shared.env")
    assert invoke("add", "service", "billing").code == 0
    assert Path("settings/rabbitmq.env").is_symlink()
    assert "billing.service:service" in real.read_text()
    assert real.stat().st_mode & 0o777 == 0o640


EVENTS = """
from tidings import Event

class Paid(Event, key="invoice", name="InvoicePaid"):
    invoice: str

class Counted(Event, key="number"):
    number: int

class Nobody(Event):
    invoice: str

class Priced(Event, key="invoice"):
    invoice: str
    price: Decimal
"""


def test_a_service_follows_the_event_that_is_named_by_its_key_and_wire_name(monkeypatch: pytest.MonkeyPatch) -> None:
    new("shop")
    monkeypatch.chdir("shop")
    Path("shop/events.py").write_text(EVENTS)
    assert "follows Paid of shop" in invoke("add", "service", "mails", "--follow", "Paid").out
    assert 'class Paid(Event, name="InvoicePaid", key="invoice"):\n' in Path("mails/events.py").read_text()
    assert "follows MailsStarted of mails" in invoke("add", "service", "post", "--follow", "MailsStarted").out
    before = files(Path.cwd())
    ended = invoke("add", "service", "more", "--follow", "Counted")
    assert (ended.code, ended.out) == (1, "")
    assert "no Counted to follow: looked in events.py of shop, mails, post" in ended.err
    assert "there are Paid of shop, Priced of shop, MailsStarted of mails, PostStarted of post. Nothing" in ended.err
    assert files(Path.cwd()) == before
    ended = invoke("add", "service", "prices", "--follow", "Priced")
    assert "No test of both together was written: Priced has fields without a known sample value" in ended.out
    assert files(Path.cwd()).keys() - before.keys() == {
        *(f"prices/{name}.py" for name in ("__init__", "events", "service")),
        "tests/test_prices.py",
    }


def test_a_service_whose_events_cannot_be_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    new("shop")
    monkeypatch.chdir("shop")
    Path("shop/events.py").write_text("class Broken(")
    ended = invoke("add", "service", "mails")
    assert (ended.code, ended.out) == (1, "")
    assert "no event to follow: looked in events.py of shop" in ended.err
    assert "there is none" in ended.err


# ---- what is written -----------------------------------------------------------------


@pytest.fixture
def projects(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A project with everything, and the smallest one, each with a second service; names of any length."""
    new("order_desk2", "--with", "api,postgresql")
    new("a")
    for name, second in (("order_desk2", "billing"), ("a", LONG)):
        monkeypatch.chdir(folder / name)
        assert invoke("add", "service", second).code == 0
    return [folder / "order_desk2", folder / "a"]


def test_it_is_formatted_and_without_a_finding(projects: list[Path]) -> None:
    for place in projects:
        run(place, "ruff", "format", "--check", "--no-cache")
        run(place, "ruff", "check", "--no-cache")


def test_a_long_name_makes_no_line_too_long(folder: Path) -> None:
    new(LONG, "--with", "api,postgresql")
    run(folder / LONG, "ruff", "format", "--check", "--no-cache")
    run(folder / LONG, "ruff", "check", "--no-cache")


@pytest.mark.timeout(300)
def test_its_types_are_right(projects: list[Path]) -> None:
    assert "no issues found" in run(projects[0], "mypy")


@pytest.mark.timeout(300)
def test_its_tests_pass(projects: list[Path]) -> None:
    # `make wheel` runs the one on a PostgreSQL, too.
    (on_server,) = projects[0].glob("tests/*_postgresql.py")
    assert " passed" in run(projects[0], "pytest", "-q", "-p", "no:cacheprovider", f"--ignore={on_server}")


@pytest.mark.timeout(300)
def test_a_broken_handler_fails_its_tests(projects: list[Path]) -> None:
    service = projects[1] / "a" / "service.py"
    service.write_text(service.read_text().replace("await context.change", "context.change"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"],
        cwd=projects[1],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 1
    assert "test_a_placed_order_becomes_confirmed" in done.stdout


@pytest.mark.timeout(300)
def test_it_runs_and_handles_the_order_of_its_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """With an API. `make wheel` runs the smallest one, as its Makefile does."""
    new("shop", "--with", "api")
    monkeypatch.chdir("shop")
    assert invoke("add", "service", "billing").code == 0
    lines = Path("settings/embedded.env").read_text().splitlines()
    for name, value in (line.split("=", 1) for line in lines if not line.startswith("#")):
        monkeypatch.setenv(name, value)
    (port,) = free_ports(1)
    targets = ("shop.api:api", "billing.service:service")
    command = [sys.executable, "-m", "tidings", "dev", "--no-reload", f"--port={port}", *targets]
    with Path("out").open("wb") as out, subprocess.Popen(command, stdout=out, stderr=out) as served:
        try:
            _until(lambda: Path("out").read_text().count("service.connected") == 2, served)
            curl = shlex.split(TRY_API)
            request = urllib.request.Request(
                f"http://{curl[3].replace('8000', str(port))}",
                method=curl[2],
                headers=dict([curl[5].split(": ")]),
                data=curl[7].encode(),
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert answer.status == 201
            _until(lambda: "billing_started-1@0" in invoke("why", "order-1@0").out, served)
            _until(lambda: invoke("verify").code == 0, served)
        finally:
            served.terminate()
        assert served.wait(60) == 0


def _until(holds: Callable[[], bool], served: subprocess.Popen[bytes]) -> None:
    """Wait until something is so, as long as the process runs."""
    end = time.monotonic() + 60
    while not holds():
        assert served.poll() is None, Path("out").read_text()
        assert time.monotonic() < end, Path("out").read_text()
        time.sleep(0.1)
