"""Where worlds are: in memory, or on real servers, as pytest's options say."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from tidings.testing.brokers import RabbitMQ
    from tidings.testing.event_stores import EventStoreDB

__all__ = ["MEMORY", "PLACES", "RABBITMQ", "RABBITMQ_ESDB", "WHERE", "Where"]

T = TypeVar("T")

MEMORY: Final = "memory"
RABBITMQ: Final = "rabbitmq"
RABBITMQ_ESDB: Final = "rabbitmq+esdb"
PLACES: Final = (MEMORY, RABBITMQ, RABBITMQ_ESDB)


@dataclass
class Where:
    """What the options of pytest say; one for the process."""

    name: str = MEMORY
    seed: int | None = None
    """The only seed that random worlds run with."""
    servers: ExitStack = field(default_factory=ExitStack)
    """What was started for all worlds of the process."""
    unavailable: Exception | None = None
    """Why the event store, which was waited for, has not let a test in: the next ones do not wait again."""
    _rabbitmq: RabbitMQ | None = None
    _eventstoredb: EventStoreDB | None = None

    def rabbitmq(self) -> RabbitMQ:
        """Return the broker that worlds share, started at the first call. Fails the test if there is none: whoever
        names a server means it."""
        if self._rabbitmq is None:
            from tidings.testing.brokers import rabbitmq_for_tests

            self._rabbitmq = self._enter(rabbitmq_for_tests())
        return self._rabbitmq

    def eventstoredb(self) -> EventStoreDB:
        """Return the event store that worlds share, started at the first call."""
        if self._eventstoredb is None:
            from tidings.testing.event_stores import eventstoredb_for_tests

            self._eventstoredb = self._enter(eventstoredb_for_tests())
        return self._eventstoredb

    def _enter(self, server: AbstractContextManager[T]) -> T:
        import pytest

        try:
            return self.servers.enter_context(server)
        except pytest.skip.Exception as missing:
            pytest.fail(f"--tidings={self.name} cannot be done here: {missing}", pytrace=False)

    def close(self) -> None:
        """End what was started."""
        self.unavailable = None
        self._rabbitmq = self._eventstoredb = None
        self.servers.close()


WHERE: Final = Where()
