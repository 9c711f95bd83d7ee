"""The stages of a delivery, made and put together in the order in which an event passes them.

`intake -> admission -> lanes -> gate -> runners -> verdicts -> pending -> commits -> acknowledgement`. An event
comes back to an earlier stage through the lanes alone. Handlers without a session: the runner hands what came of an
event to verdicts, these to `Pending` (`batch`), and the next commit takes that. Handlers with a session: the commit
calls `groups`, which run and judge them inside its transaction. Intake is made in `hosting.partition`, admission in
`pipeline`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tidings._support.timers import Timers, counting_sleep
from tidings.database.inbox import Remembered
from tidings.delivery.acknowledgement import Acknowledgement
from tidings.delivery.attempt import Attempts
from tidings.delivery.batch import Pending
from tidings.delivery.breaker import Breakers
from tidings.delivery.commits import Commits
from tidings.delivery.concurrent_groups import ConcurrentGroups
from tidings.delivery.due import Due
from tidings.delivery.fitness import Fitness
from tidings.delivery.gate import Gate
from tidings.delivery.groups import Groups
from tidings.delivery.guard import Guard, Survivors
from tidings.delivery.hindrances import Hindrances
from tidings.delivery.keys import Keys
from tidings.delivery.lanes import EventLanes
from tidings.delivery.ledger import Ledger
from tidings.delivery.progress import Progress
from tidings.delivery.release import Release
from tidings.delivery.revival import Revival
from tidings.delivery.runner import Runner
from tidings.delivery.runners import Runners
from tidings.delivery.side_by_side import SideBySide
from tidings.delivery.site import Joined
from tidings.delivery.staged import Stager
from tidings.delivery.succession import Succession
from tidings.delivery.verdicts import Verdicts

__all__ = ["Stages", "assemble"]


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of one bucket range that this process has joined."""

    lanes: EventLanes
    gate: Gate
    guard: Guard
    runners: Runners
    runner: Runner
    pending: Pending
    commits: Commits
    acknowledgement: Acknowledgement
    progress: Progress
    hindrances: Hindrances
    revival: Revival
    stager: Stager

    @property
    def idle(self) -> bool:
        """Nothing was taken that is not settled, and nothing waits to be written."""
        waits = self.lanes.under_way or self.lanes or self.acknowledgement or self.pending.batch or self.stager
        return not waits and self.progress.floor_is_stored


def assemble(
    joined: Joined,
    remembered: Remembered,
    attempts: Attempts,
    succession: Succession,
    timers: Timers,
    breakers: Breakers,
) -> tuple[Stages, Due]:
    """Make the stages, the last one first."""
    site, service = joined.site, joined.site.service
    pending, keys, lanes = Pending(), Keys(), EventLanes(timers)
    due = Due(keys, timers)
    progress = Progress(joined.inbox, joined.held, remembered, site.clock)
    acknowledgement = Acknowledgement(progress, pending, timers, service.prefetch)
    stager = Stager(site.store, pending, clock=counting_sleep(site.clock), taken=site.memory.taken)
    hindrances = Hindrances(joined.held, keys, breakers, due)
    verdicts = Verdicts(joined, lanes, pending, keys, due, breakers)
    runner = Runner(joined, attempts, succession, Survivors(joined, pending))
    side_by_side = SideBySide(joined, runner, hindrances, verdicts, pending)
    groups = Groups(joined, runner, hindrances, verdicts, pending)
    release = Release(lanes, due, stager, joined.caution, pending, side_by_side)
    ledger = Ledger(joined, progress, release, acknowledgement)
    commits = Commits(joined, pending, groups, progress, ledger, acknowledgement)
    concurrent: ConcurrentGroups | None = None
    if site.database.width:
        fitness = Fitness(joined, hindrances, pending, progress)
        concurrent = ConcurrentGroups(joined, fitness, lanes, runner, verdicts, ledger)
    side_by_side.workers.drained, lanes.puller = lanes.pump, side_by_side.workers
    runners = Runners(side_by_side, groups, concurrent)
    guard = Guard(joined, succession, lanes, runners)
    gate = Gate(joined, guard, runners, verdicts, remembered.replay)
    revival = Revival(joined, keys, breakers, due, lanes)
    stages = Stages(
        lanes,
        gate,
        guard,
        runners,
        runner,
        pending,
        commits,
        acknowledgement,
        progress,
        hindrances,
        revival,
        stager,
    )
    return stages, due
