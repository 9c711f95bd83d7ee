"""What a report says of a service that has no floor, or no database: nothing that is not so."""

from __future__ import annotations

from tidings.operations.report import ServiceReport


def test_a_service_without_a_floor_is_not_given_one() -> None:
    first = next(ServiceReport("shop", floor=-1, ran=True).lines(7))
    assert first.startswith("shop: settled up to position 7 (0 pending")
    assert "no floor yet" in first
    assert "-1" not in first
    assert "floor 0" in next(ServiceReport("shop", floor=0, ran=True).lines(7))


def test_a_service_that_has_never_run_is_not_called_settled() -> None:
    first, second = ServiceReport("shop", floor=-1, ran=False, missing=True).lines(7)
    assert "settled" not in first
    assert "nothing to do up to position 7" in first
    assert "has no database" in second
    assert "TIDINGS_DATABASE" in second
    _, second = ServiceReport("shop", floor=-1, ran=False).lines(7)
    assert "its database does not know it" in second
    pending = ServiceReport("shop", floor=-1, ran=False, missing=True, pending_count=1)
    assert "NOT settled" in next(pending.lines(7))
