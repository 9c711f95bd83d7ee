"""What surrounds a service that runs: its clock, its database, who watches it. Only tests replace any of it.

It is found through a context variable, so that a service is started in a test by the same calls as anywhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager, AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from tidings.delivery.site import Witness
from tidings.modelling.handlers import Inject

if TYPE_CHECKING:
    from tidings.database.engine import Database
    from tidings.modelling.declaration import Declaration

__all__ = ["SURROUNDINGS", "Surroundings"]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """By default, those of a process of its own."""

    clock: Callable[[], float] = time.monotonic
    """Seconds, as `time.monotonic`."""
    database: Callable[[Declaration], AbstractAsyncContextManager[Database]] | None = None
    """Opens a service's database; None opens the one that the settings name."""
    resources: Mapping[type, Any] = field(default_factory=dict)
    """Objects in the place of what lifespans yield, by the type that handlers ask for."""
    witness: Witness | None = None
    entering: Callable[[], AbstractContextManager[object]] = nullcontext
    """Entered while a service's lifespan begins, in the context that its tasks inherit."""

    def replace_all(self, service: Declaration) -> bool:
        """Return whether there is something in the place of each resource that handlers of the service ask for, so that
        its lifespan is not needed."""
        wanted = {
            wanted
            for handler in service.named.values()
            for _, wanted in handler.parameters
            if not isinstance(wanted, Inject)
        }
        return bool(wanted) and wanted <= self.resources.keys()


SURROUNDINGS: Final[ContextVar[Surroundings]] = ContextVar("surroundings", default=Surroundings())  # noqa: B039 - frozen
