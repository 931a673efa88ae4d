"""The verbs of `hubforge`. Everything else is imported once a verb is chosen, so that --help is instant."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hubforge import __version__
from hubforge.cli_hub import hub_app
from hubforge.cli_output import JsonFlag, colour, emit
from hubforge.cli_published import reproduce, verify
from hubforge.cli_push import ExitCodeFlag, PruneFlag, TakeOption, confirm_pruning, end_push_plan, side

if TYPE_CHECKING:
    from hubforge.session import Session

app = typer.Typer(
    name="hubforge",
    help="From a recipe to a published, evaluated, documented, verifiable model on the Hugging Face Hub.",
    epilog="Start with: hubforge init merge my-model.yaml",
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(hub_app, name="hub")

RecipeArgument = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", metavar="RECIPE")]
Steps = Annotated[list[str] | None, typer.Argument(help="Only these steps and what they need.", metavar="[STEP]...")]


@app.callback(invoke_without_command=True)
def options(
    ctx: typer.Context,
    store: Annotated[
        Path | None,
        typer.Option(envvar="HUBFORGE_STORE", help="Folder of the artifacts. Default: .hubforge of the project."),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Ask no network; use what is already here.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")] = "auto",
    memory: Annotated[str, typer.Option(help="Memory a streaming step may hold, such as 2GiB.")] = "2GiB",
    llama_cpp: Annotated[
        Path | None, typer.Option(help="A llama.cpp checkout to convert with.", envvar="HUBFORGE_LLAMA_CPP")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show warnings and errors only.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        typer.echo(f"hubforge {__version__}")
        raise typer.Exit
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())
        raise typer.Exit
    ctx.obj = {"store": store, "offline": offline, "device": device, "memory": memory, "llama_cpp": llama_cpp,
               "quiet": quiet, "debug": debug}  # fmt: skip


def session(ctx: typer.Context, recipe: Path, *, as_json: bool = False) -> Session:
    from hubforge.session import Session

    return Session.open(recipe, as_json=as_json, **ctx.obj)


@app.command(epilog="Example: hubforge init two-stage recipes/poet.yaml")
def init(
    purpose: Annotated[str, typer.Argument(help="merge, two-stage, masks or gguf.")],
    recipe: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    name: Annotated[str | None, typer.Option(help="Name of the release. Default: that of the file.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
) -> None:
    """Write a commented recipe to start from."""
    from hubforge.starters import write_starter

    for path in write_starter(purpose, recipe, name=name, force=force):
        typer.echo(f"wrote {path}")
    typer.echo(f"Next: edit it, then `hubforge check {recipe}`.")


@app.command("import", epilog="Example: hubforge import mergekit.yml my-merge.yaml --run")
def import_(
    ctx: typer.Context,
    config: Annotated[Path, typer.Argument(help="A mergekit configuration.", metavar="MERGEKIT")],
    recipe: Annotated[Path | None, typer.Argument(help="The recipe to write. Default: standard output.")] = None,
    run: Annotated[bool, typer.Option("--run", help="Then run it: lock what is on the Hub, and merge.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a recipe that is there.")] = False,
) -> None:
    """Turn a mergekit configuration into a recipe; what cannot be carried over is named."""
    from hubforge.session import write_import

    text, notes = write_import(config, recipe, force=force, must_write=run)
    for note in notes:
        typer.echo(f"{colour('note', 33)}: {note}", err=True)
    if recipe is None:
        typer.echo(text, nl=False)
        return
    typer.echo(f"wrote {recipe}")
    if run:
        here = session(ctx, recipe)
        if any(not spec.is_local for spec in here.recipe.sources.values()):
            here.lock()
        with here:
            outcome = here.run(None)
        typer.echo(here.path(list(outcome.plan.steps)[-1]))


@app.command(epilog="Examples: hubforge check recipes/demo.yaml · hubforge check --online recipes/demo.yaml")
def check(
    ctx: typer.Context,
    recipe: RecipeArgument,
    online: Annotated[bool, typer.Option("--online", help="Ask the Hub too: sources, write access.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Say everything that is wrong with a recipe, or draw its graph. Nothing is done."""
    from hubforge import show

    here = session(ctx, recipe, as_json=as_json)
    findings = here.check(online=online)
    if as_json:
        emit({"recipe": str(recipe), "ok": True, "notes": findings, "steps": show.graph(here.recipe)})
    else:
        show.print_graph(here.recipe, findings)


@app.command(epilog="Example: hubforge lock recipes/demo.yaml")
def lock(ctx: typer.Context, recipe: RecipeArgument, as_json: JsonFlag = False) -> None:
    """Pin every Hub source to a commit and digests, in RECIPE's .lock.json."""
    path, changes = session(ctx, recipe, as_json=as_json).lock()
    if as_json:
        emit({"lock": str(path), "changes": changes})
        return
    for line in changes:
        typer.echo(line)
    typer.echo(f"wrote {path}" if changes else f"{path} is up to date")


@app.command(epilog="Examples: hubforge plan recipes/demo.yaml · hubforge plan --json recipes/demo.yaml")
def plan(
    ctx: typer.Context,
    recipe: RecipeArgument,
    steps: Steps = None,
    push: Annotated[bool, typer.Option("--push", help="Also what a push would change; asks the Hub.")] = False,
    to: Annotated[str | None, typer.Option(help="Hub to compare with: an address, or `local`.")] = None,
    take: TakeOption = None,
    prune: PruneFlag = False,
    exit_code: ExitCodeFlag = False,
    as_json: JsonFlag = False,
) -> None:
    """Show each step: cached, to resume or to make, and why."""
    from hubforge import show

    here = session(ctx, recipe, as_json=as_json)
    made = here.plan(steps)
    if as_json and not push:
        emit(show.plan_data(made))
    elif not as_json:
        show.print_plan(made)
    if push:
        with here.hub(to) as hub:
            changes = here.plan_push(made, hub, take=side(take), prune=prune)
        if as_json:
            emit({**show.plan_data(made), "push": show.push_data(changes)})
        else:
            show.print_push(changes)
        end_push_plan(changes, exit_code)


@app.command(epilog="Examples: hubforge run recipes/demo.yaml · hubforge run recipes/demo.yaml stages.healed")
def run(ctx: typer.Context, recipe: RecipeArgument, steps: Steps = None, as_json: JsonFlag = False) -> None:
    """Make every step that is not cached, check the gates, render the cards."""
    from hubforge import show

    here = session(ctx, recipe, as_json=as_json)
    with here:
        outcome = here.run(steps)
    if as_json:
        emit(show.outcome_data(outcome))
    else:
        show.print_outcome(outcome)


@app.command(epilog="Example: hubforge card recipes/demo.yaml --templates my-cards/")
def card(
    ctx: typer.Context,
    recipe: RecipeArgument,
    target: Annotated[str | None, typer.Option(help="Only this entry of `publish`.")] = None,
    templates: Annotated[Path | None, typer.Option(help="Folder of templates that replace ours.")] = None,
) -> None:
    """Render the cards from what is made; prints where each lies."""
    for path in session(ctx, recipe).cards(target, templates):
        typer.echo(path)


@app.command(
    epilog="Examples: hubforge publish recipes/demo.yaml · hubforge publish recipes/demo.yaml --to local --dry-run"
)
def publish(
    ctx: typer.Context,
    recipe: RecipeArgument,
    to: Annotated[
        str | None,
        typer.Option(help="Another Hub: its address, or `local` for the embedded one."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what a push would change; runs nothing.")] = False,
    take: TakeOption = None,
    prune: PruneFlag = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Prune without asking.")] = False,
    exit_code: ExitCodeFlag = False,
    templates: Annotated[Path | None, typer.Option(help="Folder of card templates that replace ours.")] = None,
    stage: Annotated[
        bool,
        typer.Option(
            "--stage/--no-stage",
            help="Bring nothing to main before every repository is on the Hub and verified; or commit straight to it.",
        ),
    ] = True,
    patience: Annotated[
        str, typer.Option(help="All the waiting for a Hub that limits or fails, such as 90s, 30m or 2h.")
    ] = "30m",
    serve: Annotated[
        bool | None, typer.Option("--serve/--no-serve", help="With --to local: keep serving. Default: on a terminal.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run, push and verify: the one command."""
    from hubforge import show

    here = session(ctx, recipe, as_json=as_json)
    with here, here.hub(to, patience) as hub:
        if dry_run:
            changes = here.plan_push(here.plan(None), hub, templates=templates, take=side(take), prune=prune)
            here.pause()
            emit(show.push_data(changes)) if as_json else show.print_push(changes)
            end_push_plan(changes, exit_code)
            return
        if here.plan(None).to_make():
            here.check_targets(hub)  # before the work, not after hours of it; else the push itself tells at once
        outcome = here.run(None, templates=templates)
        gone = None
        if prune:
            changes = here.plan_push(outcome.plan, hub, templates=templates, take=side(take), prune=True)
            here.pause()
            gone = confirm_pruning(changes, yes)
            here.resume()
        receipts = here.publish(outcome, hub, templates, stage=stage, take=side(take), prune=gone)
        here.pause()
        if as_json:
            emit({**show.outcome_data(outcome), "published": receipts})
        else:
            show.print_receipts(receipts)
        if to == "local" and (serve if serve is not None else sys.stdout.isatty() and not as_json):
            typer.echo(f"Serving {hub.endpoint} until Ctrl-C.")
            here.wait()
        elif to == "local" and not as_json:
            typer.echo("`hubforge hub serve` shows these pages again.")


app.command(epilog="Examples: hubforge verify me/my-model · hubforge verify me/my-model@v1.0 --deep")(verify)
app.command(epilog="Example: hubforge reproduce me/my-model@v1.0 --into again --source prose=./out/prose-r64")(
    reproduce
)


@app.command(epilog="Examples: hubforge ops · hubforge ops ties · hubforge ops --json")
def ops(
    name: Annotated[str | None, typer.Argument(help="One op: ties, or stages.ties.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Every op with its fields, units and source: the manual, from the code."""
    from hubforge import show

    entries = show.find_ops(name)
    if as_json:
        from hubforge.manual import describe

        emit([describe(entry) for entry in entries])
    else:
        show.print_ops(entries, whole=name is not None)


@app.command(epilog="Example: hubforge schema > recipes/schema.json")
def schema() -> None:
    """The JSON Schema of a recipe, for editors."""
    from hubforge.manual import recipe_schema

    emit(recipe_schema())


@app.command(epilog="Example: hubforge path recipes/demo.yaml stages.healed")
def path(
    ctx: typer.Context,
    recipe: RecipeArgument,
    step: Annotated[str, typer.Argument(help="stages.healed, or just healed; a source: sources.instruct.")],
) -> None:
    """Print the folder of a step's artifact."""
    typer.echo(session(ctx, recipe).path(step))


@app.command(epilog="Examples: hubforge gc --dry-run · hubforge gc recipes/*.yaml")
def gc(
    ctx: typer.Context,
    recipes: Annotated[list[Path] | None, typer.Argument(help="Keep what these need. Default: recipes/*.yaml.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove the artifacts that no recipe needs any more."""
    from hubforge import show
    from hubforge.garbage import collect_garbage

    removed, kept = collect_garbage(recipes, ctx.obj["store"], dry_run=dry_run)
    emit(show.gc_data(removed, kept, dry_run)) if as_json else show.print_gc(removed, kept, dry_run)


@app.command(epilog="Example: hubforge doctor --json")
def doctor(as_json: JsonFlag = False) -> None:
    """What is installed, which devices and tokens (by name only) there are, and what is missing for which op."""
    from hubforge import diagnosis

    found = diagnosis.examine()
    emit(found) if as_json else diagnosis.print_findings(found)


@app.command(epilog="Example: hubforge lab .lab")
def lab(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(help="Where the family goes.")] = Path(".lab"),
    seed: Annotated[int, typer.Option(help="Seed of the data and of the training.")] = 0,
) -> None:
    """Train the lab's family of tiny real models: pretrained, instruct, three adapters. Minutes, once."""
    from hubforge.session import build_lab

    build_lab(folder, seed, quiet=ctx.obj["quiet"])
    typer.echo(folder)


def main() -> None:
    """The command. Errors of ours end with their exit code and no traceback."""
    from hubforge.errors import HubforgeError

    debug = "--debug" in sys.argv
    try:
        app()
    except HubforgeError as error:
        if debug:
            raise
        sys.stderr.write(f"{colour('error', 31)}: {error}\n")
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == 130:
            sys.stderr.write("interrupted; what was complete is kept, and the next run goes on from it\n")
        raise
    except Exception as error:
        if debug:
            raise
        sys.stderr.write(
            f"{colour('error', 31)}: a bug in hubforge: {type(error).__name__}: {error}\n"
            "  Please report it with the output of the same command and --debug.\n"
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
