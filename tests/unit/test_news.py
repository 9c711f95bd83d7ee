"""What is news on a connection: only what goes further than everything before it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tidings.delivery.news import News

POSITIONS = st.lists(st.integers(-1, 50), min_size=1)


@given(POSITIONS, st.integers(1, 20))
def test_what_is_sent_again_is_never_news(positions: list[int], times: int) -> None:
    news = News()
    for at, position in enumerate(positions):
        news.hear(position, float(at))
    before = news.at
    for at, position in enumerate(positions * times, len(positions)):
        news.hear(position, float(at))
    assert news.at == before


@given(POSITIONS)
def test_whatever_goes_further_is_news(positions: list[int]) -> None:
    news = News()
    for at, position in enumerate(positions):
        news.hear(position, float(at))
        assert (news.at == float(at)) == (position > max(positions[:at], default=-1))


@given(POSITIONS, st.integers(-1, 50))
def test_on_a_new_connection_only_what_goes_beyond_what_was_accepted_is_news(
    positions: list[int], reached: int
) -> None:
    news = News()
    news.hear(60, 0.0)
    news.begin(reached)
    for at, position in enumerate(positions, 1):
        news.hear(position, float(at))
        assert (news.at == float(at)) == (position > max(reached, *positions[: at - 1], -1))
        assert news.came_at == float(at)


@given(st.integers(-1, 50), st.integers(-1, 50))
def test_a_marker_is_current_if_it_names_what_the_log_was_seen_to_hold(owed: int, marker: int) -> None:
    news = News()
    assert news.current(marker)
    news.owed = owed
    assert news.current(marker) == (marker >= owed)
