"""The process's log: structured lines, as text or JSON, with secrets masked.

Importing this configures nothing. A program that owns its process calls `configure_logging`.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Final, TextIO

import structlog
from structlog import PrintLogger
from structlog.contextvars import merge_contextvars
from structlog.dev import ConsoleRenderer, plain_traceback
from structlog.processors import (
    ExceptionRenderer,
    JSONRenderer,
    KeyValueRenderer,
    StackInfoRenderer,
    TimeStamper,
    format_exc_info,
)
from structlog.stdlib import (
    BoundLogger,
    LoggerFactory,
    ProcessorFormatter,
    add_log_level,
    add_logger_name,
    filter_by_level,
)
from structlog.tracebacks import ExceptionDictTransformer
from structlog.typing import EventDict, Processor, WrappedLogger

from tidings._support.escaping import plain, plain_lines
from tidings._support.masking import masked
from tidings.errors import ConfigurationError

__all__ = ["configure_by_default", "configure_logging", "masked"]

_LEVELS: Final = ("debug", "info", "warning", "error", "critical")
_THEIR_OWN: Final = ("uvicorn", "uvicorn.error", "uvicorn.access")
"""Loggers with handlers of their own, whose lines do not reach the root logger."""
_TALKATIVE: Final = ("hpack",)
"""Loggers that write every header of every call below INFO."""


def configure_logging(*, json: bool | None = None, level: str = "info", stream: TextIO | None = None) -> None:
    """Send the lines of structlog and of the standard library's logging to `stream` (standard error by default).

    A terminal gets aligned columns, anything else JSON, one line per entry, unless `json` is given. Times are UTC in
    ISO 8601. Secrets (passwords in URLs, tokens) are masked, and tracebacks never show local variables. `level` is the
    lowest level that is shown. This replaces the earlier configuration: call it once, at the start of a process. Raises
    `ConfigurationError` for an unknown level.
    """
    if level.lower() not in _LEVELS:
        raise ConfigurationError(f"{level!r} is not a log level: use one of {', '.join(_LEVELS)}")
    stream = sys.stderr if stream is None else stream
    terminal = stream.isatty()
    number = logging.getLevelNamesMapping()[level.upper()]
    facts: list[Processor] = [
        merge_contextvars,
        add_log_level,
        add_logger_name,
        TimeStamper(fmt="iso", utc=True),
        StackInfoRenderer(),
    ]
    rendering = _rendering(json if json is not None else not terminal, colors=terminal)
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        ProcessorFormatter(foreign_pre_chain=facts, processors=[ProcessorFormatter.remove_processors_meta, *rendering])
    )
    root = logging.getLogger()
    root.handlers = [other for other in root.handlers if type(other) is not logging.StreamHandler] + [handler]
    root.setLevel(number)
    for name in _THEIR_OWN:
        theirs = logging.getLogger(name)
        theirs.handlers.clear()
        theirs.propagate = True
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(number, logging.INFO))
    logging.captureWarnings(True)
    structlog.configure(
        processors=[*facts, ProcessorFormatter.wrap_for_formatter],
        logger_factory=LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(number),
        cache_logger_on_first_use=False,
    )


def _rendering(json: bool, *, colors: bool) -> list[Processor]:
    if json:
        # Local variables of a frame may be secret. structlog shows them by default, so they are switched off here.
        return [ExceptionRenderer(ExceptionDictTransformer(show_locals=False)), _mask, JSONRenderer()]
    columns = ConsoleRenderer(colors=colors and not os.environ.get("NO_COLOR"), exception_formatter=plain_traceback)
    return [format_exc_info, _mask, _escape, columns]


def configure_by_default() -> None:
    """Configure structlog unless that was done: lines from info on go to standard error, or to the standard library's
    logging if that is configured. (structlog's own default is standard output, with every level.)

    For code that does not own the process (in a script, a web server): nothing else is changed.
    """
    if structlog.is_configured():
        return
    facts: list[Processor] = [merge_contextvars, add_log_level, StackInfoRenderer()]
    if logging.getLogger().handlers:
        structlog.configure(
            processors=[filter_by_level, *facts, format_exc_info, _mask, KeyValueRenderer(key_order=["event"])],
            logger_factory=LoggerFactory(),
            wrapper_class=BoundLogger,
            cache_logger_on_first_use=False,
        )
        return
    terminal = sys.stderr.isatty()
    structlog.configure(
        processors=[*facts, TimeStamper(fmt="iso", utc=True), *_rendering(not terminal, colors=terminal)],
        logger_factory=lambda *_: PrintLogger(sys.stderr),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=False,
    )


def _mask(logger: WrappedLogger, method: str, entry: EventDict) -> EventDict:
    told: EventDict = masked(dict(entry))
    return told


def _escape(logger: WrappedLogger, method: str, entry: EventDict) -> EventDict:
    """Escape texts, so that an event or a peer can neither steer the terminal nor forge an entry. Of anything else the
    renderer shows the `repr`."""
    return {
        plain(key): (plain_lines if key in _IN_LINES else plain)(value) if isinstance(value, str) else value
        for key, value in entry.items()
    }


_IN_LINES: Final = ("exception", "stack")
