"""Why an attempt failed, in words that can be kept: in a held event, a dead letter, a line of the log. No I/O.

Secrets in them are masked, because messages of exceptions quote URLs and headers.
"""

from __future__ import annotations

import traceback
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tidings._support.masking import masked_text
from tidings.errors import (
    ConfigurationError,
    DeployNeeded,
    EventTooLarge,
    InvalidStreamName,
    SchemaError,
    TransactionMisuse,
    WriterHeld,
)

if TYPE_CHECKING:
    from tidings.modelling.handlers import Handler

__all__ = ["PERMANENT", "RAISED", "Failure"]

PERMANENT: Final = (SchemaError, TransactionMisuse, WriterHeld, ConfigurationError, EventTooLarge, InvalidStreamName)
"""Errors that the next attempt would meet again."""

RAISED: Final[ContextVar[list[BaseException] | None]] = ContextVar("errors of attempts", default=None)
"""A list to which the error of each failed attempt is added, for tests that show it with its own traceback. None
otherwise: an error keeps alive whatever its frames refer to."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt failed."""

    reason: str
    """One line: the error's type and message."""
    detail: str
    """The traceback."""
    permanent: bool
    error: str = ""
    """The error's type."""
    place: str = ""
    """File and line of the raise."""
    skipped: bool = False
    """An operator wants the event dead: what waits for its key goes on."""
    deploy_needed: bool = False
    """Only another deploy can read the event: it is held until then, without retries that would meet the same."""
    raised: BaseException | None = None
    """The error itself, for a witness. It keeps the attempt's frames alive, so do not keep it."""

    def __post_init__(self) -> None:
        for name in ("reason", "detail"):
            object.__setattr__(self, name, masked_text(getattr(self, name)))

    @classmethod
    def of(cls, error: BaseException, handler: Handler) -> Failure:
        if (raised := RAISED.get()) is not None:
            raised.append(error)
        lines = "".join(traceback.format_exception(error))
        try:
            message = str(error)
        except Exception:
            message = "<its message cannot be shown: str() of it fails>"
        deploy_needed = isinstance(error, DeployNeeded) and not isinstance(error, handler.retry.permanent)
        return cls(
            masked_text(f"{type(error).__name__}: {message}")[:2000],  # before it is cut, or a half would not be known
            masked_text(lines)[-20_000:],
            not deploy_needed and isinstance(error, PERMANENT + handler.retry.permanent),
            type(error).__name__,
            _place(error),
            deploy_needed=deploy_needed,
            raised=error,
        )


def _place(error: BaseException) -> str:
    """File and line of the raise; of an error that was made without one, those of its cause."""
    trace = error.__traceback__ or (error.__cause__.__traceback__ if error.__cause__ is not None else None)
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
