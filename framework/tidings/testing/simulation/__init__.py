"""A deterministic simulation of the real relay, dispatcher and inbox and of everything between them, from one seed.

Only their environment is simulated: store, broker, clock, and the scheduling and death of processes. The classes that
it proves are the real ones, not models of them.
"""

from __future__ import annotations

from tidings.testing.simulation.rules import RULES, SAVING, without
from tidings.testing.simulation.simulator import Outcome, Simulator, simulate, soak

__all__ = ["RULES", "SAVING", "Outcome", "Simulator", "simulate", "soak", "without"]
