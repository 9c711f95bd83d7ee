"""The plan of a world, which follows from the seed: the events that are appended, and the faults."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any, Final

from tidings.testing.simulation.dice import Dice

__all__ = ["Plan", "Step", "plan"]

STREAMS: Final = ("order-1", "order-2", "order-3", "stock-1", "stock-2", "basket-1")
IO: Final = {
    "relay": ("publish", "append", "appended", "follow", "read"),
    "service": ("statement", "executing", "executed", "take", "append", "appended", "read", "head"),
}
"""Kinds of I/O in the middle of which a process can be hit."""
HAUNTED: Final = 100
"""Number of the event in whose handler a process is made a zombie."""
FORGED: Final = 200
"""Number of the first event that a forger publishes."""
FOR_EVER: Final = 1e9
"""Seconds that no world lasts."""
ZOMBIE_SECONDS: Final = 12.0
"""Seconds that a world lasts after a process was made a zombie."""


@dataclass(frozen=True, slots=True)
class Step:
    """One event or fault: after `at` seconds `what` happens to `slot`, for `seconds` if it lasts; with `io`, at the
    n-th I/O of that kind after that."""

    name: str
    at: float
    what: str
    slot: int = 0
    seconds: float = 0.0
    io: tuple[str, int] | None = None
    event: tuple[str, str, int, int, str | None] | None = None
    """Kind, stream, number, failures, partition key."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that will happen in a world."""

    relays: int
    services: int
    partitions: int
    prefetch: int
    window: int
    seconds: float
    steps: tuple[Step, ...]
    slow_notes: float | None = None
    """Seconds that noting begun events takes if the service's database behaves like a server; else None."""
    width: int = 0
    """Groups of handlers with a session that are under way at once, each in a transaction of its own."""


_FAULTS: Final = (
    ("kill", 6),
    ("pause", 6),
    ("stop", 2),
    ("cut", 3),
    ("cut all", 1),
    ("delete queue", 2),
    ("forget locks", 2),
    ("store away", 2),
    ("store restarts", 1),
    ("resize", 1),
    ("replica lags", 3),
    ("retention", 2),
    ("confirms swallowed", 1),
    ("wrong clock", 1),
    ("database lost", 2),
    ("database restored", 2),
)


def plan(dice: Dice, kinds: tuple[str, ...]) -> Plan:
    """Decide what will happen in a world; `kinds` are the types of its events."""
    random = dice.random("plan")
    relays, services = random.choice((1, 2)), random.choice((1, 2))
    seconds = random.uniform(1, 4)
    steps = [
        Step(f"event {n}", random.uniform(0.3, seconds), "append", event=_event(random, n, kinds))
        for n in range(random.randint(2, 12))
    ]
    names, weights = zip(*_FAULTS, strict=True)
    favourite = random.choice(names)
    for n in range(random.randint(1, 7)):
        what = favourite if random.random() < 0.3 else random.choices(names, weights)[0]
        slot = random.randrange(relays + services)
        if random.random() < 0.2:
            slot = 0
        steps.append(_fault(random, f"fault {n}", what, slot, slot < relays, seconds))
        if what == "database restored":
            steps.append(Step(f"backup {n}", random.uniform(0.0, steps[-1].at), "database copied"))
    slow_notes, takeovers = _server(dice, relays, seconds)
    if slow_notes is not None:
        services = 2
    zombies = _zombie(dice, relays, seconds)
    if zombies:
        services, seconds = 2, zombies[0].at + ZOMBIE_SECONDS
    steps += takeovers + zombies + _forger(dice, seconds, kinds) + _skips(dice, seconds)
    steps += _refusals(dice, seconds, services)
    muted = dice.muted
    return Plan(
        relays,
        services,
        partitions=random.choice((1, 1, 1, 2)),
        prefetch=random.choice((1, 3, 10, 50)),
        window=random.choice((2, 8, 256)),
        seconds=seconds,
        steps=tuple(step for step in sorted(steps, key=lambda step: step.at) if step.name not in muted),
        slow_notes=slow_notes,
        width=dice.random("width").choice((0, 1, 3)),
    )


def _server(dice: Dice, relays: int, seconds: float) -> tuple[float | None, list[Step]]:
    """In a third of the worlds, let the service's database behave like a server, so that a process is careful with
    every event after an unclean end, and let queues move to and fro between two processes."""
    random = dice.random("server")
    if random.random() > 0.35:
        return None, []
    at, steps = random.uniform(0.4, seconds), []
    for n in range(random.randint(2, 7)):
        what = random.choices(("cut", "delete queue", "kill"), (8, 3, 1))[0]
        steps.append(Step(f"takeover {n}", at, what, relays + n % 2))
        at += random.uniform(0.05, 0.5)
    return random.choice((0.05, 0.2, 0.6)), steps


def _zombie(dice: Dice, relays: int, seconds: float) -> list[Step]:
    """In a fifth of the worlds, pause a process within a held event's handler until another one has taken over. When
    it goes on, it commits what the handler emits, and dies before it appends that. A later event of the key waits."""
    random = dice.random("zombie")
    if random.random() > 0.2:
        return []
    at, stream = random.uniform(0.3, seconds), random.choice(STREAMS)
    first = "Called", stream, HAUNTED, 3, None
    later = random.choice(("Called", "Asked")), stream, HAUNTED + 1, 0, None
    pause = random.uniform(6.02, 6.4)  # the broker gives up after 6 s; then the other process has failed at it, too
    return [
        Step("zombie", at, "zombie", relays, pause, io=(f"call {HAUNTED}", 3)),
        Step("event of the zombie", at + 0.01, "append", event=first),
        Step("event behind the zombie's", at + 0.02, "append", event=later),
    ]


def _forger(dice: Dice, seconds: float, kinds: tuple[str, ...]) -> list[Step]:
    """In a fifth of the worlds, publish up to three messages that claim positions which the log never reaches: only
    a keyed seal protects from one that it has reached by the time it is looked at."""
    random = dice.random("forger")
    if random.random() > 0.2:
        return []
    return [
        Step(
            f"forgery {n}",
            random.uniform(0.3, seconds),
            "forge",
            seconds=random.randint(1_000, 9_999),
            event=random.choice((None, _event(random, FORGED + n, kinds))),
        )
        for n in range(random.randint(1, 3))
    ]


def _skips(dice: Dice, seconds: float) -> list[Step]:
    """In a quarter of the worlds, let an operator skip events that the service may have at work at that moment."""
    random = dice.random("skips")
    if random.random() > 0.25:
        return []
    return [
        Step(f"skip {n}", random.uniform(0.4, seconds + 0.5), "skip", seconds=random.random())
        for n in range(random.randint(1, 4))
    ]


def _refusals(dice: Dice, seconds: float, services: int) -> list[Step]:
    """In a fifth of the worlds, let a queue refuse every message for a while. Where the service has one process, it
    may do so for ever: then only the log brings the events."""
    random = dice.random("refusals")
    if random.random() > 0.2:
        return []
    for_ever = services == 1 and random.random() < 0.4
    lasts = FOR_EVER if for_ever else random.choice((0.3, 1.0, 3.0, 30.0)) * random.random()
    return [Step("refusal", random.uniform(0.3, seconds), "queue refuses", random.randrange(2), lasts)]


def _event(random: Random, n: int, kinds: tuple[str, ...]) -> tuple[str, str, int, int, str | None]:
    kind = random.choice(kinds)
    often = {"Fragile": (0, 1, 2, 3, 4, 9), "Asked": (0, 0, 0, 1, 3), "Called": (0, 0, 0, 1, 3)}
    key = random.choice(("k1", "k2")) if random.random() < 0.3 else None
    return kind, random.choice(STREAMS), n, random.choice(often.get(kind, (0,))), key


def _fault(random: Random, name: str, what: str, slot: int, relay: bool, seconds: float) -> Step:
    options: dict[str, Any] = {}
    if what in ("kill", "pause") and random.random() < 0.7:
        kind = random.choice(IO["relay" if relay else "service"])
        options["io"] = (kind, random.randint(1, 20 if kind in ("statement", "take", "publish") else 3))
    long = random.random() < 0.4
    options["seconds"] = random.uniform(7, 15) if long and what == "pause" else random.uniform(0.1, 3)
    return Step(name, random.uniform(0.1, seconds), what, slot, **options)
