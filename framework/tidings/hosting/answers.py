"""What `/live` and `/ready` answer: checks, the causes among them, and one word for all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tidings.operations.causes import Cause, Part, causes_of

__all__ = ["Check", "Health"]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `remedy` says what to do when it is not `ok`."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    part: Part = Part.PROGRESS
    scope: str = ""
    """The service whose part it is; "" for what all have in common."""
    serious: bool = True
    """Where it is not ok, events do not get through; else some are late, and the rest is well."""
    origin: str = ""
    """What it has in common with what other services say of the same server; "" for what is nobody else's."""

    def document(self) -> dict[str, Any]:
        told = {"name": self.name, "ok": self.ok, "detail": self.detail}
        return told if self.ok else told | {"remedy": self.remedy}


@dataclass(frozen=True, slots=True)
class Health:
    """The answer, with everything that it rests on."""

    checks: tuple[Check, ...]
    otherwise: str
    """The word for a process that is not well."""

    @property
    def ok(self) -> bool:
        """Nothing serious is wrong."""
        return all(check.ok or not check.serious for check in self.checks)

    @property
    def status(self) -> str:
        """ "ok", "degraded" (some events are late, the others get through), or "unready" or "stuck"."""
        if not self.ok:
            return self.otherwise
        return "ok" if all(check.ok for check in self.checks) else "degraded"

    @property
    def causes(self) -> list[Cause[Check]]:
        """What is wrong: each cause with what follows from it."""
        return causes_of(check for check in self.checks if not check.ok)

    def document(self) -> dict[str, Any]:
        """For JSON. The causes of what is wrong come first, each with its effects, which go when it goes."""
        wrong: list[dict[str, Any]] = []
        for cause, effects in self.causes:
            told = cause.document()
            if effects:
                told["effects"] = [{"name": each.name, "detail": each.detail} for each in effects]
            wrong.append(told)
        return {"status": self.status, "checks": wrong + [check.document() for check in self.checks if check.ok]}
