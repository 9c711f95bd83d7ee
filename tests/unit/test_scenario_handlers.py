"""Given, when, then for handlers: one attempt by the production code, on a log and a database in memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast
from uuid import uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tidings import Aggregate, Context, Event, RecordedEvent, Retry, Service, evolves
from tidings.errors import AttemptEnded, ConfigurationError, HandlerTimeout, SchemaError, TransactionMisuse
from tidings.stores import EventData
from tidings.testing import Emitted, RecordingContext, given
from tidings.testing.scenario import stage
from tidings.testing.world import threads
from tidings.testing.world.blocking import Blocked

pytest_plugins = ["pytester"]


class Base(DeclarativeBase): ...


class Shelf(Base):
    __tablename__ = "shelf"
    sku: Mapped[str] = mapped_column(primary_key=True)
    pieces: Mapped[int] = mapped_column(default=0)


class Received(Event, key="sku"):
    sku: str
    pieces: int


class Wanted(Event, key="order"):
    order: str
    sku: str


class Taken(Event, key="order"):
    order: str
    sku: str


class Noted(Event, key="order"):
    order: str


class Unread(Event):
    text: str = ""


class Order(Aggregate, category="goods_order"):
    def __init__(self) -> None:
        self.noted = 0

    def note(self) -> None:
        self.record(Noted(order=self.id))

    @evolves(Wanted)
    def _wanted(self, event: Wanted) -> None: ...

    @evolves(Noted)
    def _noted(self, event: Noted) -> None:
        self.noted += 1


class Gateway:
    def __init__(self, name: str = "real") -> None:
        self.name = name


opened: list[str] = []


@asynccontextmanager
async def resources(service: Service) -> AsyncIterator[Gateway]:
    opened.append("opened")
    yield Gateway()
    opened.append("closed")


goods = Service("goods", tables=Base.metadata)
orders = goods.repository(Order)
calls = Service("calls", lifespan=resources)
chain = Service("chain", tables=Base.metadata)
heard: list[object] = []


class NoneLeft(Exception): ...


@goods.on(Received)
async def receive(event: Received, session: AsyncSession) -> None:
    shelf = await session.get(Shelf, event.sku)
    if shelf is None:
        session.add(Shelf(sku=event.sku, pieces=event.pieces))
    else:
        shelf.pieces += event.pieces


@goods.on(Wanted, retry=Retry(permanent=(NoneLeft,)))
async def take(event: Wanted, context: Context, connection: AsyncConnection) -> None:
    found = await connection.execute(sa.update(Shelf).where(Shelf.sku == event.sku).values(pieces=Shelf.pieces - 1))
    context.emit(f"goods-{event.order}", Taken(order=event.order, sku=event.sku), metadata={"actor": "shelf"})
    if not found.rowcount:
        raise NoneLeft(event.sku)


@goods.on(Taken)
async def note(event: Taken, context: Context) -> None:
    context.emit(f"late-{event.order}", Unread(text=str(context.metadata.get("actor"))))
    await context.change(orders, event.order, Order.note)


@calls.on(Wanted)
async def call(event: Wanted, context: Context, gateway: Gateway) -> None:
    heard.append((gateway.name, context.attempt, context.replayed))


@calls.on(Taken)
def in_a_thread(event: Taken, context: Context) -> None:
    context.emit("threads", Unread(text=event.order))


@calls.on(Noted, timeout=0.01)
async def too_slow(event: Noted) -> None:
    await asyncio.sleep(60)


@calls.on_any()
async def see(event: RecordedEvent) -> None:
    heard.append((event.stream, event.type))


@chain.on(Received)
async def first(event: Received, context: Context, connection: AsyncConnection) -> None:
    await connection.execute(sa.insert(Shelf).values(sku=event.sku, pieces=event.pieces))
    if event.pieces > 1:
        context.emit("chain", Received(sku=f"{event.sku}+", pieces=event.pieces - 1))


@chain.on(Wanted)
async def commit(event: Wanted, connection: AsyncConnection) -> None:
    await connection.commit()


@chain.on(Taken)
async def add_twice(event: Taken, session: AsyncSession) -> None:
    session.add_all([Shelf(sku="a"), Shelf(sku=event.sku)])


@chain.on(Unread)
async def quiet(event: Unread) -> None: ...


CUP = Received(sku="cup", pieces=3)
WANTED = Wanted(order="7", sku="cup")
TAKEN = Taken(order="7", sku="cup")


@pytest.fixture(autouse=True)
def _forget() -> None:
    opened.clear()
    heard.clear()


# ---- what is given, what is emitted, what is left ---------------------------------------


def test_in_a_test_without_a_loop_the_first_check_runs_the_handler() -> None:
    given(CUP).handling(take, WANTED).emits(("goods-7", TAKEN)).leaves(Shelf, {"sku": "cup", "pieces": 2})


async def test_in_an_async_test_the_checks_are_awaited() -> None:
    handled = await given(CUP).handling(take, WANTED).emits(TAKEN).leaves(Shelf, {"sku": "cup", "pieces": 2})
    (emitted,) = handled.emitted
    assert isinstance(emitted, Emitted)
    assert emitted == Emitted("goods-7", TAKEN, {"actor": "shelf"})
    assert handled.rows(Shelf) == handled.rows(Shelf.__table__) == [{"sku": "cup", "pieces": 2}]


async def test_a_block_gives_a_session_on_the_services_database() -> None:
    async with given(CUP).handling(take, WANTED) as handled:
        handled.emits(TAKEN)
        shelf = await handled.session.get(Shelf, "cup")
        assert shelf is not None
        assert shelf.pieces == 2
    with pytest.raises(ConfigurationError, match="only within 'async with"):
        _ = handled.session


async def test_a_changed_aggregate_has_appended_before_what_is_emitted() -> None:
    given_so = given(("goods_order-7", WANTED), sa.insert(Shelf).values(sku="cup", pieces=1))
    handled = await given_so.handling(note, TAKEN, metadata={"actor": "me"}).emits(
        ("goods_order-7", Noted(order="7")), ("late-7", Unread(text="me"))
    )
    assert handled.error is None


def test_an_event_is_by_default_in_the_stream_of_the_aggregate_that_evolves_it() -> None:
    # The given event is handled, too; so it needs something on the shelf.
    given(CUP, WANTED).handling(note, TAKEN).emits(Noted(order="7"), Unread(text="None"))


async def test_a_given_event_is_handled_before_the_next_one_is_in_the_log() -> None:
    noted = ("goods_order-7", Noted(order="7"))
    async with given(CUP, WANTED, noted).handling(receive, CUP).nothing():
        writers = [entry.metadata.get("tidingsHandler") async for entry in orders.history("7")]
    assert writers == [None, "goods.note", None]


def test_given_events_are_handled_and_so_is_what_comes_of_them() -> None:
    rows = [{"sku": "a" + "+" * n, "pieces": 3 - n} for n in range(3)]
    given(Received(sku="a", pieces=3)).handling(quiet, Unread()).nothing().leaves(Shelf, *rows)


def test_only_the_named_handler_handles_the_event() -> None:
    given().handling(see, Wanted(order="1", sku="a")).nothing()
    assert heard == [("goods_order-1", "Wanted")]


def test_a_failing_given_event_is_named() -> None:
    with pytest.raises(NoneLeft) as raised:
        given(WANTED).handling(receive, CUP).nothing()
    assert raised.value.__notes__ == ["handler 'take' raised this for Wanted, which is given"]


def test_an_event_may_be_as_a_log_holds_it() -> None:
    raw = EventData("Wanted", b'{"order":"7","sku":"cup","colour":"red"}', b'{"schemaVersion":1,"partitionKey":"7"}')
    given(CUP).handling(take, ("any-1", raw)).emits(TAKEN)


# ---- how it is run ---------------------------------------------------------------------


def test_a_failure_is_compared_and_its_effects_are_undone() -> None:
    handled = given(Received(sku="jar", pieces=1)).handling(take, WANTED).raises(NoneLeft, match="^cup$")
    assert handled.emitted == []
    assert isinstance(handled.error, NoneLeft)
    handled.leaves(Shelf, {"sku": "jar", "pieces": 1})


@pytest.mark.parametrize(
    "check",
    [
        lambda handling: handling.nothing(),
        lambda handling: handling.emits(TAKEN),
        lambda handling: handling.leaves(Shelf),
        lambda handling: handling.raises(ValueError),
    ],
)
def test_an_exception_that_nobody_expects_passes_through_with_its_own_traceback(check: Callable[[Any], Any]) -> None:
    with pytest.raises(NoneLeft) as raised:
        check(given().handling(take, WANTED))
    assert raised.traceback[-1].name == "take"
    assert not any(str(entry.path).endswith("attempt.py") for entry in raised.traceback)


async def test_a_block_passes_on_what_the_test_did_not_look_at() -> None:
    with pytest.raises(NoneLeft):
        async with given().handling(take, WANTED):
            pass
    with pytest.raises(NoneLeft):
        async with given().handling(take, WANTED) as handled:
            assert (handled.rows(Shelf), handled.emitted) == ([], [])
    with pytest.raises(NoneLeft):
        await given().handling(take, WANTED).leaves(Shelf)
    await given().handling(take, WANTED).raises(NoneLeft).leaves(Shelf)
    with pytest.raises(NoneLeft):
        await given().handling(take, WANTED)
    async with given().handling(take, WANTED) as handled:
        handled.raises(NoneLeft)
    async with given().handling(take, WANTED) as handled:
        assert isinstance(handled.error, NoneLeft)


def test_resources_come_from_the_lifespan_unless_the_test_replaces_them() -> None:
    given().handling(call, WANTED).nothing()
    assert (heard, opened) == ([("real", 1, False)], ["opened", "closed"])
    heard.clear()
    opened.clear()
    fake = {Gateway: Gateway("fake")}
    given().handling(call, WANTED, resources=fake, attempt=3, replayed=True).nothing()
    assert (heard, opened) == ([("fake", 3, True)], [])


def test_a_plain_function_runs_in_its_thread() -> None:
    given().handling(in_a_thread, TAKEN).emits(("threads", Unread(text="7")))


def test_a_handler_has_its_timeout() -> None:
    given().handling(too_slow, Noted(order="7")).raises(HandlerTimeout)


def test_an_event_that_does_not_fit_fails_as_in_production() -> None:
    given().handling(take, EventData("Wanted", b"{}")).raises(SchemaError, match="order: Field required")


def test_a_handler_that_ends_its_transaction_fails() -> None:
    given().handling(commit, WANTED).raises(TransactionMisuse)
    given().handling(add_twice, Taken(order="1", sku="a")).raises(sa.exc.IntegrityError).leaves(Shelf)


async def test_the_context_ends_with_the_attempt() -> None:
    handled = await given(CUP).handling(take, WANTED)
    with pytest.raises(AttemptEnded):
        handled.context.emit("late", TAKEN)


# ---- what a test reads when something differs --------------------------------------------


def text_of(check: Callable[[], object]) -> str:
    with pytest.raises(AssertionError) as failed:
        check()
    return str(failed.value)


def test_the_stream_and_each_field_are_named() -> None:
    text = text_of(
        lambda: given(CUP).handling(take, WANTED).emits(("goods-8", Taken(order="8", sku="cup")), Noted(order="1"))
    )
    assert text == (
        "take emitted 1 event, and 2 events were expected:\n"
        "  1. Taken differs:\n"
        "     stream: expected 'goods-8', was 'goods-7'\n"
        "     order: expected '8', was '7'\n"
        "  2. missing: Noted(order='1')"
    )


def test_an_event_in_another_stream_differs() -> None:
    text = text_of(lambda: given(CUP).handling(take, WANTED).emits(("goods-8", TAKEN)))
    assert text.splitlines()[1:] == ["  1. Taken differs:", "     stream: expected 'goods-8', was 'goods-7'"]


def test_each_row_and_column_is_named() -> None:
    begun = given(CUP, Received(sku="jar", pieces=1)).handling(take, WANTED)
    text = text_of(lambda: begun.leaves(Shelf, {"sku": "cup", "pieces": 3}, {"sku": "mug", "pieces": 1}))
    assert text == (
        "table shelf holds other rows than expected:\n"
        "  row {'sku': 'cup'} differs:\n"
        "     pieces: expected 3, was 2\n"
        "  missing: {'sku': 'mug', 'pieces': 1}\n"
        "  not expected: {'sku': 'jar', 'pieces': 1}"
    )


def test_a_missing_failure_says_what_was_emitted() -> None:
    text = text_of(lambda: given(CUP).handling(take, WANTED).raises(NoneLeft))
    assert text == "take raised nothing, and emitted Taken(order='7', sku='cup'); NoneLeft was expected"


def homeless(event: Wanted) -> None: ...


@pytest.mark.parametrize(
    ("begin", "says"),
    [
        (lambda: given().handling(homeless, WANTED), "no service in an imported module declares it"),
        (lambda: given(service=chain).handling(take, WANTED), "it is no handler of service 'chain'"),
        (lambda: given().handling(take, cast("Any", Wanted)), "Wanted is a class: give an event"),
        (lambda: given(CUP, sa.select(Shelf)).when(Order.note), "an aggregate has no tables"),
        (lambda: given().handling(take, WANTED).raises(NoneLeft).rows(sa.Table("x", sa.MetaData())), "is none of"),
    ],
)
def test_a_mistake_in_a_test_is_named(begin: Callable[[], object], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        begin()


async def test_a_service_that_runs_is_not_taken_over() -> None:
    with goods.claimed(), pytest.raises(ConfigurationError, match="runs already"):
        await given().handling(take, WANTED)


async def test_what_has_not_run_has_nothing_to_show() -> None:
    handling = given(CUP).handling(take, WANTED).emits(TAKEN)
    with pytest.raises(ConfigurationError, match="has not run yet"):
        _ = handling.emitted
    await handling
    with pytest.raises(ConfigurationError, match="has run: begin again"):
        await handling


def test_a_test_that_never_runs_the_handler_fails(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import asyncio
        from tests.unit.test_scenario_handlers import CUP, TAKEN, WANTED, take
        from tidings.testing import given

        def test_forgotten():
            given(CUP).handling(take, WANTED)

        def test_not_awaited():
            async def run():
                given(CUP).handling(take, WANTED).emits(TAKEN)
            asyncio.run(run())

        def test_run():
            given(CUP).handling(take, WANTED).emits(TAKEN)
        """
    )
    done = pytester.runpytest("-p", "no:cacheprovider", "-p", "no:asyncio")
    done.assert_outcomes(failed=2, passed=1)
    done.stdout.fnmatch_lines(["handler 'take' was never run: 'await given(...)*"])


# ---- calling a handler directly ----------------------------------------------------------


async def test_a_context_for_calling_a_handler_keeps_what_it_emits_as_events() -> None:
    class Connection:
        rowcount = 1

        async def execute(self, statement: object) -> Connection:
            return self

    context = RecordingContext(WANTED, metadata={"actor": "me"}, attempt=2)
    await take(WANTED, context, Connection())  # type: ignore[arg-type]
    assert context.emitted == [Emitted("goods-7", TAKEN, {"actor": "shelf"})]
    assert context.events == [TAKEN]
    assert (context.stream, context.attempt, context.metadata["actor"]) == ("goods_order-7", 2, "me")
    with pytest.raises(ConfigurationError, match="reserved"):
        context.emit("$all", TAKEN)


# ---- slips -----------------------------------------------------------------------------


def test_a_handler_is_given_only_events_that_it_declares() -> None:
    with pytest.raises(ConfigurationError, match="take handles Wanted, not Taken"):
        given().handling(take, TAKEN)
    with pytest.raises(ConfigurationError, match="take handles Wanted, not Unheard"):
        given().handling(take, EventData(type="Unheard", data=b"{}", metadata=b"{}", id=uuid4()))
    given().handling(see, TAKEN).nothing()  # it is declared for any


def test_a_resource_that_no_handler_asks_for_is_refused() -> None:
    class Other(Gateway): ...

    with pytest.raises(ConfigurationError, match=r"no handler of calls asks for it.*Gateway \(by calls\.call\)"):
        given().handling(call, WANTED, resources={Other: Other("other")})
    with pytest.raises(ConfigurationError, match="Gateway is a class"):
        given().handling(call, WANTED, resources={Gateway: Gateway})


def test_in_a_test_without_a_loop_a_look_runs_the_handler_too() -> None:
    assert given(CUP).handling(take, WANTED).rows(Shelf) == [{"sku": "cup", "pieces": 2}]
    assert [each.event for each in given(CUP).handling(take, WANTED).emitted] == [TAKEN]
    assert given(CUP).handling(take, WANTED, attempt=2).context.attempt == 2
    assert isinstance(given().handling(take, WANTED).error, NoneLeft)
    with pytest.raises(NoneLeft):
        given().handling(take, WANTED).rows(Shelf)


# ---- what never ends -------------------------------------------------------------------


def test_a_plain_handler_that_never_returns_is_named_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "OVER", 0.3)
    service, release = Service("stuck"), threading.Event()

    @service.on(Wanted, timeout=0.2)
    def stuck(event: Wanted) -> None:
        release.wait()

    with pytest.raises(Blocked, match=r"handler 'stuck' of service stuck .* stands in .*stuck \(.*, line \d+\), in"):
        given(service=service).handling(stuck, WANTED).nothing()
    release.set()


def test_a_lifespan_that_waits_for_ever_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "LIFESPAN", 0.2)

    @asynccontextmanager
    async def waits(service: Service) -> AsyncIterator[Gateway]:
        await asyncio.Event().wait()
        yield Gateway()

    service = Service("waiting", lifespan=waits)

    @service.on(Wanted)
    async def call_late(event: Wanted, gateway: Gateway) -> None: ...

    with pytest.raises(ConfigurationError, match=r"the lifespan of service 'waiting' has not begun after 0\.2 s"):
        given(service=service).handling(call_late, WANTED).nothing()
    given(service=service).handling(call_late, WANTED, resources={Gateway: Gateway()}).nothing()
