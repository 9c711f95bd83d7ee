"""`tidings backup`, `tidings restore`: copy and restore the embedded log and the services' SQLite databases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tidings.cli._asking import Yes, confirmed
from tidings.cli._exits import NO, OK, USAGE, Refused, answering
from tidings.cli._find import find_services
from tidings.cli._output import Json, facts, plain, say
from tidings.cli.verify import Targets
from tidings.operations.looking import existing_database, existing_store, no_log
from tidings.settings import Settings
from tidings.urls import redact

__all__ = ["backup", "restore"]

LOG = "log"


@answering
async def backup(
    folder: Annotated[Path, typer.Argument(metavar="DEST", help="A new folder.")],
    services: Targets = None,
    json: Json = False,
) -> int:
    """Copy the log and the databases of services into a new folder, while everything runs.

    Services come first and the log last, so that no service is ahead of the log. Only SQLite files are copied.
    EventStoreDB and PostgreSQL have tools of their own. What is not copied is listed.
    """
    from tidings.operations.backups import take

    settings = Settings()
    files, elsewhere = _files(settings, services or ())
    if LOG in files and not files[LOG].is_file():
        raise no_log(files[LOG])
    for name in [name for name, path in files.items() if not path.exists()]:
        path = files.pop(name).absolute()
        elsewhere.append(f"service {name}: there is no file {path}. Either it has never run, or its database was moved")
    if not files:
        raise Refused(USAGE, f"there is no SQLite file to copy: {'; '.join(elsewhere)}")
    done = take(folder, files)
    if json:
        say(facts({"folder": str(done.folder), "files": done.kept, "elsewhere": elsewhere}))
        return OK
    for one in done.kept:
        say(plain(f"{one.name}: {one.bytes} bytes in {done.folder / one.file}"))
    for what in elsewhere:
        say(plain(f"NOT in it: {what}"))
    return OK


@answering
async def restore(
    folder: Annotated[Path, typer.Argument(metavar="SRC", help="What 'tidings backup' made.")],
    services: Targets = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="NAME", help="'log', or the name of a service; repeat it.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what is there; it is kept as FILE.before-restore-N.")
    ] = False,
    yes: Yes = False,
    json: Json = False,
) -> int:
    """Restore the log and the databases of services from a backup. Stop the relay and all services first.

    A restored log gets a new identity, because it will go on with other events than the one before. Databases that are
    restored with it follow it; for other services, use 'tidings log adopt'. A service that is restored without the log
    reads from the log what it lacks when it starts.
    """
    from tidings.database.lineage import adopt, lineage_of, renew
    from tidings.operations.backups import read
    from tidings.operations.backups import restore as put_back

    settings = Settings()
    kept = read(folder)
    names = {one.name for one in kept.kept}
    files, _ = _files(settings, services or ())
    unknown = sorted(set(only or ()) - names)
    if unknown:
        raise Refused(USAGE, f"{folder} has no {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    wanted = names if not only else set(only)
    if lacking := sorted(wanted - files.keys()):
        raise Refused(
            USAGE,
            f"where does {', '.join(lacking)} go? Name the services, or set TIDINGS_SERVICES; or use --only",
        )
    chosen = {name: path for name, path in files.items() if name in wanted}
    where = ", ".join(f"{name} to {path}" for name, path in chosen.items())
    if not confirmed(f"Restore {where}, as they were at {kept.taken_at}?", yes):
        return NO
    put_back(kept, chosen, overwrite=overwrite)
    renewed = None
    if LOG in chosen:
        async with existing_store(settings) as store:
            renewed = await renew(store)
            lineage = await lineage_of(store)
        for name in chosen.keys() - {LOG}:
            async with existing_database(settings, name) as database:
                if database is not None:
                    await adopt(database, name, lineage)
    if json:
        say(facts({"restored": sorted(chosen), "taken_at": kept.taken_at, "log": renewed and renewed.log}))
        return OK
    say(plain(f"Restored {where}, as they were at {kept.taken_at}."))
    if renewed is not None:
        say(f"The log is {renewed.log} from now on, after position {renewed.position}.")
        say("Services that were not restored with it: tidings log adopt SERVICE. Then start everything.")
    return OK


def _files(settings: Settings, services: tuple[str, ...] | list[str]) -> tuple[dict[str, Path], list[str]]:
    """Return SQLite files by name, the log last; and what is kept elsewhere, in words."""
    from tidings.database.engine import file_of

    found: dict[str, Path] = {}
    elsewhere = []
    for service in find_services(services, settings, needed=False).values():
        url = settings.database_of(service.name)
        if file := file_of(url):
            found[service.name] = Path(file)
        else:
            elsewhere.append(f"service {service.name}, in {redact(url)}")
    scheme, _, path = settings.store.partition(":///")
    if scheme.lower() == "sqlite" and path not in ("", ":memory:"):
        found[LOG] = Path(path)
    else:
        elsewhere.append(f"the log, in {redact(settings.store)}")
    if len(set(found.values())) != len(found):
        raise Refused(USAGE, "two services share a database file: copy it with sqlite3's .backup")
    return found, elsewhere
