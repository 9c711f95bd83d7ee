"""Where worlds are: in memory, or on real servers, as pytest's options say."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from tidings.testing.brokers import RabbitMQ
    from tidings.testing.event_stores import EventStoreDB

__all__ = ["MEMORY", "PLACES", "RABBITMQ", "RABBITMQ_ESDB", "WHERE", "Where"]

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
    _rabbitmq: RabbitMQ | None = None
    _eventstoredb: EventStoreDB | None = None

    def rabbitmq(self) -> RabbitMQ:
        """Return the broker that worlds share, started at the first call. Skips the test if there is none."""
        if self._rabbitmq is None:
            from tidings.testing.brokers import rabbitmq_for_tests

            self._rabbitmq = self.servers.enter_context(rabbitmq_for_tests())
        return self._rabbitmq

    def eventstoredb(self) -> EventStoreDB:
        """Return the event store that worlds share, started at the first call."""
        if self._eventstoredb is None:
            from tidings.testing.event_stores import eventstoredb_for_tests

            self._eventstoredb = self.servers.enter_context(eventstoredb_for_tests())
        return self._eventstoredb

    def close(self) -> None:
        """End what was started."""
        self._rabbitmq = self._eventstoredb = None
        self.servers.close()


WHERE: Final = Where()
