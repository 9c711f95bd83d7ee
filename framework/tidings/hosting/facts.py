"""What is known of a process and its services at one moment: gathered by `gathering`, judged by `health`."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Facts", "Standstill", "RelayFacts", "ServiceFacts", "Work"]


class Standstill:
    """Remembers between two looks since when something has been behind without moving."""

    def __init__(self) -> None:
        self._done: int | None = None
        self._since = 0.0
        self._moved_at: float | None = None

    def look(self, done: int, *, behind: bool, now: float) -> float:
        """Seconds for which `done` has stood still while there was more to do; 0 for one that moves or has finished."""
        if done != self._done:
            self._moved_at = None if self._done is None else now
            self._done, self._since = done, now
        elif not behind:
            self._since = now
        return now - self._since

    def idle(self, now: float) -> float | None:
        """Seconds since it was seen to move; None if it never was."""
        return None if self._moved_at is None else now - self._moved_at


@dataclass(frozen=True, slots=True)
class Work:
    """A handler at work on an event; times in seconds."""

    handler: str
    event_id: str
    stream: str
    position: int
    seconds: float
    timeout: float

    def __str__(self) -> str:
        return (
            f"handler {self.handler!r} at event {self.event_id} of stream {self.stream!r} (position {self.position}) "
            f"for {self.seconds:.0f} s"
        )


@dataclass(frozen=True, slots=True)
class ServiceFacts:
    """What is known of one service in this process. Positions are -1 where there is none; times are seconds."""

    name: str
    starting: bool = False
    stopping: bool = False
    died: str | None = None
    """Why it is not running any more."""
    standing_by: str | None = None
    """The process at work, on a bus that reaches only its own process; this one waits for its place."""
    joined: bool = True
    consuming: bool = True
    healing: bool = False
    marker_age: float | None = None
    """Since the last marker on this connection to the bus."""
    marker: int = -1
    floor: int = -1
    stalled: float = 0.0
    """Seconds for which the floor has stood still below the marker."""
    paused: str | None = None
    """Which handlers are paused, because every attempt of theirs fails."""
    all_paused: bool = False
    """Every handler is."""
    held: str | None = None
    """How many events are held because their handler failed, since when and why; None where there are none."""
    work: tuple[Work, ...] = ()
    settled: int = -1
    """The floor as committed by whichever process of the service."""
    others_idle: float | None = None
    """Since `settled` was seen to move; None if it never was."""
    others_still: float = 0.0
    """Seconds for which `settled` has stood still."""
    waiting_event: str | None = None
    """The first event above `settled`, where it was looked for."""
    database: str | None = None
    """What the database answered instead of an answer."""
    database_writes: str | None = None
    """What the database answered to the last write, if that failed."""
    database_place: str = ""
    """The file or URL of the database."""
    database_origin: str = ""
    """What the database's fault has in common with those of others on its server; "" where there is none."""
    database_client: str = ""
    """The command that opens a database on a server; "" for a file."""
    store: str | None = None
    """What the store answered instead of an answer."""
    store_writes: str | None = None
    """What the store answered to the last append, if that failed."""
    log: str | None = None
    """Why the store's log is not the one that the service has worked on: another one, or one that went back."""
    bus_trouble: str | None = None
    """What the bus answered last instead of messages."""
    stranger: str | None = None
    """Another log, whose relay publishes on this bus, and was heard since the last marker."""
    refused: str | None = None
    """How many messages were refused as none of this log's relay, and the last of them, if it came lately."""
    taken: str | None = None
    """How many ids of its events somebody else was found to have used, and the last, if that was lately."""
    queue: str = ""
    heard_age: float | None = None
    """Seconds since something new came from the queue."""
    came_age: float | None = None
    """Seconds since anything came from the queue, new or not."""
    heard_upto: int = -1
    """The highest position that it named."""
    unsettled: int = 0
    """Events and markers that were taken, and are not settled."""
    full: bool = False
    """No more is taken before some of them are settled: markers wait in the queue."""
    oldest: str | None = None
    """The event that the floor waits for, and its handler."""
    oldest_tried: int = 0
    """Attempts at it that failed."""
    resting: int = 0
    """Events that rest between two quick attempts."""
    elsewhere: str | None = None
    """Another process that is at work on it."""
    still: float = 0.0
    """Seconds for which nothing at all has moved though there is something to do."""
    read_age: float | None = None
    """Seconds since it last had the log read because nothing new came; None while news comes."""
    partitions: tuple[ServiceFacts, ...] = ()
    """Where the service is divided: of each partition what can differ among them."""


@dataclass(frozen=True, slots=True)
class RelayFacts:
    """What is known of the relay in this process."""

    name: str
    started: bool = True
    needed: bool = True
    """A service of its process is at work; false while all stand by."""
    leading: bool = False
    waiting: float | None = None
    """Seconds spent waiting for the lock."""
    marker_age: float | None = None
    """Since the bus confirmed a marker, in seconds."""
    confirmed: int = -1
    stalled: float = 0.0
    """Seconds for which nothing was confirmed though an event waits."""
    waiting_event: str | None = None
    trouble: str | None = None
    trouble_is_the_stores: bool = False
    refusing: str | None = None
    """Which queue refuses what it publishes, and what to do."""
    store: str | None = None
    store_writes: str | None = None
    """What the store answered to the last append, if that failed."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that is known of a process."""

    services: tuple[ServiceFacts, ...] = ()
    relays: tuple[RelayFacts, ...] = field(default=())
