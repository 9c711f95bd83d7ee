"""`tidings simulate`: simulates random worlds of relays, services and faults, and tells the story of one that fails.

It touches no store, bus or database of yours.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Final

import typer

from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._output import Json, facts, plain, say

if TYPE_CHECKING:
    from tidings.testing.simulation import Outcome

__all__ = ["simulate"]

PROGRESS_SECONDS: Final = 1.0
"""Seconds between two notes of the progress."""


@answering
def simulate(
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first world.")] = 0,
    runs: Annotated[int, typer.Option(min=1, help="Number of worlds: this seed and those after it.")] = 100,
    workers: Annotated[int, typer.Option(min=1, help="Processes that simulate.")] = 1,
    shrink: Annotated[bool, typer.Option(help="Shrink the first failing world, and tell its story.")] = True,
    story: Annotated[
        bool, typer.Option("--story", help="Tell the story of the first world, even if it does not fail.")
    ] = False,
    without: Annotated[
        str | None, typer.Option(metavar="RULE", help="Leave a rule out, so that a promise breaks.")
    ] = None,
    json: Json = False,
) -> int:
    """Prove the promises: run the real relay and services in random worlds. The exit code is 1 if a promise was broken.

    A seed decides every interleaving, crash, pause, loss, repetition and reordering of its world, and replays exactly.
    Rules to leave out: gap, marker, base, watermark_cas, range_floor, previous_never_low, floor_waits, pass_reaches,
    followers_wait, failed_is_undone, staged_is_looked_for; and acknowledged_late, checkpoint, one_leads, which only
    save work.
    """
    from tidings.testing import simulation

    if without is not None and without not in simulation.RULES | simulation.SAVING:
        raise Refused(USAGE, f"there is no rule {without!r} to leave out; --help names them")
    events, failed, told = 0, list[simulation.Outcome](), time.monotonic()
    for count, outcome in enumerate(simulation.simulate(range(seed, seed + runs), workers=workers, rule=without), 1):
        events += outcome.events
        if outcome.broken:
            failed.append(outcome)
            if not json:
                say(f"seed {outcome.seed}: {plain('; '.join(outcome.broken))}")
        if sys.stderr.isatty() and time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            print(f"\r{count} of {runs} worlds, {len(failed)} failed ", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    first = min(failed, key=lambda outcome: outcome.seed, default=None)
    with simulation.Simulator() as simulator, simulation.without(without):
        if first is not None and shrink:
            first = simulator.shrink(first)
        elif story:
            first = simulator.run(seed, telling=True)
    if json:
        broken = {outcome.seed: list(outcome.broken) for outcome in failed}
        say(facts({"worlds": runs, "events": events, "broken": broken, "story": _told(first)}))
    else:
        for line in _told(first):
            say(plain(line))
        say(f"{runs} worlds from seed {seed}, {events} events: {_verdict(len(failed))}")
    return NO if failed else OK


def _told(outcome: Outcome | None) -> list[str]:
    if outcome is None or not outcome.story:
        return []
    end = "; ".join(outcome.broken) or "every promise was kept"
    return [f"The story of seed {outcome.seed}:", *outcome.story, f"In the end: {end}"]


def _verdict(failed: int) -> str:
    return f"promises were broken in {failed}" if failed else "nothing lost, nothing twice, in order"
