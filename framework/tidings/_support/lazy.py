"""Names of a package that are imported when they are first used, so that importing the package is cheap."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazily"]


def lazily(
    namespace: dict[str, Any], places: Mapping[str, tuple[str, ...]]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of the package with this namespace. `places` has the names of each of its
    modules."""
    package = namespace["__name__"]
    modules = {name: f"{package}.{module}" for module, names in places.items() for name in names}

    def find(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = namespace[name] = getattr(importlib.import_module(modules[name]), name)
        return found

    def names() -> list[str]:
        return sorted({*namespace, *namespace["__all__"]})

    return find, names
