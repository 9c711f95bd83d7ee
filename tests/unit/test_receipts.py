"""Receipts: sums that the log can contradict, what they say of a fault, and how a process carries them on."""

from __future__ import annotations

from random import Random
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidings.database.receipts import BucketRow, Receipts
from tidings.protocol.receipts import PRIME, Receipt, Sums, locate, mark, missing_run, total
from tidings.stores import RecordedEvent

EVENT: Final = RecordedEvent(7, "order-1", 3, "Placed", b'{"n":1}', b'{"a":2}', True, bytes(range(16)), 55)

positions = st.integers(1, 2**63 - 1)
marks = st.integers(1, 2**120 - 1)
logs = st.lists(positions, min_size=1, max_size=30, unique=True).map(sorted)


def logged(places: list[int], seed: int) -> list[tuple[int, int]]:
    random = Random(seed)
    return [(position, random.getrandbits(119) + 1) for position in places]


@pytest.mark.parametrize(
    "change",
    [
        {"position": 8},
        {"stream": "order-2"},
        {"version": 4},
        {"type": "Paid"},
        {"data": b'{"n":2}'},
        {"metadata": b'{"a":3}'},
        {"id_bytes": bytes(16)},
        {"data": b'2}{"n":1}', "metadata": b'{"a":'},
        {"stream": "order-1P", "type": "laced"},
        {"type": "Placed{", "metadata": b'"a":2}{', "data": b'"n":1}'},
    ],
)
def test_a_mark_says_of_two_events_that_differ_that_they_do(change: dict[str, object]) -> None:
    other = EVENT._replace(**change)  # type: ignore[arg-type]
    assert mark(other) != mark(EVENT) == mark(EVENT._replace(ticks=0))
    assert 0 <= mark(EVENT) < PRIME


def test_a_mark_is_made_of_texts_that_utf_8_cannot_express() -> None:
    assert mark(EVENT._replace(stream="\ud800")) != mark(EVENT._replace(stream="\ud801"))


@given(st.lists(st.tuples(positions, marks)), st.randoms())
def test_sums_do_not_depend_on_the_order_and_a_receipt_is_read_as_it_was_written(
    events: list[tuple[int, int]], random: Random
) -> None:
    shuffled = random.sample(events, len(events))
    half = len(events) // 2
    assert total(shuffled) == total(events) == total(events[:half]).plus(total(events[half:]))
    receipt = Receipt(3, total(events), 9)
    read = Receipt.read(receipt.write())
    assert read is not None
    assert read == Receipt(3, total(events).reduced(), 9)
    assert read.write() == receipt.write()
    assert total(events).minus(read.sums) == Sums()


@pytest.mark.parametrize("text", ["", "1 2 3", "1 2 3 4 5 6 x", "1 2 three 4 5 6 7", "1 2 3 4 5 6 7 8"])
def test_what_is_no_receipt_is_none(text: str) -> None:
    assert Receipt.read(text) is None


Fault = tuple[str, int, int]
faults = st.lists(
    st.tuples(st.sampled_from(["skipped", "replaced", "foreign"]), st.integers(0, 10**6), marks),
    min_size=1,
    max_size=2,
)


def settled_with(log: list[tuple[int, int]], faults: list[Fault]) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """What a service settled, and by position how its marks differ from those of the log."""
    settled = dict(log)
    for kind, at, value in faults:
        position = log[at % len(log)][0]
        if kind == "skipped":
            settled.pop(position, None)
        elif kind == "replaced":
            settled[position] = value
        else:
            settled[at + 1] = value
    known = dict(log)
    both = sorted(settled.keys() | known.keys())
    differ = {at: (settled.get(at, 0) - known.get(at, 0)) % PRIME for at in both}
    return list(settled.items()), {at: value for at, value in differ.items() if value}


@given(logs, st.integers(0, 2**32), faults)
def test_one_or_two_faults_of_any_kind_are_located(places: list[int], seed: int, done: list[Fault]) -> None:
    log = logged(places, seed)
    settled, differ = settled_with(log, done)
    difference = total(settled).minus(total(log))
    if differ:
        assert dict(locate(difference, 2**63 - 1) or ()) == differ
    else:
        assert difference == Sums()


@given(logs, st.integers(0, 2**32), st.lists(marks, min_size=3, max_size=8))
def test_more_faults_are_not_taken_for_fewer(places: list[int], seed: int, values: list[int]) -> None:
    log = logged(places, seed)
    foreign = [(position + 1, value) for position, value in enumerate(values)]
    assert locate(total(foreign), 2**63 - 1) is None
    assert locate(total([*log, *foreign]).minus(total(log)), 2**63 - 1) is None


@given(logs, st.integers(0, 2**32), st.booleans(), st.data())
def test_successive_events_that_are_missing_are_found_also_beside_a_foreign_one(
    places: list[int], seed: int, foreign: bool, data: st.DataObject
) -> None:
    log = logged(places, seed)
    first = data.draw(st.integers(0, len(log) - 1))
    length = data.draw(st.integers(1, len(log) - first))
    other = (data.draw(positions.filter(lambda position: position not in places)), 77)
    settled = log[:first] + log[first + length :] + [other] * foreign
    found = missing_run(total(settled).minus(total(log)), log, 2**63 - 1)
    assert found == (range(first, first + length), [other] * foreign)


@given(logs, st.integers(0, 2**32), st.data())
def test_what_missing_events_do_not_explain_is_not_explained(places: list[int], seed: int, data: st.DataObject) -> None:
    log = logged(places, seed)
    gone = data.draw(st.integers(0, len(log) - 1))
    settled = [*log[:gone], *log[gone + 1 :], (2**62 + 1, 7), (2**62 + 3, 8)]
    assert missing_run(total(settled).minus(total(log)), log, 2**63 - 1) is None
    assert missing_run(total([*log, (2**62 + 3, 4)]).minus(total(log)), log, 2**63 - 1) is None


BUCKET: Final = 5
moves = st.lists(
    st.tuples(st.sampled_from(["wanted", "wanted", "unwanted", "commit", "undo", "marker", "floor", "crash"])),
    max_size=60,
)


class Service:
    """A naive model: a bucket of a service, its row, and the log."""

    def __init__(self) -> None:
        self.log: list[RecordedEvent] = []
        self.wanted: set[int] = set()
        self.row = BucketRow(-1, -1, Receipt(-1))
        self.floor = -1
        self.join()

    def join(self) -> None:
        self.receipts = Receipts()
        self.receipts.begin({BUCKET: self.row})
        self.lane: list[RecordedEvent] = []
        self.tails: list[tuple[int, int, object]] = []
        self.accepted = max(self.floor, self.row.watermark)
        self.read()

    def read(self) -> None:
        """Accept all that the log has and the service has not."""
        for event in self.log:
            if event.position > self.accepted:
                self.accepted = event.position
                if event.position in self.wanted:
                    self.receipts.accept(BUCKET)
                    self.lane.append(event)
                else:
                    self.receipts.pass_over(BUCKET, event)

    def append(self, wanted: bool) -> None:
        position = len(self.log) * 2 + 1
        self.log.append(EVENT._replace(position=position, id_bytes=position.to_bytes(16)))
        if wanted:
            self.wanted.add(position)
        self.read()

    def commit(self, number: int, *, undone: bool = False) -> None:
        events = self.lane[:number]
        if not events:
            return
        written = self.receipts.settle((BUCKET, event) for event in events)
        if undone:
            return
        self.receipts.committed(written)
        self.write(events[-1].position, *written[BUCKET])
        del self.lane[:number]

    def mark(self) -> None:
        """A marker comes: once all that was accepted before it is settled, the floor is to rise."""
        last = self.lane[-1].position if self.lane else -1
        self.tails.append((last, self.accepted, self.receipts.tails()))

    def store_floor(self) -> None:
        while self.tails and self.tails[0][0] <= self.row.watermark:
            _, floor, tails = self.tails.pop(0)
            self.receipts.settled(tails)  # type: ignore[arg-type]
            due = self.receipts.due()
            if due:
                self.write(self.row.watermark, *due[BUCKET])
            self.receipts.wrote(due)
            self.floor = max(self.floor, floor)

    def write(self, watermark: int, at: int, text: str) -> None:
        if at >= self.row.at:
            receipt = Receipt.read(text)
            assert receipt is not None
            self.row = BucketRow(self.row.watermark, at, receipt)
        self.row = self.row._replace(watermark=watermark)

    def check(self) -> None:
        """The receipt has exactly what the log has, up to where it says, and further than anything is settled."""
        covered = [(each.position, mark(each)) for each in self.log if each.position <= self.row.at]
        assert self.row.receipt == Receipt(-1, total(covered).reduced())
        settled = max(self.floor, self.row.watermark)
        assert [each for each in self.log if self.row.at < each.position <= settled] == []


@given(moves, st.integers(1, 4))
def test_the_row_of_a_bucket_has_what_is_settled_whatever_is_undone_or_cut_off(
    done: list[tuple[str]], number: int
) -> None:
    service = Service()
    for (what,) in done:
        if what in ("wanted", "unwanted"):
            service.append(what == "wanted")
        elif what in ("commit", "undo"):
            service.commit(number, undone=what == "undo")
        elif what == "marker":
            service.mark()
        elif what == "floor":
            service.store_floor()
        else:
            service.join()
        service.check()


def test_an_event_that_is_settled_after_a_later_one_is_remembered_for_good() -> None:
    receipts = Receipts()
    receipts.begin({BUCKET: BucketRow(-1, -1, Receipt(-1))})
    for position in (4, 2, 9, 8):
        written = receipts.settle([(BUCKET, EVENT._replace(position=position))])
        receipts.committed(written)
    receipt = Receipt.read(written[BUCKET][1])
    assert receipt is not None
    assert (receipt.disorder, receipt.sums.events) == (2, 4)


def test_what_the_receipt_has_already_is_not_added_again() -> None:
    receipts = Receipts()
    receipts.begin({BUCKET: BucketRow(2, 6, Receipt(-1, Sums(5, 1, 1, 1, 1)))})
    receipts.pass_over(BUCKET, EVENT._replace(position=6))
    receipts.accept(BUCKET)
    written = receipts.settle([(BUCKET, EVENT._replace(position=5))])
    assert Receipt.read(written[BUCKET][1]) == Receipt(-1, Sums(5, 1, 1, 1, 1))
    assert receipts.tails() == {}
