"""`tidings log`: the identity of the log, and which services follow it. Nothing is changed without a yes."""

from __future__ import annotations

import typer

from tidings.cli._asking import Yes, confirmed
from tidings.cli._exits import NO, OK, Refused, answering
from tidings.cli._find import find_services
from tidings.cli._output import Json, facts, plain, say
from tidings.cli.verify import Targets
from tidings.operations.looking import existing_database, existing_store
from tidings.settings import Settings

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="The log's identity, after a restore: show, renew-identity, adopt.")


@app.command()
@answering
async def show(json: Json = False) -> int:
    """Show the log's identity, and the ones that it had before it was restored."""
    from tidings.database.lineage import lineage_of

    async with existing_store(Settings()) as store:
        lineage, head = await lineage_of(store), await store.head()
    if json:
        former = [{"log": log, "upto": upto} for upto, log in lineage.former]
        say(facts({"log": lineage.log, "head": head, "former": former}))
        return OK
    say(f"log {lineage.log}, head {head}")
    for upto, log in lineage.former:
        say(f"  up to position {upto} it is log {log}")
    return OK


@app.command("renew-identity")
@answering
async def renew_identity(yes: Yes = False, json: Json = False) -> int:
    """Give the log a new identity, after it was restored from a backup or has lost its end. Stop everything first.

    The log will have other events than before at the same positions. Because of its new identity, messages and
    databases of the old log are refused instead of being mixed up with the new events. Services refuse to start
    (LogChanged) until 'tidings log adopt' makes their databases follow it.
    """
    from tidings._support.holders import open_elsewhere
    from tidings.database.lineage import renew
    from tidings.operations.backups import BackupRefused

    settings = Settings()
    scheme, _, path = settings.store.partition(":///")
    if scheme.lower() == "sqlite" and (holder := open_elsewhere(path)) is not None:
        raise BackupRefused(f"the log {path} is open in process {holder}: stop it. Nothing was changed.")
    async with existing_store(settings) as store:
        if not confirmed(f"Give log {await store.log_id()} a new identity? Nothing else may run on it now.", yes):
            return NO
        done = await renew(store)
    if json:
        say(facts(done._asdict()))
    else:
        say(f"log {done.before} is log {done.log} from now on, after position {done.position}")
        say("Next, for each service, while it is stopped: tidings log adopt MODULE:SERVICE")
    return OK


@app.command()
@answering
async def adopt(services: Targets = None, yes: Yes = False, json: Json = False) -> int:
    """Make the databases of services follow the log after it got a new identity. Stop the services first.

    What a service has done up to the end of the restored log stays done. What it has done beyond that is forgotten, so
    that it handles the new events at those positions. The effects stay in its own tables: undo them yourself.
    """
    from tidings.database.lineage import NothingToAdopt, lineage_of
    from tidings.database.lineage import adopt as follow

    settings = Settings()
    found = list(find_services(services or (), settings).values())
    names = ", ".join(service.name for service in found)
    if not confirmed(f"Let {names} follow the log of TIDINGS_STORE?", yes):
        return NO
    code = OK
    async with existing_store(settings) as store:
        lineage = await lineage_of(store)
        for service in found:
            async with existing_database(settings, service.name) as database:
                if database is None:
                    raise Refused(
                        NO, f"service {service.name!r} has never run here: it will follow whatever log it finds"
                    )
                try:
                    done = await follow(database, service.name, lineage)
                except NothingToAdopt as error:
                    say(facts({"service": service.name, "adopted": False}) if json else plain(str(error)))
                    continue
            if json:
                say(facts({"service": service.name, "adopted": True} | done._asdict()))
                continue
            say(plain(f"{service.name}: follows log {lineage.log} now, and did {done.before} up to {done.position}"))
            if done.beyond or done.lost:
                say(
                    f"  it had done events beyond that in {done.beyond} buckets, which the log has lost: their effects "
                    f"are still in its tables. {done.lost} held or dead events of them are kept as dead letters. Read "
                    f"models that keep positions are wrong above {done.position}: docs/restoring.md says what to do"
                )
    return code
