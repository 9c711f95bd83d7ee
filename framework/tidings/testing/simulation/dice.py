"""What the seed decides, each decision by its name, so that leaving one out changes no other. It looks at no clock.

A failing world is made small by muting: what is muted does not happen.
"""

from __future__ import annotations

from collections.abc import Collection
from hashlib import blake2b
from random import Random

__all__ = ["Dice"]


class Dice:
    """One world's decisions."""

    def __init__(self, seed: int, muted: Collection[str] = ()) -> None:
        self.seed = seed
        self.muted = frozenset(muted)
        self.thrown: list[str] = []
        """The faults that happened, by name."""

    def random(self, name: str) -> Random:
        """For all decisions of one kind; those are not muted."""
        return Random(f"{self.seed}/{name}")

    def chance(self, name: str) -> float:
        """Between 0 and 1, the same whenever this world asks by this name."""
        digest = blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big") / 2**56

    def allows(self, name: str) -> bool:
        """Whether a fault that was decided shall happen; then it has."""
        if name in self.muted:
            return False
        self.thrown.append(name)
        return True
