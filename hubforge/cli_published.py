"""The verbs that take a published repository and no recipe: `verify` and `reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hubforge.cli_output import JsonFlag, emit

RepoArgument = Annotated[str, typer.Argument(help="namespace/name, or namespace/name@revision.")]
FolderOption = Annotated[str | None, typer.Option(help="One folder of a mask repository.")]
HubOption = Annotated[str | None, typer.Option(help="Another Hub: its address, or `local`.")]


def verify(
    ctx: typer.Context,
    repo: RepoArgument,
    folder: FolderOption = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Download every file and hash it; always done on this machine.")
    ] = False,
    to: HubOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Compare a published repository, byte for byte, with the release file in it."""
    from hubforge import show
    from hubforge.places import open_hub
    from hubforge.session import Session
    from hubforge.verify import verify as verify_repo

    name, _, revision = repo.partition("@")
    reporter = Session.reporter(as_json=as_json, quiet=ctx.obj["quiet"])
    with open_hub(to) as hub, reporter:
        found = verify_repo(name, hub, revision=revision or None, folder=folder, deep=deep or None, report=reporter)
    emit(show.verified_data(found)) if as_json else show.print_verified(found)


def reproduce(
    ctx: typer.Context,
    repo: RepoArgument,
    into: Annotated[Path, typer.Option(help="Folder for the recipe, the lock and what is made.")] = Path("reproduced"),
    source: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a source that was local.")] = None,
    folder: FolderOption = None,
    everything: Annotated[bool, typer.Option("--all", help="Repeat the evals too.")] = False,
    to: HubOption = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a published model again from its own page, and compare every byte."""
    from hubforge import reproduce as again
    from hubforge import show
    from hubforge.places import open_hub
    from hubforge.session import Session

    name, _, revision = repo.partition("@")
    reporter = Session.reporter(as_json=as_json, quiet=ctx.obj["quiet"])
    with open_hub(to) as hub, reporter:
        release = again.fetch_release(name, hub, revision=revision or None, folder=folder, report=reporter)
    recipe = again.write_recipe(release, into, again.read_sources(source or []))
    ctx.obj["store"] = ctx.obj["store"] or into / ".hubforge"
    here = Session.open(recipe, as_json=as_json, **ctx.obj)
    with here:
        compared = again.reproduce(here, release, everything=everything)
    if as_json:
        emit([vars(one) for one in compared])
    else:
        show.print_compared(compared)
    again.check(compared)
