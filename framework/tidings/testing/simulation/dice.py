"""The decisions that follow from the seed. Each has a name, so that leaving one out changes no other.

A failing world is made small by muting decisions: a muted fault does not happen.
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
        """Return a source for all decisions of one kind, which cannot be muted."""
        return Random(f"{self.seed}/{name}")

    def chance(self, name: str) -> float:
        """Return a number between 0 and 1, always the same for this name in this world."""
        digest = blake2b(f"{self.seed}/{name}".encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big") / 2**56

    def allows(self, name: str) -> bool:
        """Return whether a fault may happen, and note that it does."""
        if name in self.muted:
            return False
        self.thrown.append(name)
        return True
