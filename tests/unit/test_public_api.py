"""What `import tidings` gives, and what it must not cost."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tidings

pytestmark = pytest.mark.lower_bounds

ROOT = Path(__file__).parents[2]
HEAVY = (
    "sqlalchemy",
    "aio_pika",
    "aiormq",
    "pamqp",
    "grpc",
    "fastapi",
    "uvicorn",
    "opentelemetry",
    "pydantic_settings",
)


PUBLIC = {
    "tidings": """
        ANY Aggregate BlockingLog Changed Context Event EventData EventStore HistoryEntry Hold Log NO_STREAM
        RecordedEvent Relay Report Repository Retry Runtime STREAM_EXISTS Service ServiceReport Settings
        StreamAppend connect evolves health_routes open_bus open_store partition_key schema_version
        stream_version upcaster verify wire_name""",
    "tidings.alembic": "include_object",
    "tidings.buses": """
        Consumer CountsConsumers Delivery EventBus ExportsUsers ListsBindings ListsLimits ListsQueues Message
        Publisher Subscription TopologyItem WithinProcess
        check_partitions check_service_name""",
    "tidings.buses.rabbitmq": "RabbitMQBus",
    "tidings.errors": """
        AbilityMissing AttemptEnded BusError BusUnavailable ConfigurationError Contention DatabaseMoved
        DatabaseUnavailable DeployNeeded EventTooLarge Fenced HandlerError HandlerTimeout InvalidAppend
        InvalidMetadata InvalidStreamName LogBehind LogChanged MalformedMessage PartitionKeyDiffers
        PartlyRepeated PublishRejected QueueRefused RepetitionDiffers SchemaError StatementFailed StoreError
        StoreUnavailable StreamDeleted StreamForbidden StreamNotFound StreamTruncated TidingsError
        TopologyMismatch TransactionMisuse UnknownEventType Unroutable UpcastFailed UpcastMissing
        VersionNotFound WriterHeld WrongExpectedVersion""",
    "tidings.logs": "configure_by_default configure_logging masked",
    "tidings.server": "DEFAULT_PORT EventStoreServer Limits run_server",
    "tidings.settings": "Settings",
    "tidings.stores": """
        ANY APPEND_LIMIT Ability Appended AppendedSeveral CaughtUp Checkpoint EVERYTHING EventData EventStore
        Expected Filter JSON MAX_POSITION NO_STREAM OCTETS RecordedEvent STREAM_EXISTS StreamAppend
        StreamMetadata StreamState check_stream_name check_text describe""",
    "tidings.testing": "Decided Emitted Given Handling RecordingContext Unsettled World given world_seeds",
    "tidings.testing.brokers": """
        RabbitMQ RabbitMQCluster RabbitMQNode cluster_for_tests node_for_tests rabbitmq_for_tests""",
    "tidings.testing.bus_conformance": """
        BusConformance BusEnvironment LOG RefusingBusConformance RefusingBusEnvironment event events send_all take""",
    "tidings.testing.databases": """
        PostgreSQL PostgreSQLServer create_database drop_databases postgresql_for_tests server_for_tests""",
    "tidings.testing.event_stores": "EventStoreDB eventstoredb_for_tests",
    "tidings.testing.machines": "AggregateMachine aggregate_machine",
    "tidings.testing.simulation": "Outcome RULES SAVING Simulator simulate soak without",
    "tidings.testing.strategies": "events",
    "tidings.testing.store_conformance": """
        PATIENCE Reopen StoreConformance event events eventually numbers read take""",
}
"""Every public name, by module. A name that is added is a promise; one that is removed breaks somebody's code."""


@pytest.mark.parametrize("module", PUBLIC)
def test_a_public_module_offers_exactly_the_names_that_are_promised(module: str) -> None:
    found = importlib.import_module(module)
    assert found.__doc__
    assert sorted(getattr(found, "__all__", ())) == sorted(PUBLIC[module].split())
    for name in PUBLIC[module].split():
        assert hasattr(found, name)


def test_everything_else_says_that_it_is_internal() -> None:
    for child in pkgutil.iter_modules(tidings.__path__, "tidings."):
        module = importlib.import_module(child.name)
        said = "Internal: " in (module.__doc__ or "")
        assert said != (child.name in PUBLIC), f"{child.name} is public in PUBLIC or says 'Internal: ...', not both"


def _imported(source: str) -> set[tuple[str, str]]:
    """Return what Python code imports from Tidings, as module and name."""
    tree = ast.parse(source)
    taken = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tidings":
            taken |= {(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            taken |= {(alias.name, "") for alias in node.names if alias.name.split(".")[0] == "tidings"}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tidings":
            taken.add(("tidings", node.attr))
    return taken


def _private(source: str) -> list[str]:
    """Return the imports that are not public."""
    return [
        f"{module}.{name}".rstrip(".")
        for module, name in sorted(_imported(source))
        if module not in PUBLIC or (name and name not in PUBLIC[module].split() and f"{module}.{name}" not in PUBLIC)
    ]


SERVICES = sorted((ROOT / "services").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("file", SERVICES, ids=[str(file.relative_to(ROOT)) for file in SERVICES])
def test_the_example_services_import_only_public_names(file: Path) -> None:
    assert not _private(file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_the_documentation_uses_only_public_names(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        assert not _private(block)
    modules = {child.name for child in pkgutil.iter_modules(tidings.__path__, "tidings.")}
    for name in re.findall(r"\btidings(?:\.\w+)+", text):
        if ".".join(name.split(".")[:2]) in modules:  # others are names of exchanges, files, events
            module, _, last = name.rpartition(".")
            assert name in PUBLIC or last in PUBLIC.get(module, "").split(), f"{name} is not public"


@pytest.mark.parametrize(
    "code",
    [
        "from tidings.delivery.inflight import InFlight",
        "import tidings.relay.relay",
        "tidings.Unknown",
        "from tidings import x",
    ],
)
def test_what_is_not_public_is_noticed(code: str) -> None:
    assert _private(code)


@pytest.mark.parametrize("name", tidings.__all__)
def test_every_name_on_offer_is_there_and_documented(name: str) -> None:
    assert getattr(tidings, name) is not None
    if isinstance(getattr(tidings, name), type):
        assert getattr(tidings, name).__doc__


def test_every_public_name_is_on_offer() -> None:
    source = Path(str(tidings.__file__)).read_text(encoding="utf-8")
    imported = {
        alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("tidings.")
        if not node.module.startswith("tidings._")
        for alias in node.names
    }
    assert imported == set(tidings.__all__)
    assert len(tidings.__all__) == len(set(tidings.__all__))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        _ = tidings.Unknown


def _fresh(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_tidings_imports_nothing_heavy() -> None:
    declares = "from tidings import Aggregate, Context, Event, EventStore, Repository, Retry, Service"
    assert _fresh(f"import sys; {declares}; print([name for name in {HEAVY!r} if name in sys.modules])") == "[]"


def test_the_command_line_hears_signals_before_it_imports_what_takes_its_time() -> None:
    slow = ("pydantic", "structlog", "typer", "asyncio")
    assert _fresh(f"import sys, tidings.cli; print([name for name in {slow!r} if name in sys.modules])") == "[]"


def test_declaring_a_service_imports_nothing_heavy() -> None:
    code = (
        "import sys, tidings\n"
        "class Placed(tidings.Event): pass\n"
        "service = tidings.Service('stock')\n"
        "@service.on(Placed)\n"
        "async def handle(event: Placed, context: tidings.Context) -> None: ...\n"
    )
    assert _fresh(code + f"print([name for name in {HEAVY!r} if name in sys.modules])") == "[]"


def test_names_that_come_later_come_when_they_are_asked_for() -> None:
    later = "Settings, Relay, Runtime, open_bus, open_store"
    assert _fresh(f"from tidings import {later}; import sys; print('aio_pika' in sys.modules)") == "False"


def test_every_exported_name_of_every_core_module_is_there() -> None:
    core = [
        module.name
        for module in pkgutil.iter_modules(tidings.__path__)
        if not module.ispkg and module.name != "__main__"
    ]
    for name in core:
        module = importlib.import_module(f"tidings.{name}")
        assert module.__doc__, f"{name} must say what it is"
        missing = [export for export in getattr(module, "__all__", ()) if not hasattr(module, export)]
        assert not missing, f"{name}.__all__"


def test_the_version_is_that_of_the_distribution() -> None:
    project = ROOT / "pyproject.toml"
    assert f'version = "{tidings.__version__}"' in project.read_text(encoding="utf-8")
