"""Settings from the environment. Nothing is read at import, and nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final, Literal

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from tidings.adapters import check_bus, check_store
from tidings.environment import FurtherVariables, is_further, key_of_service, variable_of
from tidings.errors import ConfigurationError
from tidings.protocol.identity import UNKEYED, IdKeys
from tidings.protocol.seal import Seal, read_keys
from tidings.urls import redact

__all__ = ["Settings"]


OTHER_VARIABLES: Final = ("TIDINGS_TEST_", "TIDINGS_LOCAL", "TIDINGS_SERVER_")
"""Beginnings of variables that are not settings: the tests, `deploy/local` and `tidings server` read them."""
DEBUG: Final = "TIDINGS_DEBUG"
"""The variable that makes the command line show tracebacks. It is no setting: it must work if settings are wrong."""


class Settings(BaseSettings):
    """Settings from `TIDINGS_STORE`, `TIDINGS_BUS` and `TIDINGS_DATABASE`. Without any, everything is embedded.

    `TIDINGS_DATABASE__ORDER_HISTORY` is the database of the service `order-history` only. A variable that ends in
    `__FILE` names a file that contains the value. `TIDINGS_SERVICES` tells the command line which services there are.

    With a bus on the network, the database must be named: two hosts with a default file each would do everything twice.
    """

    model_config = SettingsConfigDict(env_prefix="TIDINGS_", frozen=True, extra="forbid", hide_input_in_errors=True)

    store: str = "sqlite:///tidings.db"
    """`sqlite:///relative/path`, `sqlite:////absolute/path`, `memory://name`; `kurrentdb://...`, `kdb://...` or
    `esdb://...`, which mean the same, and `kurrentdb+discover://...`, `kdb+discover://...`, `esdb+discover://...`."""
    bus: str = "memory://"
    """`memory://name` (one process), `amqp://user:password@host:5672/vhost`, `amqps://...`."""
    database: str | None = None
    """URL of the service's own database, as SQLAlchemy takes it; `{service}` stands for the service's name. The default
    is `sqlite:///{service}.db` if the bus is embedded."""
    databases: Mapping[str, str] = Field(default_factory=dict)
    """Name of a service to the URL of its database, if it is not `database`. In the environment it is
    `TIDINGS_DATABASE__NAME`, which is ignored if code names a `database`."""
    bus_keys: SecretStr | None = None
    """Keys of the seal on messages, hexadecimal: the first seals what a relay publishes; a second one, after a comma,
    is accepted as well while keys change. With a key, services take no message without a seal. `tidings keys new`
    makes one."""
    bus_content: Literal["message", "log"] = "message"
    """Where a service reads an event that the bus brings: from the message, or from the log. With "log" a message only
    says that there is something to read."""
    id_keys: SecretStr | None = None
    """Keys of the ids of emitted events, newest first: hexadecimal, or `open` for ids without a key. The first one
    makes new ids; ids of the others are recognised, so that nothing is emitted twice. `KEY@POSITION` is recognised only
    in what events up to that position lead to. `tidings keys new` makes one."""
    services: str | None = None
    """The services that commands without arguments look at: MODULE:SERVICE, separated by commas."""

    @model_validator(mode="before")
    @classmethod
    def _names_known(cls, values: Any) -> Any:
        """Refuse a misspelt variable: everything would run embedded, and nobody would notice."""
        known = [f"TIDINGS_{name.upper()}" for name in cls.model_fields if name != "databases"]
        for name in os.environ:
            if name.startswith("TIDINGS_") and name not in (*known, DEBUG) and not name.startswith(OTHER_VARIABLES):
                if is_further(name):
                    continue
                raise ConfigurationError(
                    f"{name} is no setting of Tidings; there are {', '.join(known)}, TIDINGS_DATABASE__SERVICE for one "
                    "service, and each of the URLs in a file, as TIDINGS_BUS__FILE"
                )
        return values

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, FurtherVariables(settings_cls, init_settings), env_settings

    def __repr_args__(self) -> list[tuple[str | None, Any]]:
        return [(name, _shown(name, value)) for name, value in self if value]

    @field_validator("store")
    @classmethod
    def _store_known(cls, url: str) -> str:
        check_store(url)
        return url

    @field_validator("bus")
    @classmethod
    def _bus_known(cls, url: str) -> str:
        check_bus(url)
        return url

    @field_validator("database")
    @classmethod
    def _database_named(cls, url: str | None) -> str | None:
        if url is not None and not url.strip():
            raise ConfigurationError("TIDINGS_DATABASE is set, but empty: name a database, or unset it")
        return url

    @field_validator("databases")
    @classmethod
    def _by_key(cls, urls: Mapping[str, str]) -> Mapping[str, str]:
        for service, url in urls.items():
            if not url.strip():
                raise ConfigurationError(f"the database of service {service!r} is empty: name one, or leave it out")
        return {key_of_service(service): url for service, url in urls.items()}

    @field_validator("bus_keys")
    @classmethod
    def _keys_readable(cls, keys: SecretStr | None) -> SecretStr | None:
        if keys is not None:
            read_keys(keys.get_secret_value())
        return keys

    @field_validator("id_keys")
    @classmethod
    def _id_keys_readable(cls, keys: SecretStr | None) -> SecretStr | None:
        if keys is not None:
            IdKeys.read(keys.get_secret_value())
        return keys

    @field_validator("services")
    @classmethod
    def _services_named(cls, names: str | None) -> str | None:
        if names is not None and not all(name.strip() for name in names.split(",")):
            raise ConfigurationError(
                "TIDINGS_SERVICES is set, but names nothing between two commas: write MODULE:SERVICE,MODULE:SERVICE, "
                "or unset it"
            )
        return names

    @property
    def service_names(self) -> tuple[str, ...]:
        """The services that `TIDINGS_SERVICES` names; empty if it is not set."""
        return tuple(name.strip() for name in self.services.split(",")) if self.services is not None else ()

    @property
    def seal(self) -> Seal | None:
        """The seal of messages; None without a key."""
        return None if self.bus_keys is None else Seal(read_keys(self.bus_keys.get_secret_value()))

    @property
    def ids(self) -> IdKeys:
        """The keys of the ids of emitted events."""
        return UNKEYED if self.id_keys is None else IdKeys.read(self.id_keys.get_secret_value())

    @property
    def embedded_bus(self) -> bool:
        """Whether the bus lives in this process, so that the relay must, too."""
        return self.bus.lower().startswith("memory:")

    def database_of(self, service: str) -> str:
        """Return the database URL of one service. Raises `ConfigurationError` if two hosts could each create a database
        of their own, or if other services have a database and this one has none."""
        own = self.databases.get(key_of_service(service))
        if own is not None:
            return own.replace("{service}", service)
        if self.database is not None:
            return self.database.replace("{service}", service)
        if not self.embedded_bus:
            raise ConfigurationError(
                f"service {service!r} runs on the networked bus {redact(self.bus)} without a database of its own. Set "
                f"TIDINGS_DATABASE, or {variable_of(service)}, to one that all its processes share, for example "
                f"postgresql+asyncpg://host/{service}, or sqlite:///{service}.db when all of them run on this host"
            )
        if self.databases:
            named = ", ".join(sorted(self.databases))
            raise ConfigurationError(
                f"service {service!r} has no database, while {named} each have one of their own: set "
                f"{variable_of(service)}, or TIDINGS_DATABASE for all others"
            )
        return f"sqlite:///{service}.db"


def _shown(name: str, value: Any) -> Any:
    if name in ("bus_keys", "bus_content", "id_keys"):
        return value
    if isinstance(value, Mapping):
        return {key: redact(url) for key, url in value.items()}
    return value if name == "services" else redact(value)
