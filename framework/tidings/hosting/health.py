"""Is this process well? `/live` asks whether a restart would help, `/ready` whether events get through."""

from __future__ import annotations

from tidings.hosting.answers import Check, Health
from tidings.hosting.checks import check_liveness, check_relay, check_service, leads
from tidings.hosting.facts import Facts

__all__ = ["judge_live", "judge_ready"]


def judge_live(facts: Facts) -> Health:
    """Would a restart help? Only what hangs, or has ended, in this process."""
    checks = [Check("loop", True, "the event loop turns")]
    checks += [check for service in facts.services for check in check_liveness(service)]
    return Health(tuple(checks), "stuck")


def judge_ready(facts: Facts) -> Health:
    """Do events get through this process?"""
    relay_leads = any(leads(relay) for relay in facts.relays)
    checks = [check for relay in facts.relays for check in check_relay(relay)]
    checks += [check for service in facts.services for check in check_service(service, relay_leads)]
    return Health(tuple(checks), "unready")
