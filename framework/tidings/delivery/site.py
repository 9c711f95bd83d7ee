"""What every stage of a service's delivery needs, and what one bucket range adds to it. Values only."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from tidings.buses import EventBus
from tidings.database.engine import Database
from tidings.database.held_rows import HeldRows
from tidings.database.inbox import Inbox
from tidings.database.lineage import Lineage
from tidings.delivery.crashes import Caution
from tidings.delivery.failure import Failure
from tidings.delivery.failure_memory import FailureMemory
from tidings.delivery.inflight import InFlight
from tidings.delivery.resources import Resources
from tidings.modelling.context import Context
from tidings.protocol.identity import UNKEYED, IdKeys
from tidings.protocol.seal import Seal
from tidings.stores import EventStore

if TYPE_CHECKING:
    from tidings.modelling.declaration import Declaration

__all__ = ["TRUSTING", "Joined", "Site", "Trust", "Witness"]


class Witness(Protocol):
    """Someone who watches attempts, and may make them fail: a test."""

    def begins(self, context: Context) -> None:
        """Hear of an attempt before the handler is called. What this raises counts as raised by the handler."""
        ...

    def failed(self, item: InFlight, failure: Failure) -> None:
        """Hear of an attempt that failed."""
        ...


class Trust(NamedTuple):
    """What is believed of what others may have written: of messages on the bus, and of events in the log."""

    seal: Seal | None = None
    """Only sealed messages are read; None reads all."""
    content: bool = True
    """An event is what its message says; else the log is read for it."""
    ids: IdKeys = UNKEYED
    """Whose ids emitted events have."""


TRUSTING: Final = Trust()
"""Whoever may publish on the bus is believed, as far as the head of the log."""


@dataclass(frozen=True, slots=True)
class Site:
    """One service in one process: what it declares, and what it works on."""

    service: Declaration
    store: EventStore
    bus: EventBus | None
    database: Database
    resources: Resources
    process: str
    """Id of this process of the service, with which it marks a bucket range as its own; another one at each start."""
    memory: FailureMemory
    clock: Callable[[], float] = time.monotonic
    witness: Witness | None = None
    trust: Trust = TRUSTING


@dataclass(frozen=True, slots=True)
class Joined:
    """One bucket range of a service, from the moment this process joins it until it is fenced or leaves."""

    site: Site
    inbox: Inbox
    held: HeldRows
    lineage: Lineage
    caution: Caution

    @classmethod
    def of(cls, site: Site, inbox: Inbox, lineage: Lineage) -> Joined:
        """What this process was careful about stays; what it had begun is forgotten, because it joins again."""
        caution = site.memory.cautions.setdefault(inbox.buckets, Caution(site.clock))
        caution.cut_off()
        held = HeldRows(site.service.name, lineage.log, inbox.buckets)
        return cls(site, inbox, held, lineage, caution)
