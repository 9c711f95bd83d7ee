"""What appends decide, against a model that keeps plain lists: one store, and two stores that write to one file."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import tidings.stores.sqlite.writer as writing
from tidings.errors import StoreError, StreamDeleted, StreamNotFound, WrongExpectedVersion
from tidings.stores import ANY, NO_STREAM, STREAM_EXISTS, Appended, EventData, EventStore, Expected
from tidings.stores.sqlite.store import open_sqlite

END = 2**63 - 1
IDS = [UUID(int=number) for number in range(1, 6)]
STREAMS = ("a", "b")


@dataclass(frozen=True)
class Operation:
    """One call. `ids` is for appends, `tb` for metadata."""

    kind: str
    stream: str
    expected: Expected
    ids: tuple[int, ...] = ()
    tb: int = 0

    async def run(self, store: EventStore) -> object:
        if self.kind == "append":
            batch = [EventData("Happened", b"{}", id=IDS[id_]) for id_ in self.ids]
            return (await store.append(self.stream, batch, expected=self.expected)).version
        if self.kind == "metadata":
            return (await store.set_metadata(self.stream, {"$tb": self.tb, "k": 1}, expected=self.expected)).version
        await (store.delete if self.kind == "delete" else store.tombstone)(self.stream, expected=self.expected)
        return None


@dataclass
class Model:
    """EventStoreDB's rules again, as slow and plain as possible. Raises the class of the refusal."""

    log: list[tuple[str, int, object]] = field(default_factory=list)
    """Rows of (stream, version, id or metadata document)."""

    def of(self, stream: str) -> list[tuple[int, object]]:
        return [(version, what) for name, version, what in self.log if name == stream]

    def last(self, stream: str) -> int:
        return max((version for version, _ in self.of(stream)), default=-1)

    def document(self, stream: str) -> dict[str, int]:
        documents = self.of(f"$${stream}")
        return dict(documents[-1][1]) if documents else {}  # type: ignore[call-overload]

    def soft(self, stream: str) -> bool:
        return self.document(stream).get("$tb") == END

    def check(self, stream: str, expected: Expected, ids: list[object]) -> int | None:
        """Return the version of the answer if every event exists already."""
        if self.last(stream) == END or (self.last(stream) < 0 and self.last(stream.removeprefix("$$")) == END):
            raise StreamDeleted(stream)
        there, last = self.of(stream), self.last(stream)
        wrong = WrongExpectedVersion(stream, str(expected), last)
        if expected is STREAM_EXISTS:
            if self.soft(stream):
                raise StreamDeleted(stream)
            if not there and not self.of(f"$${stream}"):
                raise wrong
        if expected in (ANY, STREAM_EXISTS):
            first = [next((version for version, known in there if known == id_), None) for id_ in ids]
            if not ids or first[0] is None:
                return None
            if None in first:
                raise wrong
            return first[-1]
        at = -1 if expected is NO_STREAM else int(expected)
        if at == last:
            return None
        behind = [known for version, known in there if version > at][: len(ids)]
        if at < last and ids and behind == ids:
            return at + len(ids)
        if at == -1 and ids and self.soft(stream) and behind[:1] != ids[:1]:
            return None
        raise wrong

    def run(self, operation: Operation) -> object:
        stream, fresh = operation.stream, object()
        if operation.kind == "append":
            return self.append(stream, operation.expected, [IDS[id_] for id_ in operation.ids])
        if operation.kind == "metadata":
            was_soft = self.soft(stream)
            self.check(f"$${stream}", operation.expected, [fresh])
            document = {"$tb": operation.tb, "k": 1}
            version = self.put(f"$${stream}", document)
            if was_soft and self.last(stream) != END:
                self.put(f"$${stream}", document | {"$tb": self.last(stream) + 1})
            return version
        self.check(stream, operation.expected, [fresh])
        if operation.kind == "tombstone":
            self.log.append((stream, END, fresh))
        elif self.last(stream) < 0 and self.last(f"$${stream}") < 0:
            raise WrongExpectedVersion(stream, "", -1)
        else:
            self.put(f"$${stream}", {"$tb": END})
        return None

    def append(self, stream: str, expected: Expected, ids: list[object]) -> int:
        answer = self.check(stream, expected, ids)
        if answer is None and ids:
            first, was_soft = self.last(stream) + 1, self.soft(stream)
            for id_ in ids:
                answer = self.put(stream, id_)
            if was_soft:
                self.put(f"$${stream}", self.document(stream) | {"$tb": first})
        return self.last(stream) if answer is None else answer

    def put(self, stream: str, what: object) -> int:
        version = self.last(stream) + 1
        self.log.append((stream, version, what))
        return version

    def readable(self, stream: str) -> list[int] | type[StoreError]:
        if self.last(stream) == END:
            return StreamDeleted
        if self.last(stream) < 0 or self.soft(stream):
            return StreamNotFound
        return [version for version, _ in self.of(stream) if version >= self.document(stream).get("$tb", 0)]


expectations = st.sampled_from([ANY, NO_STREAM, STREAM_EXISTS, 0, 1, 2, 3, 5])
streams = st.sampled_from(STREAMS)
appends = st.builds(
    Operation,
    st.just("append"),
    streams,
    expectations,
    st.lists(st.integers(0, len(IDS) - 1), max_size=3).map(tuple),
)
others = st.builds(
    Operation,
    st.sampled_from(["delete", "delete", "metadata", "metadata", "tombstone"]),
    streams,
    st.one_of(st.just(ANY), expectations),
    tb=st.sampled_from([0, 1, 3, END]),
)
operations = st.one_of(appends, appends, appends, others)
groups = st.lists(st.tuples(st.integers(0, 1), st.lists(operations, min_size=1, max_size=5)), max_size=8)


def shape(outcome: object) -> object:
    if isinstance(outcome, WrongExpectedVersion):
        return (WrongExpectedVersion, outcome.actual)
    return type(outcome) if isinstance(outcome, Exception) else outcome


async def compare(stores: Sequence[EventStore], history: list[tuple[int, list[Operation]]]) -> None:
    model = Model()
    start = await stores[0].head()
    for writer, group in history:
        store = stores[writer % len(stores)]
        # Started together, so that they share a commit; decided in this order.
        outcomes = await asyncio.gather(*(operation.run(store) for operation in group), return_exceptions=True)
        for operation, outcome in zip(group, outcomes, strict=True):
            try:
                expected = model.run(operation)
            except StoreError as refusal:
                expected = refusal
            assert shape(outcome) == shape(expected), operation
    for store in stores:
        recorded = [
            (e.stream, e.version, json.loads(e.data) if e.type == "$metadata" else e.id)
            async for e in store.read_all(after=start)
        ]
        assert [(s, v, w if isinstance(w, (dict, UUID)) else None) for s, v, w in model.log] == [
            (s, v, None if v == END else w) for s, v, w in recorded
        ]
        for stream in STREAMS:
            try:
                readable: object = [e.version async for e in store.read_stream(stream)]
            except StoreError as error:
                readable = type(error)
            assert readable == model.readable(stream)


@settings(max_examples=300, deadline=None)
@given(groups)
def test_appends_decide_as_the_model_does(history: list[tuple[int, list[Operation]]]) -> None:
    async def run() -> None:
        store = await open_sqlite("memory://decision")
        try:
            await compare([store], history)
        finally:
            await store.close()

    asyncio.run(run())


@settings(max_examples=60, deadline=None)
@given(groups)
@example([(0, [Operation("metadata", "b", ANY, tb=END)]), (1, [Operation("metadata", "b", ANY, tb=0)])])
def test_what_a_writer_remembers_of_streams_never_misleads_it_when_another_has_written(
    history: list[tuple[int, list[Operation]]],
) -> None:
    async def run(path: str) -> None:
        stores = [await open_sqlite(f"sqlite:///{path}") for _ in range(2)]
        try:
            await compare(stores, history)
        finally:
            for store in stores:
                await store.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(f"{folder}/log.db"))


async def test_ids_of_any_can_be_forgotten_at_opening_those_of_versions_never(tmp_path: object) -> None:
    """EventStoreDB remembers the ids of ANY and STREAM_EXISTS appends only until it restarts."""
    url = f"sqlite:///{tmp_path}/log.db"
    batch = [EventData("Happened", b"{}")]
    answers: list[list[Appended]] = []
    for remember in (True, True, False):
        store = await open_sqlite(url, remember_ids=remember)
        answers.append(
            [
                await store.append("any", batch, expected=ANY),
                await store.append("any", batch, expected=ANY),
                await store.append("none", batch, expected=NO_STREAM),
            ]
        )
        await store.close()
    first, second, forgetful = answers
    assert second == first
    assert [answer.version for answer in forgetful] == [1, 1, 0]


async def test_an_id_can_belong_to_its_first_stream_alone() -> None:
    """EventStoreDB has one table of ids for all streams: in a second one a repeated event is written again."""
    store = await open_sqlite(f"memory://{uuid4().hex}", first_streams=True)
    batch = [EventData("Happened", b"{}")]
    together = await asyncio.gather(*(store.append(stream, batch) for stream in ("a", "b", "a", "b")))
    assert [answer.version for answer in together] == [0, 0, 0, 1], "within one commit"
    later = [await store.append(stream, batch) for stream in ("a", "b", "a")]
    assert [answer.version for answer in later] == [0, 2, 0], "over several"
    explicit = [await store.append("b", batch, expected=expected) for expected in (NO_STREAM, 0, 1)]
    assert [answer.version for answer in explicit] == [0, 1, 2], "by the version, the stream's own ids count"
    await store.close()


async def test_what_was_not_written_is_nobodys_first_stream() -> None:
    store = await open_sqlite(f"memory://{uuid4().hex}", first_streams=True)
    batch = [EventData("Happened", b"{}")]
    with pytest.raises(WrongExpectedVersion):
        await store.append("refused", batch, expected=7)
    answers = [await store.append("b", batch) for _ in range(2)]
    assert [answer.version for answer in answers] == [0, 0]
    await store.close()


async def test_only_so_many_first_streams_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "FIRST_STREAMS", 3)
    store = await open_sqlite(f"memory://{uuid4().hex}", first_streams=True)
    old, *others = ([EventData("Happened", b"{}")] for _ in range(4))
    for batch in (old, *others):
        await store.append("a", batch)
    for batch in (old, others[0]):
        await store.append("b", batch)
    again = [await store.append("b", batch) for batch in (others[2], others[2], old, old)]
    assert [answer.version for answer in again] == [2, 3, 0, 0], "of an old one, each stream knows its own"
    await store.close()
