"""An outage is told from a handler's failure by the object that raised the error, however it left the handler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import DBAPIError

from tidings._support.ownership import mark, related
from tidings.buses import Delivery, Subscription
from tidings.database.engine import Database, connected, open_database
from tidings.delivery.owned import Ours, OwnBus, OwnStore
from tidings.errors import BusUnavailable, DatabaseUnavailable, Fenced, StoreUnavailable, StreamForbidden
from tidings.stores import RecordedEvent

STORE, BUS, OTHER = object(), object(), object()


class _Dialect:
    pass


class _Engine:
    dialect = _Dialect()


class _Database:
    engine = _Engine()


DATABASE: Any = _Database()
OURS = Ours(STORE, BUS, DATABASE)


def marked(error: BaseException, owner: object) -> BaseException:
    mark(error, owner)
    return error


def own() -> list[BaseException]:
    return [
        marked(StoreUnavailable("away"), STORE),
        marked(BusUnavailable("away"), BUS),
        marked(DatabaseUnavailable("away"), DATABASE),
    ]


def foreign() -> list[BaseException]:
    return [
        StoreUnavailable("raised by a handler"),
        BusUnavailable("raised by a handler"),
        DatabaseUnavailable("raised by a handler"),
        Fenced("raised by a handler"),
        ConnectionRefusedError(),
        marked(StoreUnavailable("of another store"), OTHER),
        marked(BusUnavailable("of another bus"), OTHER),
        marked(DatabaseUnavailable("of another database"), OTHER),
        marked(StoreUnavailable("in another event loop", waiting_helps=False), STORE),
        marked(StreamForbidden("ledger-1", "to append to"), STORE),
        marked(StoreUnavailable("a store's error, by the bus"), BUS),
    ]


Wrapped = tuple[BaseException, bool]


def _raised(error: BaseException, before: BaseException, how: str) -> BaseException:
    """Return the error that leaves a handler which meets one error while it handles another."""
    try:
        try:
            raise before
        except BaseException as caught:
            if how == "from":
                raise error from caught
            if how == "from None":
                raise error from None
            raise error  # noqa: B904 - as handlers do
    except BaseException as caught:
        return caught


@st.composite
def wrapped(draw: st.DrawFn) -> Wrapped:
    """An error as a handler may raise it, and whether it contains an outage of the service's own parts."""
    kinds = [(error, True) for error in own()] + [(error, False) for error in foreign()]
    error, outage = draw(st.sampled_from(kinds))
    for how in draw(st.lists(st.sampled_from(("from", "context", "from None", "group", "other", "again")), max_size=4)):
        if how == "group":
            error = BaseExceptionGroup("several", [ValueError(), error, KeyError()])
        elif how == "other":
            error = BaseExceptionGroup("several", [Exception(), BaseExceptionGroup("inner", [error])])
        elif how == "again":
            error = _raised(error, error, "context")
        else:
            error = _raised(RuntimeError(how), error, how)
            outage = outage and how != "from None"
    return error, outage


@given(wrapped())
@settings(max_examples=300)
def test_an_outage_of_the_services_own_is_found_wherever_it_stands_and_nothing_else_is_one(case: Wrapped) -> None:
    error, outage = case
    found = OURS.outage(error)
    assert (found is not None) is outage
    if found is not None:
        assert isinstance(found, StoreUnavailable | BusUnavailable | DatabaseUnavailable)
        assert found in list(related(error))


def test_the_first_mark_stays() -> None:
    error = marked(marked(StoreUnavailable("away"), OTHER), STORE)
    assert OURS.outage(error) is None


def test_causes_that_go_in_a_circle_end() -> None:
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first
    assert len(list(related(first))) == 2


class Away:
    """A store that cannot be reached, or takes no writes."""

    def __init__(self) -> None:
        self.reads = False

    async def append(self, *_: object, **__: object) -> int:
        raise StoreUnavailable("full")

    set_metadata = delete = tombstone = append

    async def head(self) -> int:
        raise StoreUnavailable("away")

    log_id = head

    async def get_metadata(self, stream: str) -> None:
        raise StoreUnavailable("away")

    async def read_all(self, **_: object) -> AsyncIterator[RecordedEvent]:
        raise StoreUnavailable("away")
        yield

    async def read_stream(self, stream: str, **_: object) -> AsyncIterator[RecordedEvent]:
        raise StoreUnavailable("away")
        yield

    async def subscribe_stream(self, stream: str, **_: object) -> AsyncIterator[RecordedEvent]:
        raise StoreUnavailable("away")
        yield

    def fly(self) -> str:
        return "beyond the port"


@pytest.mark.parametrize(
    "call",
    [
        lambda store: store.append("a", []),
        lambda store: store.set_metadata("a", {}),
        lambda store: store.delete("a"),
        lambda store: store.tombstone("a"),
        lambda store: store.head(),
        lambda store: store.log_id(),
        lambda store: store.get_metadata("a"),
        lambda store: anext(store.read_all()),
        lambda store: anext(store.read_stream("a")),
        lambda store: anext(store.subscribe_stream("a")),
    ],
)
async def test_whatever_an_own_store_is_asked_its_errors_are_marked(call: Any) -> None:
    adapter: Any = Away()
    ours = Ours(OwnStore(adapter), BUS, DATABASE)
    with pytest.raises(StoreUnavailable) as caught:
        await call(OwnStore(adapter))
    assert ours.outage(caught.value) is caught.value
    assert OURS.outage(caught.value) is None, "it is another store to everybody else"
    in_a_thread = await asyncio.gather(
        asyncio.to_thread(lambda: asyncio.run(_awaited(call, OwnStore(adapter)))), return_exceptions=True
    )
    assert ours.outage(in_a_thread[0]) is not None  # type: ignore[arg-type]


async def _awaited(call: Any, store: OwnStore) -> None:
    await call(store)


async def test_an_own_store_learns_from_appends_whether_it_takes_writes() -> None:
    adapter: Any = Away()
    store = OwnStore(adapter)
    with pytest.raises(StoreUnavailable):
        await store.append("a", [])
    assert store.writes.error == "full"
    assert store.writes.failing_since is not None
    with pytest.raises(StoreUnavailable):
        await store.head()
    assert OwnStore.of(store) is store, "who shares it knows the same"

    async def works(*_: object, **__: object) -> int:
        return 1

    adapter.append = works
    await store.append("a", [])
    assert store.writes.error is None
    assert store.writes.failing_since is None


async def test_an_error_within_the_block_of_an_own_publisher_is_not_the_buss(tmp_path: Path) -> None:
    class Bus:
        @asynccontextmanager
        async def publisher(self, *, lock: str | None = None) -> AsyncIterator[Any]:
            if lock == "taken":
                raise BusUnavailable("cannot enter")
            yield self

        async def send(self, message: object) -> None:
            raise BusUnavailable("cannot send")

    adapter: Any = Bus()
    bus, ours = OwnBus(adapter), Ours(STORE, adapter, DATABASE)
    for lock, sends, outage in (("taken", False, True), (None, True, True), (None, False, False)):

        async def publish(lock: str | None = lock, sends: bool = sends) -> None:
            async with bus.publisher(lock=lock) as publisher:
                if sends:
                    await publisher.send(None)  # type: ignore[arg-type]
                raise BusUnavailable("from elsewhere")

        with pytest.raises(BusUnavailable) as caught:
            await publish()
        assert (ours.outage(caught.value) is not None) is outage


class _AwayAfterOne:
    """A bus that is away: at once, or after one delivery."""

    def __init__(self, *, at_once: bool = False) -> None:
        self._at_once = at_once
        self.settled: list[int] = []

    @asynccontextmanager
    async def publisher(self, *, lock: str | None = None) -> AsyncIterator[Any]:
        yield self

    @asynccontextmanager
    async def consume(self, subscription: Subscription, *, prefetch: int = 1000) -> AsyncIterator[Any]:
        if self._at_once:
            raise BusUnavailable("cannot enter")
        yield self

    async def begin(self, message: object) -> asyncio.Future[Any]:
        if self._at_once:
            raise BusUnavailable("cannot send")
        confirm: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        confirm.set_exception(BusUnavailable("no confirm"))
        return confirm

    def settle_through(self, tag: int) -> None:
        self.settled.append(tag)

    async def __aiter__(self) -> AsyncIterator[Any]:
        yield Delivery(7, None)  # type: ignore[arg-type]
        raise BusUnavailable("cut off")


async def _begin(bus: OwnBus) -> None:
    async with bus.publisher() as publisher:
        await (await publisher.begin(None))  # type: ignore[arg-type]


async def _consume(bus: OwnBus) -> None:
    async with bus.consume(Subscription("audit")) as consumer:
        async for delivery in consumer:
            consumer.settle_through(delivery.tag)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("use", [_begin, _consume])
async def test_an_own_bus_marks_what_it_raises_however_a_handler_uses_it(use: Any, at_once: bool) -> None:
    adapter: Any = _AwayAfterOne(at_once=at_once)
    with pytest.raises(BusUnavailable) as caught:
        await use(OwnBus(adapter))
    assert Ours(STORE, adapter, DATABASE).outage(caught.value) is caught.value
    assert OURS.outage(caught.value) is None, "it is another bus to everybody else"
    assert adapter.settled == ([7] if use is _consume and not at_once else [])


async def test_a_confirm_through_an_own_bus_ends_as_the_brokers_does() -> None:
    confirms: list[asyncio.Future[Any]] = []

    class Bus(_AwayAfterOne):
        async def begin(self, message: object) -> asyncio.Future[Any]:
            confirms.append(asyncio.get_running_loop().create_future())
            return confirms[-1]

    bus: Any = Bus()
    async with OwnBus(bus).publisher() as publisher:
        done, lost, left = [await publisher.begin(None) for _ in range(3)]  # type: ignore[arg-type]
        confirms[0].set_result(5)
        confirms[1].cancel()
        left.cancel()
        confirms[2].set_exception(BusUnavailable("nobody waits for it"))
        assert await done == 5
        with pytest.raises(asyncio.CancelledError):
            await lost


async def test_a_services_database_is_told_from_another_services(tmp_path: Path) -> None:
    async with AsyncDatabases(tmp_path) as (one, other):
        mine, theirs = Ours(STORE, BUS, one), Ours(STORE, BUS, other)
        error = await _locked(one, tmp_path / "one.db")
        assert mine.outage(error) is error
        assert theirs.outage(error) is None
        assert isinstance(error, DatabaseUnavailable)
        assert isinstance(error.__cause__, DBAPIError)
        assert mine.outage(error.__cause__) is error.__cause__
        assert theirs.outage(error.__cause__) is None
        assert mine.waits_for_itself(RuntimeError()) is False
        assert mine.waits_for_itself(_raised(RuntimeError(), error, "from"))
        assert not theirs.waits_for_itself(_raised(RuntimeError(), error, "from"))
        assert one.writes.error is not None
        assert other.writes.error is None


class AsyncDatabases:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def __aenter__(self) -> tuple[Database, Database]:
        self._opened = [open_database(f"sqlite:///{self._folder}/{name}.db") for name in ("one", "other")]
        one, other = [await each.__aenter__() for each in self._opened]
        return one, other

    async def __aexit__(self, *_: object) -> None:
        for each in self._opened:
            await each.__aexit__(None, None, None)


async def _locked(database: Database, path: Path) -> BaseException:
    async with connected(f"sqlite:///{path}") as rival, rival.transaction() as connection:
        await connection.execute(sa.text("CREATE TABLE x (y INTEGER)"))
        try:
            async with database.transaction():
                pass
        except DatabaseUnavailable as error:
            return error
    raise AssertionError("the database was not locked")
