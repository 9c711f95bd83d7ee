"""A deterministic simulation of the real relay, dispatcher, inbox and all between them: one seed decides everything.

What is simulated is what they stand on: store, broker, clock, the scheduling of processes, and their deaths. Nothing
here is a model of the classes that it proves.
"""

from __future__ import annotations

from tidings.testing.simulation.rules import RULES, SAVING, without
from tidings.testing.simulation.simulator import Outcome, Simulator, simulate, soak

__all__ = ["RULES", "SAVING", "Outcome", "Simulator", "simulate", "soak", "without"]
