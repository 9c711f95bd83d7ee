"""What is well and what is not is judged on progress, and what hangs is named with what to do."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import make_url

from tidings import Runtime, Service, Settings
from tidings.hosting.answers import Health
from tidings.hosting.checks import STALLED_SECONDS
from tidings.hosting.facts import Facts, RelayFacts, ServiceFacts, Standstill, Work
from tidings.hosting.gathering import Probe
from tidings.hosting.health import judge_live, judge_ready
from tidings.hosting.listening import listening_at
from tidings.modelling.taken_ids import TAKEN_SECONDS, TakenIds
from tidings.operations.remedies import origin_of

WELL = ServiceFacts("audit", marker_age=1, marker=9, floor=9, settled=9)
LEADS = RelayFacts("main", leading=True, marker_age=1, confirmed=9)
STUCK = Work("reserve", "e-1", "order-7", 8, seconds=95, timeout=30)


def wrong(health: Health) -> list[str]:
    assert all(check.remedy for check in health.checks if not check.ok), "what is wrong comes with a remedy"
    return [check.name for check in health.checks if not check.ok]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, []),
        ({"starting": True}, ["audit.running"]),
        ({"stopping": True}, ["audit.running"]),
        ({"died": "LogChanged"}, ["audit.running"]),
        ({"consuming": False}, ["audit.bus"]),
        ({"database": "locked"}, ["audit.database"]),
        ({"store": "no answer"}, ["audit.store"]),
        ({"paused": "every attempt has failed"}, ["audit.attempts"]),
        ({"marker_age": 29}, []),
        ({"marker_age": 31}, ["audit.markers"]),
        ({"floor": 3, "stalled": 29}, []),
        ({"floor": 3, "stalled": 31}, ["audit.progress"]),
        ({"floor": 3, "stalled": 59, "work": (STUCK,)}, []),
        ({"floor": 3, "stalled": 61, "work": (STUCK,)}, ["audit.handlers"]),
        ({"marker_age": None}, []),
        ({"marker_age": None, "settled": -1}, ["audit.markers"]),
        ({"marker_age": None, "waiting_event": "event 10"}, ["audit.markers"]),
        ({"marker_age": None, "waiting_event": "event 10", "others_idle": 2}, []),
        ({"marker_age": None, "waiting_event": "event 10", "others_idle": 31}, ["audit.markers"]),
    ],
)
def test_a_service_is_ready_when_events_get_through(change: dict[str, Any], named: list[str]) -> None:
    assert wrong(judge_ready(Facts((replace(WELL, **change),)))) == named


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({}, []),
        ({"started": False}, ["relay.main"]),
        ({"marker_age": 31}, ["relay.main.bus"]),
        ({"trouble": "no service is bound to it"}, ["relay.main.bus"]),
        ({"leading": False}, ["relay.main.bus"]),
        ({"leading": False, "waiting": 1}, []),
        ({"leading": False, "waiting": 1, "trouble": "lost"}, ["relay.main.bus"]),
        ({"leading": False, "waiting": 9, "trouble": "lost"}, []),
        ({"stalled": 31, "waiting_event": "event 10"}, ["relay.main.progress"]),
        ({"stalled": 31}, []),
        ({"store": "locked"}, ["relay.main.store"]),
    ],
)
def test_a_relay_is_ready_when_it_leads_and_moves_or_stands_by(change: dict[str, Any], named: list[str]) -> None:
    assert wrong(judge_ready(Facts(relays=(replace(LEADS, **change),)))) == named


@pytest.mark.parametrize("heard", [None, 31, 95])
def test_a_relay_of_another_log_is_named_before_anything_is_said_of_the_queue(heard: float | None) -> None:
    health = judge_ready(Facts((replace(WELL, marker_age=heard, stranger="log-2", heard_age=1, full=True),)))
    assert wrong(health) == ["audit.markers"]
    told = str(health.document())
    assert "of log log-2" in told
    assert "tidings log show" in told


def test_messages_that_claim_what_the_log_does_not_hold_degrade_a_service_and_stop_nothing() -> None:
    refused = "3 messages were refused; the last: a marker claims position 99, the log ends at 9"
    health = judge_ready(Facts((replace(WELL, refused=refused, queue="tidings.audit"),)))
    assert wrong(health) == ["audit.foreign"]
    assert health.ok, "it is degraded: no reason to take it out of the traffic"
    told = str(health.document())
    assert all(part in told for part in ("claims position 99", "queue tidings.audit", "list_permissions"))


def test_a_taken_id_degrades_a_service_with_the_place_of_the_foreign_event_and_is_forgotten() -> None:
    now = 0.0
    taken = TakenIds(lambda: now)
    assert taken.told is None
    for position in (7, 9):
        taken.note(UUID(int=position), "order-1", "Placed", position)
    health = judge_ready(Facts((replace(WELL, taken=taken.told),)))
    assert wrong(health) == ["audit.ids"]
    assert health.ok, "it is degraded: no reason to take it out of the traffic"
    told = str(health.document())
    assert all(part in told for part in ("2 times", "'order-1', position 9", str(UUID(int=9)), "TIDINGS_ID_KEYS"))
    now = TAKEN_SECONDS + 1
    assert taken.told is None


def test_a_relay_whose_messages_are_all_refused_is_a_missing_marker_and_not_a_busy_queue() -> None:
    """What is refused is not heard: else the markers that never come would look like ones that wait in the queue."""
    refused = "9 messages were refused; the last: a message of type 'Placed' has no seal of TIDINGS_BUS_KEYS"
    health = judge_ready(Facts((replace(WELL, marker_age=31, refused=refused, heard_age=31, queue="tidings.audit"),)))
    assert not health.ok
    assert wrong(health) == ["audit.markers", "audit.foreign"]


def test_a_relay_whose_messages_come_is_not_told_to_be_started() -> None:
    """One that begins again names nothing new for long; an ordinary outage leaves it behind what was read meanwhile."""
    silent = replace(WELL, marker_age=95, heard_age=95, heard_upto=77, read_age=3)
    health = judge_ready(Facts((replace(silent, came_age=1),)))
    assert wrong(health) == ["audit.markers"]
    told = str(health.document())
    assert "none newer than position 77" in told
    assert "tidings status" in told
    assert "start a relay" not in told
    for came in (None, 95):
        assert "start a relay" in str(judge_ready(Facts((replace(silent, came_age=came),))).document())
    first = replace(silent, marker_age=None, heard_age=1, came_age=1, waiting_event="event 10")
    told = str(judge_ready(Facts((first,))).document())
    assert "so far up to position 77, and no marker yet" in told
    assert "start a relay" not in told
    catching_up = judge_ready(Facts((replace(silent, heard_age=1, came_age=1),)))
    assert wrong(catching_up) == []
    assert "behind 0 unsettled" not in str(catching_up.document())
    assert "so far up to position 77" in str(catching_up.document())


def test_a_stuck_handler_is_named_with_its_event_stream_and_seconds() -> None:
    facts = Facts((replace(WELL, work=(STUCK,)),))
    assert wrong(judge_live(facts)) == ["audit.handlers"]
    told = str(judge_live(facts).document())
    assert all(part in told for part in ("'stuck'", "reserve", "e-1", "order-7", "position 8", "95 s"))
    assert wrong(judge_live(Facts((replace(WELL, work=(replace(STUCK, seconds=59),)),)))) == []


def test_a_handler_whose_database_does_not_answer_is_no_reason_to_restart() -> None:
    """Its transaction cannot be undone before the database answers, in a new process as little as in this one."""
    stuck = replace(WELL, work=(STUCK,))
    assert wrong(judge_live(Facts((replace(stuck, database="no answer within 2 s"),)))) == []
    # It answers: that a write failed some time ago excuses nobody.
    assert wrong(judge_live(Facts((replace(stuck, database_writes="it was read-only"),)))) == ["audit.handlers"]


def test_of_many_handlers_that_hang_the_slowest_is_named_and_the_others_are_counted() -> None:
    slower = replace(STUCK, event_id="e-2", seconds=STUCK.seconds + 1)
    (check,) = [
        check for check in judge_live(Facts((replace(WELL, work=(STUCK, slower, STUCK)),))).checks if not check.ok
    ]
    assert "e-2" in check.detail
    assert "and 2 more like it" in check.detail


def test_progress_counts_only_while_there_is_more_to_do() -> None:
    progress = Standstill()
    assert progress.look(5, behind=False, now=0) == 0
    assert progress.look(5, behind=False, now=100) == 0, "a quiet log is not stalled"
    assert progress.look(5, behind=True, now=140) == 40
    assert progress.idle(140) is None
    assert progress.look(6, behind=True, now=150) == 0
    assert progress.idle(160) == 10


async def test_a_store_that_hangs_is_not_taken_for_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tidings.hosting.gathering.ANSWER_SECONDS", 3.0)
    service = Service("audit")
    settings = Settings(store=f"sqlite:///{tmp_path}/log.db", database=f"sqlite:///{tmp_path}/audit.db")

    async def hang(*_: object) -> int:
        await asyncio.Event().wait()
        return 0

    async with Runtime(service, settings=settings) as runtime:
        for what in ("head", "log_id"):
            monkeypatch.setattr(runtime.store, what, hang)
        health = await Probe((service,), runtime).ready()
        monkeypatch.undo()
    checks = {check.name: check for check in health.checks}
    assert checks["audit.database"].ok
    assert checks["audit.store"].detail == "no answer within 3 s"
    assert "TIDINGS_STORE" in checks["audit.store"].remedy
    assert checks["audit.store"].scope == "audit", "it explains nothing of another service"


def test_what_listens_is_known_to_be_tcp_so_that_small_answers_are_not_delayed() -> None:
    with listening_at("127.0.0.1", 0, "a test") as listening:
        assert listening.proto == socket.IPPROTO_TCP
        accepting = listening.getsockname()[1]
        with socket.create_connection(("127.0.0.1", accepting)):
            accepted, _ = listening.accept()
            with accepted:
                assert accepted.proto == socket.IPPROTO_TCP


def test_a_standby_on_a_bus_within_its_process_is_ready_while_the_other_moves() -> None:
    facts = ServiceFacts("shop", standing_by="process 7", settled=4)
    assert judge_ready(Facts((facts,))).ok
    waits = replace(facts, waiting_event="event e of stream 's'")
    assert judge_ready(Facts((replace(waits, stalled=STALLED_SECONDS),))).ok
    health = judge_ready(Facts((replace(waits, stalled=STALLED_SECONDS + 1),)))
    (stalled,) = [check for check in health.checks if not check.ok]
    assert stalled.name == "shop.progress"
    assert "process 7" in stalled.detail
    assert "kill -9" in stalled.remedy
    away = judge_ready(Facts((replace(waits, stalled=99, database="database is away"),)))
    assert wrong(away) == ["shop.database"]


def test_a_relay_that_nobody_here_could_hear_is_no_trouble() -> None:
    assert judge_ready(Facts((), (RelayFacts("main", needed=False, trouble="reached no queue"),))).ok


def test_services_whose_databases_are_on_one_server_that_is_down_have_one_cause() -> None:
    def down(service: str, port: int = 5432) -> ServiceFacts:
        url = f"postgresql+asyncpg://{service}:***@db:{port}/{service}"
        error = f"database {url}: it lets nobody in: ConnectionRefusedError"
        origin = origin_of(make_url(url), url, error)
        return replace(WELL, name=service, database=error, database_origin=origin, consuming=False)

    (cause,) = judge_ready(Facts((down("inventory"), down("shipping")))).causes
    assert cause.fault.name == "inventory.database"
    assert "shipping.database" in [one.name for one in cause.effects]
    causes = judge_ready(Facts((down("inventory"), down("shipping", 5433)))).causes
    assert [cause.fault.name for cause in causes] == ["inventory.database", "shipping.database"]
    assert origin_of(make_url("sqlite:///a.db"), "sqlite:///a.db", "locked") == ""
