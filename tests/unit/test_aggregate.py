"""Aggregates: what evolves them, and what is refused when they are declared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar
from uuid import uuid4

import pytest

from tidings import open_store
from tidings.errors import ConfigurationError, InvalidStreamName, UnknownEventType, WrongExpectedVersion
from tidings.modelling.aggregate import Aggregate, evolves, state_of, stream_version
from tidings.modelling.events import Event
from tidings.modelling.repository import Repository


class Opened(Event):
    owner: str


class Closed(Event):
    pass


class Account(Aggregate, category="account"):
    def __init__(self) -> None:
        self.log: list[str] = []

    @evolves(Opened)
    def _opened(self, event: Opened) -> None:
        self.log.append(f"opened by {event.owner}")

    @evolves(Closed)
    def _closed(self, event: Closed) -> None:
        self.log.append("closed")


def test_a_recorded_event_evolves_the_state_at_once_and_waits_to_be_appended() -> None:
    account: Account = Account.empty("1")
    account.record(Opened(owner="ann"))
    account.record(Closed())
    assert account.log == ["opened by ann", "closed"]
    assert account.recorded == [Opened(owner="ann"), Closed()]
    assert (account.id, account.version, Account.stream_of("1")) == ("1", -1, "account-1")


def test_empty_aggregates_share_nothing() -> None:
    one, two = Account.empty("1"), Account.empty("2")
    one.record(Closed())
    assert (two.log, two.recorded) == ([], [])


def test_an_event_that_nothing_evolves_is_refused_by_name_and_not_recorded() -> None:
    class Unknown(Event):
        pass

    account = Account.empty("1")
    with pytest.raises(UnknownEventType, match=r"Account has no @evolves\(Unknown\); it knows Opened, Closed"):
        account.record(Unknown())
    assert account.recorded == []


def test_a_subclass_inherits_adds_and_replaces_evolutions_without_touching_its_parent() -> None:
    class Frozen(Event):
        pass

    class Special(Account, category="special"):
        @evolves(Frozen)
        def _frozen(self, event: Frozen) -> None:
            self.log.append("frozen")

        @evolves(Closed)
        def _closed_specially(self, event: Closed) -> None:
            self.log.append("closed specially")

    special = Special.empty("1")
    for event in (Opened(owner="ann"), Frozen(), Closed()):
        special.record(event)
    assert special.log == ["opened by ann", "frozen", "closed specially"]
    assert set(Account.evolutions) == {Opened, Closed}


def test_overriding_the_method_replaces_it_as_anywhere_in_python() -> None:
    class Quiet(Account, category="quiet"):
        def _closed(self, event: Closed) -> None:
            self.log.append("hush")

    quiet = Quiet.empty("1")
    quiet.record(Closed())
    assert quiet.log == ["hush"]


def test_evolutions_of_all_bases_are_inherited() -> None:
    class Closing(Aggregate):
        @evolves(Closed)
        def _closed(self, event: Closed) -> None:
            self.closed = True

    class Opening(Aggregate):
        @evolves(Opened)
        def _opened(self, event: Opened) -> None:
            self.owner = event.owner

    class Both(Opening, Closing):
        pass

    both = Both.empty("1")
    both.record(Opened(owner="ann"))
    both.record(Closed())
    assert (both.owner, both.closed) == ("ann", True)


def test_the_category_is_the_class_name_in_lower_case_unless_given() -> None:
    class Basket(Aggregate):
        pass

    assert (Basket.category, Account.category) == ("basket", "account")


@pytest.mark.parametrize("category", ["$x", "tidings_x", "a-b"])
def test_categories_that_streams_cannot_begin_with_are_refused(category: str) -> None:
    with pytest.raises(ConfigurationError, match="category"):
        type("Bad", (Aggregate,), {}, category=category)


def test_an_empty_category_or_id_is_refused() -> None:
    with pytest.raises(InvalidStreamName):
        type("Bad", (Aggregate,), {}, category="")
    with pytest.raises(ConfigurationError, match="empty id"):
        Account.empty("")


def test_two_methods_for_one_event_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="two methods evolve Closed"):

        class Bad(Aggregate):
            @evolves(Closed)
            def one(self, event: Closed) -> None: ...

            @evolves(Closed)
            def two(self, event: Closed) -> None: ...


@pytest.mark.parametrize("wrong", [(), (int,), (test_empty_aggregates_share_nothing,)], ids=["none", "int", "bare"])
def test_evolves_takes_event_classes_and_cannot_be_used_bare(wrong: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigurationError, match=r"@evolves\(OrderCreated\)"):
        evolves(*wrong)


# ---- names -------------------------------------------------------------------------


class Published(Event):
    number: int


class Document(Aggregate, category="document"):
    """An aggregate may have attributes `version`, `id`, `category` and methods `record` and `apply` of its own."""

    category = "novels"
    evolutions: ClassVar[list[str]] = []  # type: ignore[assignment]

    def __init__(self) -> None:
        self.version = 0
        self.id = "ISBN"
        self.recorded: Any = "on tape"

    def apply(self, discount: int) -> int:  # type: ignore[override]
        raise AssertionError("this is not for events")

    @classmethod
    def empty(cls) -> Document:  # type: ignore[override]
        raise AssertionError("this makes no aggregate")

    @classmethod
    def stream_of(cls) -> str:  # type: ignore[override]
        raise AssertionError("this names no stream")

    def publish(self) -> None:
        self.record(Published(number=self.version + 1))

    @evolves(Published)
    def _published(self, event: Published) -> None:
        self.version = event.number


async def test_an_aggregate_may_have_attributes_with_the_names_that_tidings_uses() -> None:
    async with open_store(f"memory://{uuid4().hex}") as store:
        documents = Repository(Document, lambda: store)
        done = await documents.create("1", Document.publish)
        assert (done.version, done.events) == (0, (Published(number=1),))
        for number in (2, 3, 4):
            done = await documents.change("1", Document.publish)
            assert (done.version, done.events) == (number - 1, (Published(number=number),))
        loaded = await documents.load("1")
        assert (loaded.version, loaded.id, loaded.recorded, loaded.category) == (4, "ISBN", "on tape", "novels")
        assert (stream_version(loaded), state_of(loaded).id, state_of(loaded).recorded) == (3, "1", [])
        assert [event.stream async for event in store.read_stream("document-1")] == ["document-1"] * 4
        assert (await documents.change("1", Document.publish, expected=3)).version == 4
        with pytest.raises(WrongExpectedVersion):
            await documents.change("1", Document.publish, expected=3)


def test_the_one_name_that_tidings_keeps_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the name __tidings__ belongs to Tidings"):

        class Taken(Aggregate):
            __tidings__ = "mine"  # type: ignore[assignment]


def test_the_id_is_known_to_the_state_before_the_first_event() -> None:
    class Named(Aggregate):
        def __init__(self) -> None:
            self.title = f"order {self.id} at {self.version}"

    assert Named.empty("7").title == "order 7 at -1"


def test_an_aggregate_that_was_made_without_an_id_says_how_to_make_one() -> None:
    with pytest.raises(ConfigurationError, match=r"make it with Account\.empty\(id\)"):
        Account().record(Closed())


def test_an_aggregate_may_be_a_dataclass() -> None:
    @dataclass(slots=True, weakref_slot=False)
    class Basket(Aggregate, category="shopping"):
        version: int = 0
        items: list[str] = field(default_factory=list)

        @evolves(Closed)
        def _closed(self, event: Closed) -> None:
            self.items.append("closed")

    basket = Basket.empty("1")
    basket.record(Closed())
    assert (basket.items, basket.version, stream_version(basket)) == (["closed"], 0, -1)
    assert Basket.stream_of("1") == "shopping-1"
