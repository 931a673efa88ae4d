"""`hubforge hub`: the verbs of the embedded Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

hub_app = typer.Typer(
    help="The embedded Hub: the Hub's protocol on a folder, for trying, staging and testing.", no_args_is_help=True
)


@hub_app.command("serve", epilog="Example: hubforge hub serve --port 8000")
def hub_serve(
    folder: Annotated[Path | None, typer.Option(help="Where it keeps everything. Default: the user's data.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; a public one needs --tokens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = 8000,
    settings: Annotated[
        Path | None, typer.Option(help="JSON: users, quotas, publishers; `hubforge.hub.config` documents it.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="File of tokens and whose they are. Default: any token, one user.")
    ] = None,
) -> None:
    """Serve the embedded Hub until Ctrl-C."""
    from dataclasses import replace

    from hubforge.hub import HubSettings, read_settings, read_tokens, serve
    from hubforge.places import hub_folder

    where = folder or hub_folder()
    chosen = read_settings(settings) if settings else HubSettings()
    if tokens:
        chosen = replace(chosen, tokens=read_tokens(tokens))

    def say(address: str) -> None:
        typer.echo(f"{address} serves {where} until Ctrl-C")

    serve(where, host=host, port=port, settings=chosen, ready=say)


@hub_app.command("gc", epilog="Example: hubforge hub gc --dry-run")
def hub_gc(
    folder: Annotated[Path | None, typer.Option(help="The Hub's folder. Default: the user's data.")] = None,
    hours: Annotated[float, typer.Option(help="Leave alone what is younger.")] = 24,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
) -> None:
    """Free what no history of the embedded Hub holds any more; safe while it serves."""
    from hubforge.hub import collect
    from hubforge.places import hub_folder

    found = collect(folder or hub_folder(), older=hours * 3600, dry_run=dry_run)
    what = "to free" if dry_run else "freed"
    typer.echo(f"{found.bytes / 1e6:.1f} MB {what}: {found.files} files, {found.commits} commits")
