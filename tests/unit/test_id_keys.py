"""Ids that only the service can compute: its keys, what they recognise, and that none of them is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.unit.command_line import invoke
from tests.unit.test_context import LOG, Reserved
from tidings import ANY, NO_STREAM, EventData, Settings, open_store
from tidings.database.engine import Database, open_database
from tidings.database.id_keys import forget_key, keep_keys, known_keys
from tidings.database.staged_events import StagedEvent
from tidings.database.tables import floors, replays, watermarks
from tidings.delivery.claims import Sought, claim
from tidings.delivery.resolution import Resolver
from tidings.errors import ConfigurationError
from tidings.modelling.context import Context
from tidings.protocol.identity import UNKEYED, IdKey, IdKeys, instead_of
from tidings.protocol.seal import new_key
from tidings.stores import RecordedEvent

ONE, TWO = "ab" * 32, "cd" * 16

KEYS = st.lists(st.one_of(st.just(b""), st.binary(min_size=16, max_size=64)), min_size=1, max_size=4, unique=True)


def context(keys: IdKeys, position: int = 9, was: tuple[str, ...] = ()) -> Context:
    event = RecordedEvent(position, "order-1", 2, "OrderCreated", b"{}", b"", True, UUID(int=1).bytes, 0)
    return Context("stock", "reserve", LOG, event, {}, 1, was=was, keys=keys)


def ids_of(keys: IdKeys, position: int = 9, was: tuple[str, ...] = ()) -> list[UUID]:
    """Return the id of an emitted event, and then all others that it may have."""
    one = context(keys, position, was)
    identity = one.emit("s", Reserved(sku="a"))
    return [identity, *one.aliases.get(identity, ())]


def written(secret: bytes) -> str:
    return secret.hex() or "open"


# ---- which ids a key makes, and which it recognises -------------------------------------------


@given(KEYS, st.permutations(range(4)))
def test_whichever_key_comes_first_all_ids_are_recognised(secrets: list[bytes], order: list[int]) -> None:
    other = [secrets[n] for n in order if n < len(secrets)]
    one, two = (IdKeys([IdKey(secret) for secret in each]) for each in (secrets, other))
    assert set(ids_of(one)) == set(ids_of(two))
    assert len(set(ids_of(one))) == len(secrets)
    assert ids_of(one)[0] == ids_of(IdKeys([IdKey(secrets[0])]))[0]
    assert len(set(ids_of(one, was=("old", "older")))) == 3 * len(secrets)


@given(KEYS, st.integers(0, 100), st.integers(1, 101))
def test_a_key_that_has_ended_is_recognised_only_in_what_earlier_events_lead_to(
    secrets: list[bytes], upto: int, cause: int
) -> None:
    first, *others = (IdKey(secret) for secret in secrets)
    ended = IdKeys([first, *(key._replace(upto=upto) for key in others)])
    assert len(ids_of(ended, cause)) == (len(secrets) if cause <= upto else 1)
    assert len(ended.secrets()) == len(secrets), "what a request emits has no cause"


def test_without_a_key_ids_are_what_they_always_were() -> None:
    assert ids_of(UNKEYED) == [UUID("a1af7eea-8c68-5043-8375-2ea838691df1")]
    assert ids_of(IdKeys.read("open")) == ids_of(UNKEYED)
    assert context(UNKEYED).idempotency_key() == context(IdKeys.read(ONE)).idempotency_key()


# ---- what is written in the setting ------------------------------------------------------------


@given(KEYS, st.lists(st.none() | st.integers(0, 2**63 - 1), min_size=4, max_size=4))
def test_keys_read_back_as_they_were_written(secrets: list[bytes], ends: list[int | None]) -> None:
    keys = [IdKey(secret, upto) for secret, upto in zip(secrets, [None, *ends], strict=False)]
    text = " ,".join(written(key.secret) + ("" if key.upto is None else f"@{key.upto}") for key in keys)
    assert IdKeys.read(text).keys == tuple(keys)
    assert IdKeys.read(new_key()).keys[0].secret


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither"),
        ("secret", "neither"),
        ("ab" * 15, "neither"),
        ("ab" * 65, "neither"),
        ("ab" * 16 + "c", "neither"),
        (f"{ONE},", "key 2 of 2 is neither"),
        (f"{ONE},open@-1", "key 2 of 2 is neither"),
        (f"{ONE},{ONE}@7", "key 2 of 2 is there twice"),
        (f"{ONE.upper()},{ONE}", "there twice"),
        ("open,open@4", "there twice"),
        (f"{ONE}@7,open", "first key makes new ids"),
        (",".join(f"{n:032x}" for n in range(17)), "has 17 keys"),
    ],
)
def test_what_is_no_list_of_keys_is_refused_without_showing_one(text: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why) as refused:
        Settings(id_keys=SecretStr(text))
    assert "TIDINGS_ID_KEYS" in str(refused.value)
    assert not text or not any(part in str(refused.value) for part in text.split(",") if len(part) > 6)


def test_keys_come_from_the_environment_or_a_file_and_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Settings().ids is UNKEYED
    (tmp_path / "keys").write_text(f"{ONE},open@12\n")
    monkeypatch.setenv("TIDINGS_ID_KEYS__FILE", str(tmp_path / "keys"))
    found = Settings()
    assert found.ids.keys == (IdKey(bytes.fromhex(ONE)), IdKey(b"", 12))
    assert ONE not in f"{found!r} {found.ids!r} {found.ids.keys[0].name}"
    assert found.ids.keys[0].name in repr(found.ids)


# ---- no key is forgotten --------------------------------------------------------------------------


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    async with open_database(f"sqlite:///{tmp_path}/own.db", None) as database:
        yield database


async def test_a_key_that_made_ids_must_stay(database: Database) -> None:
    both, name = IdKeys.read(f"{TWO},{ONE}"), IdKeys.read(ONE).keys[0].name
    await keep_keys(database, "mail", IdKeys.read(ONE))
    await keep_keys(database, "mail", both)
    await keep_keys(database, "mail", IdKeys.read(f"{ONE},{TWO}"))
    assert len(await known_keys(database, "mail")) == 2
    with pytest.raises(ConfigurationError, match=f"'mail' has made ids .* with key {name}.*tidings keys forget"):
        await keep_keys(database, "mail", IdKeys.read(TWO))
    with pytest.raises(ConfigurationError, match="with key"):
        await keep_keys(database, "mail", UNKEYED)
    await forget_key(database, "mail", name, IdKeys.read(TWO))
    await keep_keys(database, "mail", IdKeys.read(TWO))
    await keep_keys(database, "another", IdKeys.read(TWO))


@pytest.mark.parametrize("seen_by", ["note", "floor", "watermark", "replay"])
async def test_a_service_that_worked_without_a_key_must_say_so(database: Database, seen_by: str) -> None:
    """Without a note, an older Tidings was at work: it may have stored no floor yet, or a replay has lowered it."""
    floor = {"first_bucket": 0, "last_bucket": 255, "position": 7 if seen_by == "floor" else -1}
    rows = {
        floors: floor,
        watermarks: {"bucket": 3, "position": 7 if seen_by == "watermark" else -1},
        replays: {"bucket": 3, "upto": 7},
    }
    if seen_by == "note":
        await keep_keys(database, "mail", UNKEYED)
    else:
        async with database.transaction() as connection:
            for table, row in rows.items():
                if table is not replays or seen_by == "replay":
                    await connection.execute(table.insert().values(service="mail", log=str(LOG), **row))
    with pytest.raises(ConfigurationError, match="TIDINGS_ID_KEYS=KEY,open"):
        await keep_keys(database, "mail", IdKeys.read(ONE))
    await keep_keys(database, "mail", IdKeys.read(f"{ONE},open"))
    with pytest.raises(ConfigurationError, match="without a key"):
        await keep_keys(database, "mail", IdKeys.read(ONE))
    await keep_keys(database, "mail", IdKeys.read(f"{ONE},open@77"))
    await forget_key(database, "mail", "open", IdKeys.read(ONE))
    await keep_keys(database, "mail", IdKeys.read(ONE))


async def test_partitions_that_join_at_once_note_a_key_once(database: Database) -> None:
    await asyncio.gather(*(keep_keys(database, "mail", IdKeys.read(ONE)) for _ in range(8)))
    assert await known_keys(database, "mail") == {IdKeys.read(ONE).keys[0].name}


# ---- events of somebody else under an id of ours ----------------------------------------------------

OURS = {"tidingsHandler": "shop.take", "$causationId": str(UUID(int=3))}


def metadata(**other: str) -> bytes:
    pairs = (OURS | other).items()
    return ("{" + ",".join(f'"{name}":"{value}"' for name, value in pairs if value) + "}").encode()


def told(identity: UUID | None = None, *, kind: str = "Told", **other: str) -> EventData:
    return EventData(kind, b"{}", metadata(**other), id=identity or uuid4())


FOREIGN = [
    ({"kind": "Other"}, "another type"),
    ({"$causationId": str(UUID(int=4))}, "another cause"),
    ({"$causationId": ""}, "no cause"),
    ({"tidingsHandler": "pub.take"}, "another service"),
    ({"tidingsHandler": ""}, "nobody's"),
]


@pytest.mark.parametrize("how", [how for how, _ in FOREIGN], ids=[name for _, name in FOREIGN])
@pytest.mark.parametrize("others", [0, 60])
async def test_a_foreign_event_keeps_the_real_one_out_under_no_id(how: dict[str, str], others: int) -> None:
    """Also where the stream is long, so that what was read of it is remembered, and when all of that happens again."""
    async with open_store(f"memory://{uuid4()}") as store:
        await store.log_id()
        cause = (await store.append("causes", [EventData("Asked", b"")])).position
        before = StagedEvent(0, cause, "told", told())
        row = StagedEvent(0, cause, "told", told(), (uuid4(),))
        for foreign in row.ids:
            await store.append("told", [told(foreign, **how)])
        if others:
            await store.append("told", [EventData("Other", b"") for _ in range(others)])
        resolver = Resolver(store)
        assert await resolver.resolve(before, -1) is not None  # reads the stream, and may remember it
        place = await resolver.resolve(row, -1)
        assert place is not None
        assert place.identity == instead_of(row.event.id)
        done = await store.append("told", [told(place.identity)], expected=place.expected)
        resolver.appended(row, place, done)
        assert await resolver.resolve(row, -1) is None
        assert await Resolver(store).resolve(row, -1) is None, "another life of the service finds it, too"


async def test_the_real_event_is_found_behind_a_foreign_one_under_another_id() -> None:
    async with open_store(f"memory://{uuid4()}") as store:
        cause = (await store.append("causes", [EventData("Asked", b"")])).position
        row = StagedEvent(0, cause, "told", told(), (uuid4(),))
        await store.append("told", [told(row.aliases[0], tidingsHandler="shop.formerly")], expected=NO_STREAM)
        await store.append("told", [told(row.event.id, kind="Other")], expected=ANY)
        assert await Resolver(store).resolve(row, -1) is None


@given(st.sampled_from(FOREIGN), st.uuids(), st.uuids())
def test_an_event_is_another_as_soon_as_anything_that_it_says_is_different(
    foreign: tuple[dict[str, str], str], identity: UUID, other: UUID
) -> None:
    def recorded(event: EventData) -> RecordedEvent:
        return RecordedEvent(1, "told", 0, event.type, event.data, event.metadata, True, event.id.bytes, 0)

    sought = Sought(StagedEvent(0, 0, "told", told(identity)))
    assert sought.is_it(recorded(told(identity)))
    assert sought.is_it(recorded(told(instead_of(identity), tidingsHandler="shop.renamed")))
    assert sought.is_it(recorded(told(other))) == (other == identity)
    assert sought.foreign is None
    strange = recorded(told(identity, **foreign[0]))
    assert not sought.is_it(strange)
    assert sought.foreign is strange
    assert claim(strange) not in sought.claims


# ---- the command line ------------------------------------------------------------------------------


async def test_a_lost_key_is_forgotten_on_demand_and_never_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "posts.py").write_text("from tidings import Service\nmail = Service('mail')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("TIDINGS_DATABASE", "sqlite:///own.db")
    async with open_database("sqlite:///own.db", None) as database:
        await keep_keys(database, "mail", IdKeys.read(ONE))
    name, other = (IdKeys.read(key).keys[0].name for key in (ONE, TWO))
    monkeypatch.setenv("TIDINGS_ID_KEYS", f"{TWO},open@3")
    ended = await asyncio.to_thread(invoke, "keys", "names", "posts:mail")
    assert (ended.code, ended.out.splitlines()) == (
        1,
        [other, "open", f"{name}, used by mail, but not in TIDINGS_ID_KEYS"],
    )
    for wrong in (other, "open", "feed"):
        assert (await asyncio.to_thread(invoke, "keys", "forget", "posts:mail", wrong, "--yes")).code == 1
    assert (await asyncio.to_thread(invoke, "keys", "forget", "posts:mail", name)).code == 2, "nobody can answer"
    assert (await asyncio.to_thread(invoke, "keys", "forget", "posts:mail", name, "--yes")).code == 0
    assert (await asyncio.to_thread(invoke, "keys", "names", "posts:mail")).code == 0
    async with open_database("sqlite:///own.db", None) as database:
        await keep_keys(database, "mail", IdKeys.read(TWO))
