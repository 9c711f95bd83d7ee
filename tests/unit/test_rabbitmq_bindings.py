"""Which bindings of a broker are none of Tidings', and which policies drop what no service has settled."""

from __future__ import annotations

import pytest

from tidings.buses import Subscription
from tidings.buses.rabbitmq.management import drops_after, foreign

NEEDED = [Subscription("order"), Subscription("billing", 0, 2), Subscription("billing", 1, 2)]


@pytest.mark.parametrize(
    "binding",
    [
        ("tidings.events", "tidings.partitions", "exchange"),
        ("tidings.events", "tidings.order", "queue"),
        ("tidings.partitions", "tidings.billing.1", "queue"),
        ("", "tidings.order", "queue"),
        ("amq.direct", "somebodys", "queue"),
        ("amq.direct", "amq.topic", "exchange"),
        ("tidings.events", "tidings.elsewhere", "queue"),
    ],
)
def test_what_is_needed_or_somebody_elses_is_not_told(binding: tuple[str, str, str]) -> None:
    assert foreign([binding], NEEDED, "/") == []


@pytest.mark.parametrize(
    ("binding", "why"),
    [
        (("tidings.events", "spy", "queue"), "it gets every event"),
        (("tidings.events", "spy", "exchange"), "it gets every event"),
        (("tidings.events", "tidings.order.3", "queue"), "it gets every event"),
        (("amq.direct", "tidings.order", "queue"), "reaches the service past the relay"),
        (("amq.direct", "tidings.events", "exchange"), "reaches every service past the relay"),
        (("somebodys", "tidings.partitions", "exchange"), "reaches every service past the relay"),
    ],
)
def test_what_others_have_bound_is_told_with_what_it_means(binding: tuple[str, str, str], why: str) -> None:
    (found,) = foreign([binding], NEEDED, "/")
    assert (found.kind, found.name, found.state) == ("binding", f"{binding[0]} -> {binding[1]}", "differs")
    assert why in found.detail


@pytest.mark.parametrize(
    ("argument", "policy", "limit"),
    [(None, 5, 5), (-1, 5, 5), (3, 5, 3), (9, 5, 5), (None, -1, None), (-1, -1, None), (9, -1, 9), (-1, 0, 0)],
)
def test_a_delivery_limit_is_the_lower_one_and_none_gives_way(
    argument: int | None, policy: int, limit: int | None
) -> None:
    assert drops_after(argument, policy) == limit
