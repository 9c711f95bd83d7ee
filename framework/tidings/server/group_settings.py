"""A persistent subscription's settings: from requests, to its description, to and from the log. No I/O."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from tidings.server.expressions import Expression
from tidings.server.filters import choice_of
from tidings.server.group_delivery import STRATEGIES
from tidings.server.log import Choice
from tidings.server.protocol import persistent
from tidings.server.refusals import group_failed, shown, thrown
from tidings.server.stored import restored
from tidings.server.wire import Malformed, stream_name
from tidings.stores.rules import MAX_VERSION

__all__ = ["ALL", "END", "GroupSettings", "position_of", "position_text", "source_of"]

ALL: Final = "$all"
END: Final = -1
TICKS: Final = 10_000
"""Ticks of 100 ns in a millisecond."""
_POSITION: Final = re.compile(r"C:(-?\d+)/P:-?\d+")


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """Times are milliseconds, sizes are events."""

    stream: str
    """`$all` for the whole log."""
    group: str
    start: int
    """The first version or position to deliver, inclusive; `END`: what is appended from now on."""
    began: int
    """With `END`, behind which version or position that is."""
    resolve_links: bool = False
    extra_statistics: bool = False
    max_retry_count: int = 10
    min_checkpoint_count: int = 10
    max_checkpoint_count: int = 1000
    max_subscriber_count: int = 5
    live_buffer_size: int = 500
    read_batch_size: int = 20
    history_buffer_size: int = 500
    message_timeout: int = 30_000
    checkpoint_after: int = 2_000
    strategy: str = "DispatchToSingle"
    by_type: bool = False
    prefixes: tuple[str, ...] = ()
    pattern: str | None = None
    filtered: bool = False
    """Whether it asked for a filter. One without prefixes and pattern wants nothing."""

    @property
    def key(self) -> str:
        return f"{self.stream}::{self.group}"

    @property
    def from_all(self) -> bool:
        return self.stream == ALL

    @property
    def choice(self) -> Choice | None:
        """Raises `Malformed` for a stored expression that this server does not run."""
        if not self.filtered and self.pattern is None and not self.prefixes:
            return None
        return Choice(self.by_type, self.prefixes, None if self.pattern is None else Expression(self.pattern))

    @property
    def after(self) -> int:
        """The version or position behind which the group begins."""
        return self.began if self.start == END else self.start - 1

    @classmethod
    def of_request(cls, options: Any, began: int, former: GroupSettings | None = None) -> Self:
        """From a request to create, or with `former` to update, a group. Raises `Malformed` and `Refusal`."""
        stream, start = source_of(options), _start(options)
        group, settings = options.group_name, options.settings
        if not group:
            raise thrown()
        strategy = getattr(settings, "consumer_strategy", "")  # requests to update have no such field
        if not strategy:
            strategy = persistent.CreateReq.ConsumerStrategy.Name(settings.named_consumer_strategy)
        if strategy not in STRATEGIES:
            raise group_failed(stream, group, f"Consumer strategy {strategy} does not exist.")
        if settings.read_batch_size >= settings.history_buffer_size:
            raise group_failed(
                stream,
                group,
                "Specified argument was out of the range of valid values. "
                "(Parameter 'ReadBatchSize may not be greater than or equal to BufferSize')",
            )
        filtered = by_type = False
        prefixes: tuple[str, ...] = ()
        pattern: str | None = None
        if former is not None:
            filtered, by_type = former.filtered, former.by_type
            prefixes, pattern = former.prefixes, former.pattern
        elif stream == ALL and options.all.WhichOneof("filter_option") == "filter":
            choice = choice_of(options.all.filter)
            filtered, by_type, prefixes = True, choice.by_type, choice.prefixes
            pattern = None if choice.pattern is None else choice.pattern.pattern
        return cls(
            stream,
            group,
            start,
            began,
            **{name: getattr(settings, name) for name in _SAME},
            message_timeout=_milliseconds(settings, "message_timeout"),
            checkpoint_after=_milliseconds(settings, "checkpoint_after"),
            strategy=strategy,
            by_type=by_type,
            prefixes=prefixes,
            pattern=pattern,
            filtered=filtered,
        )

    def entry(self) -> dict[str, Any]:
        """As the log keeps it."""
        return asdict(self)

    @classmethod
    def of_entry(cls, entry: Any) -> Self:
        """Raises `Malformed` for an entry that no server has written."""
        settings = restored(cls, entry)
        if settings.strategy not in STRATEGIES:
            raise Malformed(f"there is no consumer strategy {shown(settings.strategy)!r}")
        return settings

    def describe(self, info: Any) -> None:
        """Into a `SubscriptionInfo`."""
        info.event_source, info.group_name = self.stream, self.group
        info.resolve_link_tos, info.extra_statistics = self.resolve_links, self.extra_statistics
        info.start_from = position_text(self.start, self.from_all)
        info.message_timeout_milliseconds = self.message_timeout
        info.check_point_after_milliseconds = self.checkpoint_after
        info.max_retry_count = self.max_retry_count
        info.live_buffer_size, info.buffer_size = self.live_buffer_size, self.history_buffer_size
        info.read_batch_size = self.read_batch_size
        info.min_check_point_count, info.max_check_point_count = self.min_checkpoint_count, self.max_checkpoint_count
        info.named_consumer_strategy = self.strategy
        info.max_subscriber_count = self.max_subscriber_count


_SAME: Final = (
    "resolve_links",
    "extra_statistics",
    "max_retry_count",
    "min_checkpoint_count",
    "max_checkpoint_count",
    "max_subscriber_count",
    "live_buffer_size",
    "read_batch_size",
    "history_buffer_size",
)


def source_of(options: Any) -> str:
    """The stream, or `$all`, that a request is about. Old clients name a stream beside the choice."""
    kind = options.WhichOneof("stream_option")
    if kind == "all":
        return ALL
    if kind == "stream":
        return stream_name(options.stream.stream_identifier)
    return stream_name(options.stream_identifier)


def _start(options: Any) -> int:
    kind = options.WhichOneof("stream_option")
    if kind == "all":
        choice = options.all.WhichOneof("all_option")
        start = options.all.position.commit_position
    elif kind == "stream":
        choice = options.stream.WhichOneof("revision_option")
        start = options.stream.revision
    else:
        choice, start = "revision", options.settings.revision
    if choice == "end" or start > MAX_VERSION:
        return END
    return 0 if choice == "start" else int(start)


def _milliseconds(settings: Any, name: str) -> int:
    if settings.WhichOneof(name) == f"{name}_ticks":
        return max(int(getattr(settings, f"{name}_ticks")) // TICKS, 0)
    return max(int(getattr(settings, f"{name}_ms")), 0)


def position_text(at: int, from_all: bool) -> str:
    """As EventStoreDB writes it in descriptions and checkpoints."""
    return f"C:{at}/P:{at}" if from_all else str(at)


def position_of(text: str) -> int | None:
    """What `position_text` wrote; None for anything else."""
    match = _POSITION.fullmatch(text)
    number = match[1] if match else text
    return int(number) if re.fullmatch(r"-?\d{1,19}", number) else None
