"""What the environment says beyond one variable per setting: a database for one service, and URLs in files.

`TIDINGS_DATABASE__ORDER_HISTORY` is the database of service `order-history`. A variable whose name ends in `__FILE`
names a file that holds the value, as secrets are mounted: `TIDINGS_BUS__FILE=/run/secrets/bus`.

Internal: `tidings.settings` reads it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

from tidings.errors import ConfigurationError

__all__ = ["FurtherVariables", "is_further", "key_of_service", "variable_of"]

_PREFIX: Final = "TIDINGS_"
_OF_ONE: Final = "TIDINGS_DATABASE__"
_IN_FILE: Final = "__FILE"
_URLS: Final = ("store", "bus", "database", "bus_keys", "id_keys")
"""Settings that a file may hold."""
_BYTES: Final = 65536


def key_of_service(name: str) -> str:
    """The name of a service as variables can say it: neither its case nor '-' instead of '_' makes a difference."""
    return name.lower().replace("-", "_")


def variable_of(service: str) -> str:
    """The variable for the database of this service alone."""
    return f"{_OF_ONE}{key_of_service(service).upper()}"


def is_further(variable: str) -> bool:
    """Whether this module understands the variable."""
    name = variable.removesuffix(_IN_FILE)
    if name != variable and name in (f"{_PREFIX}{setting.upper()}" for setting in _URLS):
        return True
    return len(name) > len(_OF_ONE) and name.startswith(_OF_ONE)


class FurtherVariables(PydanticBaseSettingsSource):
    """Between what code says and the plain variables. A `database` that code names counts for every service."""

    def __init__(self, settings: type[BaseSettings], in_code: PydanticBaseSettingsSource) -> None:
        super().__init__(settings)
        self._in_code = in_code

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Never called: `__call__` has them all."""
        raise NotImplementedError

    def __call__(self) -> dict[str, Any]:
        if "TIDINGS_DATABASES" in os.environ:
            raise ConfigurationError(
                "TIDINGS_DATABASES is no setting of Tidings: the database of one service is TIDINGS_DATABASE__SERVICE"
            )
        in_code = self._in_code()
        found: dict[str, Any] = {name: value for name, value in self._urls() if name not in in_code}
        if not {"database", "databases"} & in_code.keys():
            found["databases"] = _databases()
        return found

    @staticmethod
    def _urls() -> Iterator[tuple[str, str]]:
        for name in _URLS:
            variable = f"{_PREFIX}{name.upper()}"
            if (file := os.environ.get(f"{variable}{_IN_FILE}")) is None:
                continue
            if variable in os.environ:
                raise ConfigurationError(f"both {variable} and {variable}{_IN_FILE} are set: unset one of them")
            yield name, _read(f"{variable}{_IN_FILE}", file)


def _databases() -> dict[str, str]:
    """By key of the service."""
    found: dict[str, str] = {}
    said_by: dict[str, str] = {}
    for variable, value in sorted(os.environ.items()):
        name = variable.removesuffix(_IN_FILE)
        if not variable.startswith(_OF_ONE) or len(name) <= len(_OF_ONE):
            continue
        key = key_of_service(name.removeprefix(_OF_ONE))
        if key in said_by:
            raise ConfigurationError(f"{said_by[key]} and {variable} name a database for the same service: unset one")
        said_by[key] = variable
        found[key] = value if name == variable else _read(variable, value)
        if not found[key].strip():
            raise ConfigurationError(f"{variable} is set, but empty: name a database, or unset it")
    return found


def _read(variable: str, path: str) -> str:
    try:
        with Path(path).open(encoding="utf-8") as file:
            text = file.read(_BYTES)
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise ConfigurationError(f"{variable} names the file {path!r}, which cannot be read: {why}") from None
    lines = text.split()
    if len(lines) != 1:
        raise ConfigurationError(
            f"{variable} names the file {path!r}, which must hold one value without spaces and nothing else"
        )
    return lines[0]
