"""What `plan --push` and `publish` share: their options, what ends a dry run, and asking before anything is pruned."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hubforge.publish._plan import PushPlan

TakeOption = Annotated[
    str | None,
    typer.Option(help="Where people edited what hubforge wrote on a card: `ours` writes it anew, `theirs` keeps it."),
]
PruneFlag = Annotated[bool, typer.Option("--prune", help="Delete files that hubforge did not put there; lists them.")]
ExitCodeFlag = Annotated[
    bool, typer.Option("--exit-code", help="End with 10 when a push would change something, or may.")
]


def side(take: str | None) -> Any:
    from hubforge.errors import HubforgeError

    if take not in (None, "ours", "theirs"):
        raise HubforgeError(f"--take is {take!r}", mend="Give `ours` or `theirs`.")
    return take


def end_push_plan(changes: Sequence[PushPlan], exit_code: bool) -> None:
    """Raise what would stop the push; with --exit-code, end with 10 when there is something to push."""
    for change in changes:
        if refusal := change.refusal:
            raise refusal
    if exit_code and any(change.changes for change in changes):
        raise typer.Exit(10)


def confirm_pruning(changes: Sequence[PushPlan], yes: bool) -> dict[str, frozenset[str]]:
    """What is to be deleted besides, by target, once somebody has seen the list and agreed."""
    from hubforge.errors import PublishError
    from hubforge.show import printable

    listed = [(change, path) for change in changes for path in change.pruned]
    for change, path in listed:
        typer.echo(f"to delete: {change.repo}: {printable(path)}", err=True)
    if listed and not yes:
        if not sys.stdin.isatty():
            raise PublishError("--prune would delete the files above", mend="Add --yes where nobody can be asked.")
        typer.confirm(f"Delete {len(listed)} from the Hub?", abort=True, err=True)
    return {change.target: frozenset(change.pruned) for change in changes}
