"""Producing without consuming: `tidings.connect()`, with and without an event loop."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest

import tidings
from tidings import NO_STREAM, Aggregate, Event, Settings, StreamAppend, evolves
from tidings.errors import (
    ConfigurationError,
    InvalidAppend,
    SchemaError,
    StoreUnavailable,
    StreamNotFound,
    WrongExpectedVersion,
)

pytestmark = pytest.mark.lower_bounds


class Opened(Event, key="account"):
    account: str


class Paid(Event, key="account"):
    account: str
    cents: int


class Account(Aggregate):
    total = 0

    def open(self) -> None:
        self.record(Opened(account=self.id))

    def pay(self, cents: int) -> None:
        self.record(Paid(account=self.id, cents=cents))

    @evolves(Opened)
    def _opened(self, event: Opened) -> None:
        pass

    @evolves(Paid)
    def _paid(self, event: Paid) -> None:
        self.total += event.cents


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=f"sqlite:///{tmp_path}/log.db")


async def test_what_is_no_event_is_named_and_reading_nothing_is_refused(settings: Settings) -> None:
    opened, many = Opened(account="a"), "one by one"
    async with tidings.connect(settings) as log:
        for wrong, says in (([opened], many), ((opened,), many), ({"account": "a"}, "'dict'"), ("Opened", "'str'")):
            with pytest.raises(ConfigurationError, match=says):
                await log.append("account-a", wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=r"Opened\(\.\.\.\)"):
            await log.append("account-a", Opened)  # type: ignore[arg-type]
        await log.append("account-a", opened)
        with pytest.raises(ConfigurationError, match=r"log\.recorded\('account-a'\)"):
            assert [entry async for entry in log.read("account-a")]


async def test_what_it_cannot_read_is_held_nowhere(settings: Settings) -> None:
    class Newer(Event, name="Opened", version=2, oldest=2):
        holder: str

    class Older(Event, name="Opened", version=3, oldest=3):
        holder: str

    async with tidings.connect(settings) as log:
        await log.append("account-a", Newer(holder="a"))
        for view in (Opened, Older):
            with pytest.raises(SchemaError, match="Deploy this program") as refused:
                assert [entry async for entry in log.read("account-a", view)]
            assert "is held" not in str(refused.value)


async def test_it_appends_reads_and_changes_and_makes_nothing_but_the_log(tmp_path: Path, settings: Settings) -> None:
    async with tidings.connect(settings) as log:
        done = await log.append("account-a", Opened(account="a"), expected=NO_STREAM, metadata={"actor": "ada"})
        assert done.version == 0
        with pytest.raises(WrongExpectedVersion):
            await log.append("account-a", Opened(account="a"), expected=NO_STREAM)
        with pytest.raises(ConfigurationError, match="reserved"):
            await log.append("tidings_x", Opened(account="a"))
        await log.append("account-a", Paid(account="a", cents=1), Paid(account="a", cents=2))
        read = [entry async for entry in log.read("account-a", Paid)]
        assert [(entry.version, entry.event) for entry in read] == [
            (1, Paid(account="a", cents=1)),
            (2, Paid(account="a", cents=2)),
        ]
        assert [event.type async for event in log.recorded("account-a", start=1, limit=1)] == ["Paid"]
        first = [event async for event in log.recorded("account-a", limit=1)]
        assert b'"actor":"ada"' in first[0].metadata
        assert b'"partitionKey":"a"' in first[0].metadata

        accounts = log.repository(Account)
        await accounts.create("b", Account.open)
        await accounts.change("b", Account.pay, 30)
        assert (await accounts.load("b")).total == 30
        with pytest.raises(StreamNotFound):
            await accounts.load("c")
    assert set(os.listdir(tmp_path)) <= {"log.db", "log.db-wal", "log.db-shm"}


async def test_a_view_that_does_not_fit_is_an_error(settings: Settings) -> None:
    class View(Event, name="Paid"):
        cents: str

    async with tidings.connect(settings) as log:
        await log.append("account-a", Paid(account="a", cents=1))
        with pytest.raises(SchemaError):
            _ = [entry async for entry in log.read("account-a", View)]


def test_a_log_that_is_not_entered_says_how_to_enter_it() -> None:
    with pytest.raises(AttributeError, match="write  with tidings"):
        tidings.connect().append  # noqa: B018


async def test_the_environment_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIDINGS_STORE", f"sqlite:///{tmp_path}/other.db")
    async with tidings.connect() as log:
        await log.append("account-a", Opened(account="a"))
    assert (tmp_path / "other.db").exists()


async def test_a_store_that_is_away_is_an_error_at_once(tmp_path: Path) -> None:
    settings = Settings(store=f"sqlite:///{tmp_path}/missing/log.db")
    with pytest.raises(StoreUnavailable):
        await tidings.connect(settings).__aenter__()
    with pytest.raises(StoreUnavailable):
        await asyncio.to_thread(tidings.connect(settings).__enter__)


def test_without_an_event_loop_and_from_many_threads(settings: Settings) -> None:
    with tidings.connect(settings) as log:
        log.append("account-a", Opened(account="a"), expected=NO_STREAM)
        with pytest.raises(WrongExpectedVersion):
            log.append("account-a", Opened(account="a"), expected=NO_STREAM)

        def pay(cents: int) -> None:
            log.append("account-a", Paid(account="a", cents=cents))

        threads = [threading.Thread(target=pay, args=(cents,)) for cents in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        paid = [entry.event for entry in log.read("account-a", Paid)]
        assert sorted(event.cents for event in paid if isinstance(event, Paid)) == list(range(20))
        changed = log.run(lambda log: log.repository(Account).change("a", Account.pay, 5))
        assert changed.aggregate.total == sum(range(20)) + 5
        assert "tidings-log" in {thread.name for thread in threading.enumerate()}
    assert "tidings-log" not in {thread.name for thread in threading.enumerate()}
    with pytest.raises(ConfigurationError, match="closed"):
        log.append("account-a", Opened(account="a"))


async def test_where_an_event_loop_runs_it_refuses_to_block_it(settings: Settings) -> None:
    with pytest.raises(ConfigurationError, match="async with"):
        tidings.connect(settings).__enter__()
    connecting = tidings.connect(settings)
    log = await asyncio.to_thread(connecting.__enter__)
    try:
        with pytest.raises(ConfigurationError, match="async with"):
            log.append("account-a", Opened(account="a"))
    finally:
        await asyncio.to_thread(connecting.__exit__, None, None, None)


def test_a_forked_process_is_told_to_open_its_own(settings: Settings) -> None:
    with tidings.connect(settings) as log:
        child = os.fork()
        if child == 0:
            try:
                log.append("account-a", Opened(account="a"))
            except ConfigurationError as error:
                os._exit(0 if "forked" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


async def test_an_append_over_several_streams_is_one_and_has_one_correlation(settings: Settings) -> None:
    async with tidings.connect(settings) as log:
        opened = await log.append("account-a", Opened(account="a"))
        done = await log.append_several(
            StreamAppend("account-a", [Paid(account="a", cents=-5), Paid(account="a", cents=-1)], opened.version),
            StreamAppend("account-b", [Paid(account="b", cents=6)]),
            StreamAppend("account-c", expected=NO_STREAM),
            metadata={"actor": "ada"},
        )
        assert (dict(done.versions), done.position) == ({"account-a": 2, "account-b": 0}, opened.position + 3)
        entries = [entry async for entry in log.read("account-a", Paid, start=1)]
        entries += [entry async for entry in log.read("account-b", Paid)]
        assert [entry.event.cents for entry in entries if isinstance(entry.event, Paid)] == [-5, -1, 6]
        assert len({entry.metadata["$correlationId"] for entry in entries}) == 1
        assert {entry.metadata["actor"] for entry in entries} == {"ada"}
        with pytest.raises(WrongExpectedVersion, match="account-a"):
            await log.append_several(
                StreamAppend("account-b", [Paid(account="b", cents=1)]), StreamAppend("account-a", expected=0)
            )
        assert len([event async for event in log.recorded("account-b")]) == 1


async def test_an_append_over_several_streams_refuses_what_append_refuses(settings: Settings) -> None:
    async with tidings.connect(settings) as log:
        with pytest.raises(ConfigurationError, match="reserved"):
            await log.append_several(StreamAppend("tidings_log", expected=0), StreamAppend("a", [Opened(account="a")]))
        with pytest.raises(ConfigurationError, match=r"Opened\(\.\.\.\)"):
            await log.append_several(StreamAppend("a", [Opened]))  # type: ignore[list-item]
        with pytest.raises(ConfigurationError, match="a StreamAppend for each stream"):
            await log.append_several([StreamAppend("a", [Opened(account="a")])])  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match=r"single event.*StreamAppend\('a', \[Opened"):
            await log.append_several(StreamAppend("a", Opened(account="a")))  # type: ignore[arg-type]
        with pytest.raises(InvalidAppend, match="named twice"):
            await log.append_several(
                StreamAppend("a", [Opened(account="a")]), StreamAppend("a", [Paid(account="a", cents=1)])
            )
        assert await log.store.head() == 1


async def test_events_that_can_be_read_only_once_come_into_their_own_stream(settings: Settings) -> None:
    async with tidings.connect(settings) as log:
        once = (Opened(account=name) for name in ("a", "b"))
        done = await log.append_several(
            StreamAppend("a", once),  # type: ignore[arg-type]
            StreamAppend("c", [Opened(account="c")]),
        )
        assert dict(done.versions) == {"a": 1, "c": 0}
        [other] = [entry.event async for entry in log.read("c", Opened)]
        assert other == Opened(account="c")


def test_an_append_over_several_streams_from_code_without_a_loop(settings: Settings) -> None:
    with tidings.connect(settings) as log:
        done = log.append_several(
            StreamAppend("a", [Opened(account="a")], NO_STREAM), StreamAppend("b", [Opened(account="b")], NO_STREAM)
        )
        assert dict(done.versions) == {"a": 0, "b": 0}
