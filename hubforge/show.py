"""What the verbs print: tables for people, plain data for scripts. Fits 80 columns; colours only on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hubforge import catalog
from hubforge.errors import RecipeError
from hubforge.op import TensorOp
from hubforge.plan import Plan, op_name
from hubforge.recipe import Recipe

if TYPE_CHECKING:
    from hubforge.publish._plan import PushPlan
    from hubforge.reproduce import Compared
    from hubforge.session import Outcome
    from hubforge.verify import VerifyReport

console = Console(highlight=False, soft_wrap=False)
_MARK = {
    "cached": "[dim]=[/dim]",
    "fused": "[cyan]·[/cyan]",
    "make": "[green]+[/green]",
    "resume": "[yellow]~[/yellow]",
}


def table(*columns: str) -> Table:
    made = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def some(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def graph(recipe: Recipe) -> list[dict[str, Any]]:
    """Each step with its op and what it uses."""
    return [
        {"step": node.name, "op": op_name(node), "makes": node.op.makes, "uses": sorted(set(node.inputs.values()))}
        for node in recipe.nodes.values()
    ]


def print_graph(recipe: Recipe, notes: Sequence[str]) -> None:
    rows = table("step", "op", "uses")
    for name, spec in recipe.sources.items():
        rows.add_row(f"[cyan]sources.{name}[/cyan]", spec.kind, escape(spec.value))
    for row in graph(recipe):
        uses = ", ".join(use.partition(".")[2] for use in row["uses"])
        rows.add_row(row["step"], row["op"].partition(".")[2], escape(uses))
    for name, target in recipe.targets.items():
        uses = ", ".join(entry.partition(".")[2] for entry in target.entries)
        rows.add_row(f"[magenta]publish.{name}[/magenta]", target.op.repo, escape(uses))  # type: ignore[attr-defined]
    console.print(rows)
    for gate in recipe.gates:
        console.print(f"[dim]gate[/dim]  {escape(gate.text)}")
    for note in notes:
        console.print(f"[yellow]note[/yellow]  {escape(note)}")
    console.print(f"[green]{recipe.path} is sound[/green]: {some(len(recipe.nodes), 'step')}")


def plan_data(plan: Plan) -> dict[str, Any]:
    return {
        "recipe": plan.recipe.name,
        "store": str(plan.store.root),
        "sources": {
            name: {"kind": source.kind, "key": source.key, "commit": source.commit}
            for name, source in plan.sources.items()
        },
        "steps": [
            {"step": step.name, "op": op_name(step.node), "status": step.status, "reason": step.reason,
             "key": step.key, "inputs": dict(step.node.inputs), "unrounded": sorted(step.unrounded),
             "fused_into": list(step.fused_into), "stored": step.stored}
            for step in plan.steps.values()
        ],
        "to_make": len(plan.to_make()),
    }  # fmt: skip


def print_plan(plan: Plan) -> None:
    rows = table("", "step", "key", "why")
    merges = [step for step in plan.steps.values() if isinstance(step.op, TensorOp)]
    for step in plan.steps.values():
        reason = "cached" if step.status == "cached" else step.reason
        if step.status == "fused":
            reason = f"in one pass with {', '.join(name.partition('.')[2] for name in step.fused_into)}"
        elif step.stored and any(step.name in other.node.inputs.values() for other in merges):
            reason += f"; stored: {step.stored}"
        style = "dim" if step.status == "cached" else ""
        rows.add_row(_MARK[step.status], step.name, step.key[:8], escape(reason), style=style)
    console.print(rows)
    todo = len(plan.to_make())
    cached = sum(step.status == "cached" for step in plan.steps.values())
    fused = len(plan.steps) - todo - cached
    rest = f"{cached} cached" + (f", {fused} in the pass of another" if fused else "")
    console.print(f"{some(todo, 'step')} to make, {rest}" if todo else f"nothing to make: {rest}")


def outcome_data(outcome: Outcome) -> dict[str, Any]:
    data = {**plan_data(outcome.plan), "made": list(outcome.made)}
    if outcome.release is not None:
        data["metrics"] = [record.model_dump(mode="json", exclude_none=True) for record in outcome.release.metrics]
        data["gates"] = [record.model_dump(mode="json") for record in outcome.release.gates]
        data["cards"] = {name: str(path) for name, path in outcome.cards.items()}
    return data


def print_outcome(outcome: Outcome) -> None:
    release = outcome.release
    if release is not None and release.metrics:
        rows = table("eval", "model", "metric", "value", "vs. baseline", "")
        for record in release.metrics:
            difference, verdict = "", ""
            if record.difference is not None:
                difference = f"{record.difference:+.3g}"
                if record.difference_low is not None and record.difference_high is not None:
                    difference += f" [{record.difference_low:+.3g}, {record.difference_high:+.3g}]"
                if record.significant is False:
                    verdict = "n.s."
                elif record.significant and record.higher_is_better is not None:
                    better = (record.difference > 0) == record.higher_is_better
                    verdict = "[green]better[/green]" if better else "[red]worse[/red]"
            rows.add_row(record.eval, record.on, record.metric, f"{record.value:.3g}", difference, verdict)
        console.print(rows)
    for gate in release.gates if release else ():
        console.print(f"[green]gate holds[/green]  {escape(gate.text)}  ({gate.value:.4g} on {gate.on})")
    for name, path in outcome.cards.items():
        console.print(f"[dim]card[/dim]  {name}: {path}", soft_wrap=True)


def push_data(changes: Sequence[PushPlan]) -> list[dict[str, Any]]:
    return [change.as_json() for change in changes]


def print_push(changes: Sequence[PushPlan]) -> None:
    """What a push would add, replace, delete and leave, per repository, and the diff of a card that is replaced."""
    for change in changes:
        new = "" if change.exists else f"  [yellow]new, {'private' if change.private else 'public'}[/yellow]"
        inside = f"/{change.folder}" if change.folder else ""
        console.print(f"[bold]{escape(change.repo + inside)}[/bold]{new}")
        for mark, files in (("[green]+[/green]", change.added), ("[yellow]~[/yellow]", change.replaced)):
            for file in files:
                left_out = "  [red]a .gitignore there keeps it out[/red]" if file.path in change.ignored else ""
                console.print(f"  {mark} {escape(file.path)}  [dim]{size(file.size)}[/dim]{left_out}", soft_wrap=True)
        for file in change.deleted:
            why = ", not of this release" if file.path in change.pruned else ""
            path = escape(printable(file.path))
            console.print(f"  [red]-[/red] {path}  [dim]{size(file.size)}{why}[/dim]", soft_wrap=True)
        for path in change.kept:
            path = escape(printable(path))
            console.print(f"  = {path}  [dim]changed on the Hub since; left alone[/dim]", soft_wrap=True)
        for path in change.foreign[:20]:
            console.print(f"  = [dim]{escape(printable(path))}  not ours; left alone[/dim]", soft_wrap=True)
        if len(change.foreign) > 20:
            console.print(f"  = [dim]and {len(change.foreign) - 20} more that are not ours[/dim]")
        if change.tag is not None:
            does = {"create": "would be set", "keep": "is there", None: "cannot be known yet"}[change.tag_change]
            console.print(f"  [dim]tag[/dim] {escape(change.tag)}  [dim]{does}[/dim]")
        if change.upload.collection is not None and change.links.collection is not None:
            joining = {"create": "would be made, and joined", "join": "would be joined", "keep": "has it"}
            name = escape(printable(change.upload.collection))
            text = f"  [dim]collection[/dim] {name}  [dim]{joining[change.links.collection]}[/dim]"
            console.print(text, soft_wrap=True)
        for old in change.upload.supersedes:
            does_it = f"would get new_version: {change.repo}" if old in change.links.superseded else "points here"
            console.print(f"  [dim]supersedes[/dim] {escape(old)}  [dim]{escape(does_it)}[/dim]", soft_wrap=True)
        if change.exists and change.replaced and not change.conflicts:
            print_diff(change.card_diff)
        if change.unknown:
            some_steps = ", ".join(change.unknown[:6]) + (" ..." if len(change.unknown) > 6 else "")
            text = f"not made yet: {some_steps}; what they give, and the card, cannot be known"
            console.print(f"  [yellow]?[/yellow] {escape(text)}", soft_wrap=True)
        console.print(f"  [dim]{_totals(change)}[/dim]", soft_wrap=True)


def _totals(change: PushPlan) -> str:
    parts = [
        f"{len(files)} {what}, {size(sum(file.size for file in files))}"
        for what, files in (("added", change.added), ("replaced", change.replaced), ("deleted", change.deleted))
        if files
    ]
    left = f"{some(len(change.unchanged), 'file')} unchanged, {size(sum(file.size for file in change.unchanged))}"
    others = len(change.foreign) + len(change.kept) + change.others
    parts += [left] + ([f"{others} left alone"] if others else [])
    return f"{'; '.join(parts)}; {size(change.upload_bytes)} to upload"


def print_diff(diff: str) -> None:
    """A unified diff, coloured on a terminal."""
    from rich.text import Text

    styles = {"+": "green", "-": "red", "@": "cyan"}
    for line in diff.splitlines():
        style = "bold" if line.startswith(("+++ ", "--- ")) else styles.get(line[:1], "dim")
        console.print(Text(f"    {line}", style=style), soft_wrap=True)


def printable(text: str) -> str:
    """A name from a Hub, safe on a terminal."""
    return text if text.isprintable() else repr(text)


def print_receipts(receipts: Sequence[dict[str, Any]]) -> None:
    for receipt in receipts:
        pushed = len(receipt["pushed"])
        what = f"{some(pushed, 'file')}, {size(receipt['bytes'])}" if pushed else "unchanged"
        tag = f" {receipt['tag']}" if receipt.get("tag") else ""
        commit = (receipt.get("commit") or "")[:8]
        console.print(f"[green]✓[/green] {receipt['url']}  [dim]{commit}{tag}, {what}, verified[/dim]", soft_wrap=True)


def verified_data(found: VerifyReport) -> dict[str, Any]:
    return found.as_json()


def print_verified(found: VerifyReport) -> None:
    for one in found.folders:
        inside = f"/{one.folder}" if one.folder else ""
        how = "every byte downloaded and hashed" if found.deep else "digests as the Hub holds them"
        what = f"{some(one.files, 'file')}, {size(one.bytes)}, {how}"
        console.print(f"[green]✓[/green] {escape(found.repo + inside)}  [dim]{what}[/dim]", soft_wrap=True)
        for note in one.notes:
            console.print(f"  [yellow]note[/yellow] {escape(note)}", soft_wrap=True)
    if found.unlisted:
        console.print(f"  [dim]{some(len(found.unlisted), 'file')} that no release file speaks of[/dim]")
    console.print(f"[green]verified[/green] at commit {found.commit}")


def print_compared(compared: Sequence[Compared]) -> None:
    """Which files came out the same."""
    for one in compared:
        mark = "[green]=[/green]" if one.same else "[red]≠[/red]" if one.exact else "[yellow]≠[/yellow]"
        about = "" if one.same or one.exact else "  [dim]this op does not promise equal bytes on another machine[/dim]"
        console.print(f"{mark} {one.step}  {escape(one.path)}{about}", soft_wrap=True)
    same = sum(one.same for one in compared)
    console.print(f"{same} of {some(len(compared), 'file')} came out the same, byte for byte")


def find_ops(name: str | None) -> list[catalog.Entry]:
    """The ops of that name ("ties" or "stages.ties"), or all. Raises RecipeError when there is none."""
    entries = catalog.everything()
    if name is None:
        return entries
    found = [entry for entry in entries if name in (entry.name, f"{entry.section}.{entry.name}")]
    if not found:
        from difflib import get_close_matches

        close = get_close_matches(name, [entry.name for entry in entries], n=1)
        mend = f"Did you mean {close[0]!r}?" if close else "`hubforge ops` lists them all."
        raise RecipeError(f"there is no op {name!r}", mend=mend)
    return found


def print_ops(entries: Sequence[catalog.Entry], *, whole: bool) -> None:
    if not whole:
        rows = table("section", "op", "makes", "what it does")
        section = ""
        for entry in entries:
            first = entry.section if entry.section != section else ""
            section = entry.section
            rows.add_row(first, f"[bold]{entry.name}[/bold]", entry.op.makes, escape(catalog.summary(entry.op)))
        console.print(rows)
        console.print("[dim]hubforge ops NAME shows one with its fields.[/dim]")
        return
    from hubforge.manual import describe

    for entry in entries:
        data = describe(entry)
        console.print(f"[bold]{entry.section}.{entry.name}[/bold]  makes: {data['makes']}")
        console.print(escape(data["about"]))
        if data["formula"]:
            console.print(f"\n    {escape(data['formula'])}\n")
        if data["source"]:
            console.print(f"[dim]Source: {escape(data['source'])}[/dim]")
        rows = table("field", "type", "default", "")
        for item in data["fields"]:
            default = "[red]required[/red]" if item["required"] else escape(_default(item["default"]))
            rows.add_row(item["name"], escape(item["type"]), default, escape(item["description"]))
        console.print(rows)
        console.print()


def _default(value: Any) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def gc_data(removed: Sequence[tuple[str, int]], kept: Sequence[tuple[str, int]], dry_run: bool) -> dict[str, Any]:
    return {
        "dry_run": dry_run,
        "removed": [{"what": name, "bytes": count} for name, count in removed],
        "kept": [{"what": name, "bytes": count} for name, count in kept],
    }


def print_gc(removed: Sequence[tuple[str, int]], kept: Sequence[tuple[str, int]], dry_run: bool) -> None:
    for name, count in removed:
        console.print(f"{'would remove' if dry_run else 'removed'} {escape(name)}  [dim]{size(count)}[/dim]")
    freed, left = sum(count for _, count in removed), sum(count for _, count in kept)
    console.print(
        f"{size(freed)} {'to free' if dry_run else 'freed'}, {size(left)} kept ({some(len(kept), 'artifact')})"
    )
