"""Repositories over the embedded store: creating, changing, loading, history, and changes that happen once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4, uuid5

import pytest

from tidings.adapters import open_store
from tidings.errors import (
    ConfigurationError,
    Contention,
    StreamNotFound,
    StreamTruncated,
    UnknownEventType,
    VersionNotFound,
    WrongExpectedVersion,
)
from tidings.modelling.aggregate import Aggregate, evolves
from tidings.modelling.codec import Cause, encode
from tidings.modelling.context import Context
from tidings.modelling.events import Event
from tidings.modelling.repository import Repository
from tidings.stores import ANY, NO_STREAM, Appended, EventData, EventStore, Expected, RecordedEvent

pytestmark = pytest.mark.lower_bounds


class Opened(Event):
    owner: str


class Deposited(Event):
    amount: int


class TooPoor(Exception):
    pass


class Account(Aggregate, category="account"):
    def __init__(self) -> None:
        self.owner = ""
        self.balance = 0

    def open(self, owner: str) -> None:
        self.record(Opened(owner=owner))

    def deposit(self, *amounts: int) -> int:
        for amount in amounts:
            if self.balance + amount < 0:
                raise TooPoor
            self.record(Deposited(amount=amount))
        return self.balance

    def look(self) -> str:
        return self.owner

    @evolves(Opened)
    def _opened(self, event: Opened) -> None:
        self.owner = event.owner

    @evolves(Deposited)
    def _deposited(self, event: Deposited) -> None:
        self.balance += event.amount


@pytest.fixture
async def store() -> AsyncIterator[EventStore]:
    async with open_store(f"memory://{uuid4()}") as store:
        yield store


@pytest.fixture
def accounts(store: EventStore) -> Repository[Account]:
    return Repository(Account, lambda: store)


async def stream(store: EventStore, name: str = "account-1") -> list[RecordedEvent]:
    return [event async for event in store.read_stream(name)]


# ---- create and change ---------------------------------------------------------------


async def test_created_then_changed_is_loaded_as_decided(accounts: Repository[Account]) -> None:
    created = await accounts.create("1", Account.open, "ann")
    changed = await accounts.change("1", Account.deposit, 5, 7)
    assert (created.version, created.events, created.result) == (0, (Opened(owner="ann"),), None)
    assert (changed.version, changed.events, changed.result) == (2, (Deposited(amount=5), Deposited(amount=7)), 12)
    assert changed.position > created.position > 0
    assert changed.aggregate.recorded == []
    account = await accounts.load("1")
    assert (account.id, account.version, account.owner, account.balance) == ("1", 2, "ann", 12)


async def test_creating_twice_is_a_wrong_expected_version(accounts: Repository[Account]) -> None:
    await accounts.create("1", Account.open, "ann")
    with pytest.raises(WrongExpectedVersion, match="account-1"):
        await accounts.create("1", Account.open, "bob")
    assert (await accounts.load("1")).owner == "ann"


async def test_creating_nothing_is_refused(accounts: Repository[Account]) -> None:
    with pytest.raises(ConfigurationError, match=r"Account\.look recorded nothing"):
        await accounts.create("1", Account.look)


async def test_changing_what_was_never_created_is_stream_not_found(accounts: Repository[Account]) -> None:
    with pytest.raises(StreamNotFound, match="account-1"):
        await accounts.change("1", Account.deposit, 5)
    with pytest.raises(StreamNotFound):
        await accounts.load("1")
    with pytest.raises(StreamNotFound):
        _ = [entry async for entry in accounts.history("1")]


async def test_a_change_with_expected_needs_that_version(accounts: Repository[Account], store: EventStore) -> None:
    await accounts.create("1", Account.open, "ann")
    done = await accounts.change("1", Account.deposit, 5, expected=0)
    assert done.version == 1
    for stale in (0, 2):
        with pytest.raises(WrongExpectedVersion, match=f"expected version {stale}, but its last version is 1"):
            await accounts.change("1", Account.deposit, 5, expected=stale)
    assert len(await stream(store)) == 2


async def test_a_decision_that_raises_or_records_nothing_appends_nothing(
    accounts: Repository[Account], store: EventStore
) -> None:
    await accounts.create("1", Account.open, "ann")
    with pytest.raises(TooPoor):
        await accounts.change("1", Account.deposit, 5, -6)
    looked = await accounts.change("1", Account.look)
    assert (looked.result, looked.events, looked.version, looked.position) == ("ann", (), 0, -1)
    assert len(await stream(store)) == 1


async def test_conflicting_changes_all_take_effect(accounts: Repository[Account]) -> None:
    await accounts.create("1", Account.open, "ann")
    done = await asyncio.gather(*(accounts.change("1", Account.deposit, 1) for _ in range(20)))
    account = await accounts.load("1")
    assert (account.balance, account.version) == (20, 20)
    assert sorted(one.result for one in done) == list(range(1, 21)), "each decision saw the one before it"


@pytest.mark.parametrize("number", [50, 300])
async def test_many_changes_at_once_queue_and_no_decision_is_taken_twice(
    accounts: Repository[Account], number: int
) -> None:
    await accounts.create("1", Account.open, "ann")
    taken: list[int] = []

    def deposit(account: Account, n: int) -> None:
        taken.append(n)
        account.deposit(1)

    done = await asyncio.gather(*(accounts.change("1", deposit, n) for n in range(number)))
    assert taken == list(range(number)), "each is decided once, in the order in which they were asked for"
    assert [one.version for one in done] == list(range(1, number + 1))
    assert len(accounts._turns) == 0, "nothing is kept of an aggregate that nobody changes"


async def test_changes_of_several_repositories_at_once_all_take_effect(store: EventStore) -> None:
    """Let changes run as in several processes, without waiting for each other."""
    repositories = [Repository(Account, lambda: store) for _ in range(5)]
    await repositories[0].create("1", Account.open, "ann")
    done = await asyncio.gather(*(one.change("1", Account.deposit, 1) for one in repositories for _ in range(20)))
    assert sorted(one.result for one in done) == list(range(1, 101))


async def test_changes_of_different_aggregates_do_not_wait_for_each_other(store: EventStore) -> None:
    stuck, entered = asyncio.Event(), asyncio.Event()

    class Stuck(Around):
        async def append(self, stream: str, events: list[EventData], *, expected: Expected) -> Appended:
            if stream == "account-1" and expected == 0:
                entered.set()
                await stuck.wait()
            return await store.append(stream, events, expected=expected)

    accounts: Repository[Account] = Repository(Account, lambda: Stuck(store))  # type: ignore[arg-type,return-value]
    for name in ("1", "2"):
        await accounts.create(name, Account.open, "ann")
    first = asyncio.ensure_future(accounts.change("1", Account.deposit, 1))
    await entered.wait()
    behind = asyncio.ensure_future(accounts.change("1", Account.deposit, 2))
    gone = asyncio.ensure_future(accounts.change("1", Account.deposit, 4))
    assert (await accounts.change("2", Account.deposit, 1)).version == 1
    gone.cancel()
    await asyncio.wait([gone])
    assert not behind.done()
    stuck.set()
    assert [(await first).result, (await behind).result] == [1, 3]
    assert len(accounts._turns) == 0


class Around:
    """A store that passes everything on except what a test overrides."""

    def __init__(self, store: EventStore) -> None:
        self._inner = store

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Overtaking(Around):
    """A store in which another process is always faster."""

    async def append(self, stream: str, events: list[EventData], *, expected: Expected) -> Appended:
        if expected is not NO_STREAM:
            await self._inner.append(stream, [encode(Deposited(amount=1), id=uuid4())])
        return await self._inner.append(stream, events, expected=expected)


async def test_a_change_that_always_loses_says_contention_after_its_time(store: EventStore) -> None:
    accounts: Repository[Account] = Repository(
        Account,
        lambda: Overtaking(store),  # type: ignore[arg-type,return-value]
        within=0.3,
    )
    created = await accounts.create("1", Account.open, "ann")
    began = asyncio.get_running_loop().time()
    for change in (
        accounts.change("1", Account.deposit, 100),
        accounts.change_for(CAUSE, created.position, BASE, "1", Account.deposit, 100),
    ):
        with pytest.raises(Contention, match=r"account-1.*lost to changes by other processes.*within=") as contention:
            await change
        assert contention.value.lost > 3
        assert not isinstance(contention.value, WrongExpectedVersion)
    assert asyncio.get_running_loop().time() - began < 5
    account = await accounts.load("1")
    assert account.balance == account.version, "nothing of it was written"
    with pytest.raises(WrongExpectedVersion):
        await accounts.change("1", Account.deposit, 100, expected=account.version)
    assert (await accounts.load("1")).version == account.version + 1, "with expected it was tried once"


async def test_a_change_that_waits_too_long_in_the_queue_was_not_tried(store: EventStore) -> None:
    entered, stuck = asyncio.Event(), asyncio.Event()

    class Stuck(Around):
        async def append(self, stream: str, events: list[EventData], *, expected: Expected) -> Appended:
            if expected is not NO_STREAM:
                entered.set()
                await stuck.wait()
            return await store.append(stream, events, expected=expected)

    accounts: Repository[Account] = Repository(Account, lambda: Stuck(store), within=0.2)  # type: ignore[arg-type,return-value]
    await accounts.create("1", Account.open, "ann")
    first = asyncio.ensure_future(accounts.change("1", Account.deposit, 1))
    await entered.wait()
    with pytest.raises(Contention, match="was not tried"):
        await accounts.change("1", Account.deposit, 2)
    stuck.set()
    assert (await first).version == 1, "an attempt under way is not broken off"


# ---- streams that were truncated -----------------------------------------------------


@pytest.mark.parametrize("hiding", [{"$maxCount": 2}, {"$tb": 3}, {"$tb": 3, "k": 1}, {"$maxCount": 1, "$tb": 2}])
@pytest.mark.parametrize("before", [{}, {"k": 1}, {"$tb": 1}])
async def test_an_aggregate_whose_first_events_are_hidden_is_refused_with_the_remedy(
    accounts: Repository[Account], store: EventStore, hiding: dict[str, int], before: dict[str, int]
) -> None:
    created = await accounts.create("1", Account.open, "ann")
    for amount in (1, 2, 4, 8):
        await accounts.change("1", Account.deposit, amount)
    await store.set_metadata("account-1", before)
    await store.set_metadata("account-1", hiding)
    key = next(key for key in ("$maxCount", "$tb") if key in hiding)
    uses: list[Callable[[], Awaitable[object]]] = [
        lambda: accounts.load("1"),
        lambda: accounts.load("1", at_version=4),
        lambda: accounts.load("1", as_of=datetime.now(UTC)),
        lambda: accounts.load("1", as_of=datetime(2020, 1, 1, tzinfo=UTC)),
        lambda: accounts.change("1", Account.deposit, 1),
        lambda: accounts.change("1", Account.deposit, 1, expected=4),
        lambda: accounts.change_for(CAUSE, created.position, BASE, "1", Account.deposit, 1),
    ]
    for use in uses:
        with pytest.raises(StreamTruncated) as refused:
            await use()
        assert f"{key[1:]}" in str(refused.value)
        assert "set_metadata('account-1', {})" in str(refused.value)
    await store.set_metadata("account-1", {})
    assert (await accounts.load("1")).balance == 15, "the remedy works"


async def test_an_aggregate_all_of_whose_events_are_hidden_is_not_one_that_is_missing(
    accounts: Repository[Account], store: EventStore
) -> None:
    created = await accounts.create("1", Account.open, "ann")
    await store.set_metadata("account-1", {"$tb": 7})
    uses: list[Callable[[], Awaitable[object]]] = [
        lambda: accounts.load("1"),
        lambda: accounts.change("1", Account.deposit, 1),
        lambda: accounts.change_for(CAUSE, created.position, BASE, "1", Account.deposit, 1),
    ]
    for use in uses:
        with pytest.raises(StreamTruncated, match="shows none of its events"):
            await use()


async def test_a_limit_that_hides_nothing_yet_is_no_harm(accounts: Repository[Account], store: EventStore) -> None:
    await accounts.create("1", Account.open, "ann")
    await store.set_metadata("account-1", {"$maxCount": 100, "$maxAge": 1_000_000})
    await accounts.change("1", Account.deposit, 1)
    assert (await accounts.load("1")).balance == 1


async def test_who_says_where_the_aggregate_begins_may_truncate_before_it(
    accounts: Repository[Account], store: EventStore
) -> None:
    await accounts.create("1", Account.open, "ann")
    await accounts.change("1", Account.deposit, 1, 2, 4)
    await store.set_metadata("account-1", {"$tb": 2, "tidingsBegins": 2})
    assert (await accounts.load("1")).balance == 6
    await store.set_metadata("account-1", {"$tb": 3, "tidingsBegins": 2})
    with pytest.raises(StreamTruncated):
        await accounts.load("1")


async def test_of_concurrent_changes_that_expect_one_version_one_wins(accounts: Repository[Account]) -> None:
    await accounts.create("1", Account.open, "ann")
    done = await asyncio.gather(
        *(accounts.change("1", Account.deposit, 1, expected=0) for _ in range(10)), return_exceptions=True
    )
    assert sum(isinstance(one, WrongExpectedVersion) for one in done) == 9
    assert (await accounts.load("1")).balance == 1


async def test_of_concurrent_creations_one_wins(accounts: Repository[Account]) -> None:
    done = await asyncio.gather(
        *(accounts.create("1", Account.open, str(n)) for n in range(10)), return_exceptions=True
    )
    assert sum(isinstance(one, WrongExpectedVersion) for one in done) == 9


# ---- load and history ----------------------------------------------------------------


async def test_a_version_is_loaded_with_its_event_included(accounts: Repository[Account]) -> None:
    await accounts.create("1", Account.open, "ann")
    await accounts.change("1", Account.deposit, 1, 2, 3)
    assert [(await accounts.load("1", at_version=n)).balance for n in range(4)] == [0, 1, 3, 6]
    for beyond in (4, -1):
        with pytest.raises(VersionNotFound, match=f"account-1.*version {beyond}"):
            await accounts.load("1", at_version=beyond)


async def test_versions_of_a_stream_that_was_begun_anew_are_loaded(
    accounts: Repository[Account], store: EventStore
) -> None:
    await accounts.create("1", Account.open, "ann")
    await accounts.change("1", Account.deposit, 1, 2)
    await store.delete("account-1")
    with pytest.raises(StreamNotFound):
        await accounts.load("1")
    again = await accounts.create("1", Account.open, "bob")
    await accounts.change("1", Account.deposit, 5, 6, 7, 8)
    assert again.version == 3
    account = await accounts.load("1", at_version=4)
    assert (account.owner, account.balance, account.version) == ("bob", 5, 4)
    with pytest.raises(VersionNotFound, match="version 2"):
        await accounts.load("1", at_version=2)


async def test_a_moment_is_loaded_up_to_the_first_later_event(accounts: Repository[Account], store: EventStore) -> None:
    await accounts.create("1", Account.open, "ann")
    await accounts.change("1", Account.deposit, 1)
    events = await stream(store)
    before, first, last = events[0].recorded_at - timedelta(seconds=1), events[0].recorded_at, events[1].recorded_at
    assert (await accounts.load("1", as_of=last)).balance == 1
    assert (await accounts.load("1", as_of=datetime.max.replace(tzinfo=UTC))).balance == 1
    if last > first:
        assert (await accounts.load("1", as_of=first)).version == 0
    with pytest.raises(VersionNotFound, match="it began at"):
        await accounts.load("1", as_of=before)
    with pytest.raises(ConfigurationError, match="time zone"):
        await accounts.load("1", as_of=datetime(2024, 1, 1))


async def test_history_tells_who_when_and_why(accounts: Repository[Account]) -> None:
    await accounts.create("1", Account.open, "ann", metadata={"actor": "clerk"}, correlation_id="c-1")
    await accounts.change("1", Account.deposit, 1, 2, metadata={"actor": "ann"})
    entries = [entry async for entry in accounts.history("1")]
    assert [entry.version for entry in entries] == [0, 1, 2]
    assert [entry.event for entry in entries] == [Opened(owner="ann"), Deposited(amount=1), Deposited(amount=2)]
    assert [entry.metadata["actor"] for entry in entries] == ["clerk", "ann", "ann"]
    assert entries[0].correlation_id == "c-1"
    assert entries[1].correlation_id == entries[2].correlation_id != "c-1"
    assert entries[0].causation_id is None
    assert all(entry.recorded_at.tzinfo is UTC and entry.position > 0 for entry in entries)


async def test_an_event_that_the_aggregate_does_not_know_stops_loading(
    accounts: Repository[Account], store: EventStore
) -> None:
    await accounts.create("1", Account.open, "ann")
    await store.append("account-1", [EventData("Renamed", b"{}")], expected=ANY)
    with pytest.raises(UnknownEventType, match=r"account-1.*'Renamed' at version 1.*Account has no @evolves"):
        await accounts.load("1")


# ---- changes as a consequence --------------------------------------------------------

BASE = UUID(int=99)
CAUSE = Cause(UUID(int=1), "c-1", handler="bank.reward")


async def test_a_change_for_a_cause_happens_once(accounts: Repository[Account], store: EventStore) -> None:
    created = await accounts.create("1", Account.open, "ann")
    first = await accounts.change_for(CAUSE, created.position, BASE, "1", Account.deposit, 1, 2)
    second = await accounts.change_for(CAUSE, created.position, BASE, "1", Account.deposit, 1, 2)
    assert (len(first.events), first.aggregate.balance) == (2, 3)
    assert (second.events, second.aggregate.balance, second.version) == ((), 3, 2)
    assert second.position > 0
    other = await accounts.change_for(CAUSE, created.position, UUID(int=98), "1", Account.deposit, 1)
    assert other.aggregate.balance == 4
    assert len(await stream(store)) == 4


@pytest.mark.parametrize("places", [[0], [1], [2], [0, 2], [1, 2]])
async def test_a_foreign_event_under_any_of_a_changes_ids_is_named_and_keeps_nothing_out(
    store: EventStore, places: list[int]
) -> None:
    found: list[tuple[UUID, str, str, int]] = []
    accounts = Repository(Account, lambda: store, taken=lambda *taken: found.append(taken))
    created = await accounts.create("1", Account.open, "ann")
    ids = [uuid5(BASE, str(place)) for place in places]
    foreign = [encode(Deposited(amount=100), id=identity) for identity in ids]
    last = (await store.append("account-1", foreign, expected=ANY)).position
    for _ in range(2):
        await accounts.change_for(CAUSE, created.position, BASE, "1", Account.deposit, 1, 2, 3)
    assert (await accounts.load("1")).balance == 6 + 100 * len(places)
    assert set(ids) <= {identity for identity, *_ in found}
    assert (ids[-1], "account-1", "Deposited", last) in found
    events = await stream(store)
    assert len({event.id for event in events}) == len(events) == 4 + len(places)


async def test_a_change_for_a_cause_is_found_under_the_ids_of_a_former_name(accounts: Repository[Account]) -> None:
    created = await accounts.create("1", Account.open, "ann")
    await accounts.change_for(CAUSE, created.position, UUID(int=98), "1", Account.deposit, 1)
    again = await accounts.change_for(CAUSE, created.position, (BASE, UUID(int=98)), "1", Account.deposit, 1)
    assert (again.events, again.aggregate.balance) == ((), 1)


@pytest.mark.parametrize("turned", [False, True])
async def test_changes_of_a_repeated_handler_do_not_depend_on_their_order(
    accounts: Repository[Account], turned: bool
) -> None:
    def reward(account: Account) -> None:
        account.deposit(10)

    created = [await accounts.create(name, Account.open, "ann") for name in ("1", "2")]
    cause = RecordedEvent(created[1].position, "order-1", 0, "Placed", b"{}", b"", True, UUID(int=1).bytes, 0)
    calls: list[tuple[str, Any, tuple[int, ...]]] = [
        ("1", Account.deposit, (1,)),
        ("2", Account.deposit, (2,)),
        ("1", reward, ()),
    ]
    for order in (calls[:2], calls[::-1] if turned else calls):
        context = Context("bank", "reward", UUID(int=7), cause, {}, 1)
        for name, decide, arguments in order:
            await context.change(accounts, name, decide, *arguments)
    assert [(await accounts.load(name)).balance for name in ("1", "2")] == [11, 2]


async def test_a_change_for_a_cause_is_found_behind_later_changes(accounts: Repository[Account]) -> None:
    created = await accounts.create("1", Account.open, "ann")
    await accounts.change_for(CAUSE, created.position, BASE, "1", Account.deposit, 1)
    await accounts.change("1", Account.deposit, 10)
    again = await accounts.change_for(CAUSE, created.position, BASE, "1", Account.deposit, 1)
    assert (again.events, again.aggregate.balance) == ((), 11)


async def test_a_change_for_a_cause_decides_anew_after_a_conflict(
    accounts: Repository[Account], store: EventStore
) -> None:
    created = await accounts.create("1", Account.open, "ann")
    seen = list[int]()
    interrupting = iter([True])
    append = store.append

    class Contested:
        """A store to which another process appends a deposit just before the first append."""

        def __getattr__(self, name: str) -> object:
            return getattr(store, name)

        async def append(self, stream: str, events: list[EventData], *, expected: int) -> object:
            if next(interrupting, False):
                await accounts.change("1", Account.deposit, 10)
            return await append(stream, events, expected=expected)

    def reward(account: Account) -> None:
        seen.append(account.balance)
        account.deposit(1)

    contested: Repository[Account] = Repository(Account, lambda: Contested())  # type: ignore[arg-type,return-value]
    done = await contested.change_for(CAUSE, created.position, BASE, "1", reward)
    assert (seen, done.aggregate.balance) == ([0, 10], 11)
    again = await contested.change_for(CAUSE, created.position, BASE, "1", reward)
    assert (seen, again.aggregate.balance) == ([0, 10], 11)


async def test_concurrent_attempts_of_one_cause_have_one_effect(accounts: Repository[Account]) -> None:
    created = await accounts.create("1", Account.open, "ann")
    await asyncio.gather(
        *(accounts.change_for(CAUSE, created.position, BASE, "1", Account.deposit, 1) for _ in range(10))
    )
    assert (await accounts.load("1")).balance == 1


async def test_a_change_for_a_cause_needs_the_stream(accounts: Repository[Account]) -> None:
    with pytest.raises(StreamNotFound):
        await accounts.change_for(CAUSE, 0, BASE, "1", Account.deposit, 1)


async def test_a_handlers_context_changes_once_and_says_why(accounts: Repository[Account]) -> None:
    created = await accounts.create("1", Account.open, "ann")
    cause = RecordedEvent(created.position, "order-1", 0, "Placed", b"{}", b"", True, UUID(int=1).bytes, 0)
    for attempt in (1, 2):
        context = Context("bank", "reward", UUID(int=7), cause, {"$correlationId": "c-1"}, attempt)
        await context.change(accounts, "1", Account.deposit, 1, metadata={"actor": "rule"})
        await context.change(accounts, "1", Account.deposit, 2)
    entries = [entry async for entry in accounts.history("1")]
    assert [entry.event for entry in entries[1:]] == [Deposited(amount=1), Deposited(amount=2)]
    assert entries[1].metadata["actor"] == "rule"
    assert entries[1].metadata["tidingsHandler"] == "bank.reward"
    assert entries[1].correlation_id == "c-1"
    assert entries[1].causation_id == str(UUID(int=1))
