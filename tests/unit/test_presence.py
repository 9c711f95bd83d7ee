"""What a process says of its code, for operators who look for two versions at once."""

from __future__ import annotations

from tidings import Event, Service
from tidings.database.presence import code_of


class Happened(Event):
    pass


def test_a_service_without_handlers_has_no_fingerprint_that_would_be_the_same_for_any_code() -> None:
    assert code_of(Service("desk"))[1] == "-"


def test_a_service_with_handlers_has_one() -> None:
    service = Service("audit")

    @service.on(Happened)
    def note(event: Happened) -> None:
        """Do nothing."""

    assert len(code_of(service)[1]) == 8
