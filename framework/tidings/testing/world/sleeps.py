"""Puts one function in the place of another in every module, also where it was imported by its name. It calls none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final
from weakref import WeakKeyDictionary

__all__ = ["replace_everywhere"]

_FOUND: Final[WeakKeyDictionary[ModuleType, tuple[int, tuple[str, ...]]]] = WeakKeyDictionary()
"""Modules that were looked through: how many names each had, and which of them stand for the function. Looking through
all of them takes milliseconds."""


def replace_everywhere(old: Callable[..., Any], new: Callable[..., Any]) -> None:
    """Let each name of a module that stands for `old` stand for `new`: `time.sleep`, and what
    `from time import sleep` has made elsewhere."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        names = vars(module)
        size, found = _FOUND.get(module, (-1, ()))
        if size != len(names):
            found = tuple(name for name, value in list(names.items()) if value is old)
            _FOUND[module] = len(names), found
        for name in found:
            if names.get(name) is old:
                names[name] = new
