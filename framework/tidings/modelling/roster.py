"""Which handlers an event is given to: pure bookkeeping beside the lanes. No I/O.

Mostly all that the service declares for its type. Not those that are done with it already while it waits for another
handler (`partial`), not those that were to begin after it, and not those that are behind in its bucket and come to it
on their own (`tidings.delivery.catchup`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from math import inf
from typing import Final, NamedTuple

from tidings.modelling.handlers import Handler

__all__ = ["BEHIND", "PAST", "SKIPPED", "Partial", "Roster", "Span", "successors", "under_one_name"]

Partial = Mapping[int, Mapping[str, bool]]
"""Position to the handlers that are done with the event there; True for one that a replay has run again."""

BEHIND: Final = "behind"
"""The handler is given nothing of the bucket when it comes, before it has caught up."""
PAST: Final = "past"
"""The handler is given what comes, and beside it what it was not given before."""
SKIPPED: Final = "skipped"
"""The handler was not given this, and is not meant to be."""


class Span(NamedTuple):
    """Some positions of a bucket, for one handler."""

    bucket: int
    handler: str
    kind: str
    done: int
    """It begins above this position."""
    upto: int
    """It ends here; -1 for `BEHIND`, which ends where the handler has caught up."""

    @property
    def open(self) -> bool:
        """The handler is still to be given something."""
        return self.kind != SKIPPED

    def covers(self, position: int) -> bool:
        return position > self.done and (self.kind == BEHIND or position <= self.upto)


def successors(noted: Mapping[str, Collection[str]], handlers: Iterable[Handler]) -> dict[str, str]:
    """Return the present name of each noted handler that the code still has, under whatever name.

    `noted` are the handlers of the version that was at work before, with their former names. A handler goes on under a
    new name that says what it `was`, and under a former one when a deploy that renamed it is rolled back.
    """
    present = {name: handler.name for handler in handlers for name in handler.names}
    found: dict[str, str] = {}
    for name, was in noted.items():
        back = (present[former] for former in reversed([*was]) if former in present and present[former] not in noted)
        if (now := present.get(name) or next(back, None)) is not None:
            found[name] = now
    return found


_Missing = tuple[int, float, str]
"""What a handler did not do under one of its names: above a position, up to another, and the kind of the span."""


def under_one_name(spans: Iterable[Span], name: str, at_work: Collection[str]) -> list[Span]:
    """Return the spans of a handler, noted under several of its names, as spans of `name`.

    What it did under any of its names is done. Of what it did under none, a past that was asked for is still to be
    given; and where it was to begin later under one of them, it was not given the rest. `at_work` are the names under
    which it was given events last: without spans, everything is done under them. Two parts of a bucket that were never
    given to it become one, with what is between them.
    """
    buckets: dict[int, dict[str, list[_Missing]]] = {}
    for span in spans:
        end = inf if span.kind == BEHIND else span.upto
        buckets.setdefault(span.bucket, {}).setdefault(span.handler, []).append((span.done, end, span.kind))
    united: list[Span] = []
    for bucket, of in buckets.items():
        missing, *others = (of.get(each, []) for each in {**of, **dict.fromkeys(at_work)})
        for other in others:
            missing = [both for one in missing for two in other if (both := _both(one, two)) is not None]
        found: dict[str, Span] = {}
        for done, end, kind in missing:
            span = Span(bucket, name, kind, done, -1 if end == inf else int(end))
            if (known := found.get(kind)) is not None:  # a table has one of each kind
                span = span._replace(done=min(done, known.done), upto=max(span.upto, known.upto))
            found[kind] = span
        united.extend(found.values())
    return united


def _both(one: _Missing, two: _Missing) -> _Missing | None:
    done, end = max(one[0], two[0]), min(one[1], two[1])
    kinds = {one[2], two[2]}
    kind = next(kind for kind in (PAST, SKIPPED, BEHIND) if kind in kinds)
    return (done, end, kind) if done < end else None


class Roster:
    """The handlers of one bucket range; `of` says which handlers the service declares for a type, in their order."""

    def __init__(self, of: Callable[[str], tuple[Handler, ...]], partial: Partial) -> None:
        self._of = of
        self.partial = partial
        self.spans: dict[int, dict[tuple[str, str], Span]] = {}
        """By bucket: what is still to be given to handlers, by handler and kind."""
        self.known = False
        """What the database says of handlers was read."""
        self.generation = 0
        """Rises when everything that was known before is true no more."""
        self._after: Mapping[str, int] = {}
        self._upto = -1
        """Above it, a handler is given events whatever `_after` says."""

    def renew(self, partial: Partial) -> None:
        """Another process may have been at work: nothing is known any more."""
        self.partial, self.spans, self.known = partial, {}, False
        self.generation += 1

    def read(self, after: Mapping[str, int], spans: Iterable[Span]) -> None:
        """What the database says: handlers that are given events above a position only, and spans."""
        self._after, self.known = after, True
        self._upto = max(after.values(), default=-1)
        self.spans = {}
        for span in spans:
            if span.open:
                self.spans.setdefault(span.bucket, {})[span.handler, span.kind] = span
        self.generation += 1

    def handlers(self, kind: str, bucket: int, position: int) -> tuple[Handler, ...]:
        """Those that are given this event of the bucket now, in the order in which they run."""
        found = self._of(kind)
        if position > self._upto and not self.spans and not self.partial:
            return found
        spans, done = self.spans.get(bucket, {}), self.partial.get(position, {})
        return tuple(
            handler
            for handler in found
            if position > self._after.get(handler.name, -1)
            and (handler.name, BEHIND) not in spans
            and done.get(handler.name, True)
        )

    def again(self, handler: str, position: int) -> bool:
        """A replay has the handler run this event again, though its bucket's watermark never passed it."""
        return bool(self.partial) and self.partial.get(position, {}).get(handler, False)

    def late(self, kind: str, bucket: int, position: int) -> list[tuple[Handler, Span]]:
        """Those that are to be given this event of the bucket on their own."""
        spans = self.spans.get(bucket)
        if not spans:
            return []
        return [
            (handler, span)
            for handler in self._of(kind)
            for of in (BEHIND, PAST)
            if (span := spans.get((handler.name, of))) is not None and span.covers(position)
        ]

    def ended(self, bucket: int, reached: int, tail: int) -> list[Span]:
        """Everything up to `reached` was given, and the bucket has accepted everything up to `tail`: which spans have
        ended. From now on, who was behind is given what comes."""
        spans = self.spans.get(bucket, {})
        ended = [span for span in spans.values() if (tail if span.kind == BEHIND else span.upto) <= reached]
        for span in ended:
            del spans[span.handler, span.kind]
        if not spans:
            self.spans.pop(bucket, None)
        return ended

    @property
    def first(self) -> int:
        """Everything up to here was given to every handler."""
        return min(span.done for spans in self.spans.values() for span in spans.values())
