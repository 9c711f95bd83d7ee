"""Frames in what a client sends: what is unfinished is counted, wherever the bytes are cut."""

from __future__ import annotations

from hyperframe.frame import ContinuationFrame, DataFrame, Frame, HeadersFrame, PingFrame, SettingsFrame
from hypothesis import given
from hypothesis import strategies as st

from tidings.server.frames import BLOCK, PREFACE, Frames

OPENING = b"x" * PREFACE


def headers(*sizes: int, ends: bool = True) -> bytes:
    frames: list[Frame] = [
        ContinuationFrame(1, data=b"x" * size) if n else HeadersFrame(1, data=b"x" * size)
        for n, size in enumerate(sizes)
    ]
    if ends:
        frames[-1].flags.add("END_HEADERS")
    return b"".join(frame.serialize() for frame in frames)


whole = st.one_of(
    st.binary(max_size=40).map(lambda data: DataFrame(1, data=data).serialize()),
    st.just(PingFrame(0, opaque_data=b"12345678").serialize()),
    st.just(SettingsFrame(0).serialize()),
    st.lists(st.integers(0, 30), min_size=1, max_size=4).map(lambda sizes: headers(*sizes)),
)


@given(st.lists(whole, max_size=8), st.lists(st.integers(1, 50), max_size=20), st.integers(0, 200))
def test_what_is_whole_is_nothing_wherever_it_is_cut(pieces: list[bytes], cuts: list[int], missing: int) -> None:
    data = OPENING + b"".join(pieces)
    missing = min(missing, len(data))
    sent = data[: len(data) - missing]
    frames, at = Frames(), 0
    for size in [*cuts, len(sent)]:
        assert frames.feed(sent[at : at + size])
        at += size
    edges = [0, len(OPENING)]
    for piece in pieces:
        edges.append(edges[-1] + len(piece))
    begun = max(edge for edge in edges if edge <= len(sent))
    assert frames.unfinished == len(sent) - begun
    assert frames.done == edges.index(begun) + (edges.count(begun) - 1)


@given(st.lists(st.integers(0, 16_000), min_size=1, max_size=8), st.integers(1, 9000))
def test_a_header_block_is_refused_as_soon_as_it_says_that_it_is_too_long(sizes: list[int], cut: int) -> None:
    data = OPENING + headers(*sizes, ends=False)
    frames = Frames()
    fits = all(frames.feed(data[at : at + cut]) for at in range(0, len(data), cut))
    assert fits is (sum(9 + size for size in sizes) <= BLOCK)


def test_blocks_that_end_are_not_added_up() -> None:
    frames = Frames()
    assert frames.feed(OPENING)
    for _ in range(10):
        assert frames.feed(headers(16_000, 8_000))
        assert frames.feed(DataFrame(1, data=b"x" * 60_000).serialize())
    assert frames.unfinished == 0
    assert frames.done == 21
