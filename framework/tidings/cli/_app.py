"""The application of all `tidings` commands. It runs none of them."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from tidings import __version__
from tidings.cli import (
    add,
    backup,
    capture,
    dead,
    held,
    keys,
    log,
    new,
    partitions,
    replay,
    run,
    server,
    simulate,
    skip,
    status,
    streams,
    topology,
    verify,
    why,
)
from tidings.cli._exits import TABLE
from tidings.settings import DEBUG

__all__ = ["app"]

SETTINGS = """\b
Settings come from the environment:
  TIDINGS_STORE     sqlite:///tidings.db, where the log is
  TIDINGS_BUS       memory://, or amqp://user:password@host:5672/vhost
  TIDINGS_DATABASE  sqlite:///{service}.db, any SQLAlchemy URL; TIDINGS_DATABASE__ORDER: only for service order
  TIDINGS_SERVICES  MODULE:SERVICE,..., for commands that name none
  TIDINGS_BUS_KEYS  keys that seal messages (tidings keys new); TIDINGS_BUS_CONTENT=log reads events from the log only
  TIDINGS_ID_KEYS   keys that make the ids of emitted events, so that nobody else can compute them
  ..._FILE          TIDINGS_BUS__FILE and the like: a file that holds the value
"""

# No rich markup: it would draw boxes around help and errors, even in pipes.
app = typer.Typer(
    name="tidings",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    epilog=f"{SETTINGS}\n{TABLE}",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"tidings {__version__}")
        raise typer.Exit


@app.callback()
def tidings(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, as TIDINGS_DEBUG=1 does.")] = False,
) -> None:
    """Event-driven microservices: run them, look into the log, prove that nothing is missing, repair what is."""
    if debug:
        os.environ[DEBUG] = "1"


app.command("new", short_help="Write a project: a service and its tests.")(new.new)
app.command("run", short_help="Run a service, or a web application.")(run.run)
app.command("relay", short_help="Carry events from the log to the bus.")(run.relay)
app.command("dev", short_help="Run everything embedded, restarting on change.")(run.dev)
app.command("server", short_help="Serve EventStoreDB's protocol from a file.")(server.server)
app.command("verify", short_help="Is every event settled in every service?")(verify.verify)
app.command("replay", short_help="Run a service's handlers again.")(replay.replay)
app.command("status", short_help="How far are log, relay and services?")(status.status)
app.command("partitions", short_help="Show or change how a service is divided.")(partitions.partitions)
app.command("why", short_help="What became of one event, and what it caused.")(why.why)
app.command("capture", short_help="Write a test from an event of production.")(capture.capture)
app.command("skip", short_help="Have a service never run one event.")(skip.skip)
app.command("backup", short_help="Copy log and databases while they are in use.")(backup.backup)
app.command("restore", short_help="Restore what 'tidings backup' copied.")(backup.restore)
app.command("simulate", short_help="Prove the promises in random worlds.")(simulate.simulate)
app.add_typer(add.app, name="add", short_help="Add a service to a project.")
app.add_typer(streams.app, name="streams", short_help="Look into the log, append to it.")
app.add_typer(dead.app, name="dead", short_help="Events that services gave up: look, retry, drop.")
app.add_typer(held.app, name="held", short_help="Events to be tried again: look, retry, skip, drop.")
app.add_typer(keys.app, name="keys", short_help="Keys of messages and of the ids of emitted events.")
app.add_typer(log.app, name="log", short_help="The log's identity, after a restore.")
app.add_typer(topology.app, name="topology", short_help="What services need on the bus, and what it has.")
