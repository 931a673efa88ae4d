"""Events, shown: a live line on a terminal, plain lines in a pipe, groups in GitHub Actions, JSON lines for scripts."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hubforge.events import Cached, Event, Failed, Finished, Note, Progress, Started, Warned

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID


class Reporter(AbstractContextManager["Reporter"]):
    """Shows events; closes cleanly whatever happens."""

    def __call__(self, event: Event) -> None:
        raise NotImplementedError

    def __exit__(self, *problem: object) -> None:
        return None


def choose(*, as_json: bool = False, quiet: bool = False, stream: IO[str] | None = None) -> Reporter:
    """The reporter for where the output goes. Progress goes to standard error: standard output is for results."""
    stream = stream or sys.stderr
    if as_json:
        return Json(stream)
    if quiet:
        return Quiet()
    if os.environ.get("GITHUB_ACTIONS") == "true":
        return GitHub(stream)
    return Terminal() if stream.isatty() and os.environ.get("TERM") != "dumb" else Plain(stream)


class Quiet(Reporter):
    """Shows warnings and nothing else."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, Warned):
            sys.stderr.write(f"warning: {event.step}: {event}\n")


class Pace:
    """How long what is under way will still take, by how fast it has gone since it was first heard of."""

    def __init__(self) -> None:
        self.what: tuple[object, ...] = ()
        self.since = self.done = 0.0

    def left(self, event: Progress) -> str:
        """ ", 12 min left"; "" while that is not known, or is said already."""
        now, what = time.monotonic(), (event.step, event.unit, event.total)
        if what != self.what or event.done < self.done:
            # A run that was resumed begins far on: what was done before says nothing of now.
            self.what, self.since, self.done = what, now, event.done
        spent, more = now - self.since, event.done - self.done
        if event.rate is not None or not event.total or event.done >= event.total or more <= 0 or spent < 5:
            return ""
        return f", {duration(spent / more * (event.total - event.done))} left"


class Json(Reporter):
    """One JSON object a line: {"event": "Started", "step": ..., ...}."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.last = 0.0

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress) and event.done != event.total:
            if time.monotonic() - self.last < 0.5:
                return
            self.last = time.monotonic()
        self.stream.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")
        self.stream.flush()


class Plain(Reporter):
    """Lines without colour; progress, and what is left of it, at most every ten seconds."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.last = time.monotonic()
        self.pace = Pace()

    def line(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()

    def __call__(self, event: Event) -> None:
        match event:
            case Started(step, reason, number, count):
                self.last = time.monotonic()
                self.line(f"[{number}/{count}] {step}: {reason}")
            case Cached(step):
                self.line(f"        {step}: cached")
            case Finished(step, seconds, summary):
                self.line(f"        {step}: done in {duration(seconds)}{f', {summary}' if summary else ''}")
            case Failed(step, what):
                self.line(f"        {step}: failed: {what}")
            case Note(_, text):
                self.line(f"        {text}")
            case Warned():
                self.line(f"        warning: {event}")
            case Progress():
                left = self.pace.left(event)
                if time.monotonic() - self.last > 10:
                    self.last = time.monotonic()
                    self.line(f"        {progress_text(event)}{left}".rstrip())


class GitHub(Plain):
    """GitHub Actions: a foldable group a step, warnings as annotations, and a table in the step summary."""

    def __init__(self, stream: IO[str]) -> None:
        super().__init__(stream)
        self.rows: list[str] = []

    def __call__(self, event: Event) -> None:
        match event:
            case Started(step, reason, number, count):
                self.line(f"::group::[{number}/{count}] {step} ({reason})")
            case Finished(step, seconds, summary):
                self.rows.append(f"| `{step}` | made | {duration(seconds)} | {summary} |")
                super().__call__(event)
                self.line("::endgroup::")
            case Failed(step, what):
                self.rows.append(f"| `{step}` | **failed** | | {what.splitlines()[0]} |")
                self.line("::endgroup::")
                self.line(f"::error title={step}::{_escape(what)}")
            case Cached(step):
                self.rows.append(f"| `{step}` | cached | | |")
                super().__call__(event)
            case Warned(step, text, where):
                file, _, line = where.rpartition(":")
                place = f"file={file},line={line}," if file else ""
                self.line(f"::warning {place}title={step}::{_escape(text)}")
            case _:
                super().__call__(event)

    def __exit__(self, *problem: object) -> None:
        summary = os.environ.get("GITHUB_STEP_SUMMARY")
        if summary and self.rows:
            with Path(summary).open("a", encoding="utf-8") as stream:
                stream.write("| step | | time | |\n|---|---|---|---|\n" + "\n".join(self.rows) + "\n")


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


class Terminal(Reporter):
    """A live line for the step at work, and one line for each that is done."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self.console = console or Console(stderr=True, highlight=False)
        self.bars: RichProgress = RichProgress(
            SpinnerColumn(finished_text=" "),
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            TextColumn("[dim]{task.fields[amount]}"),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
        )
        self.task: TaskID | None = None
        self.pace = Pace()
        self.last = 0.0

    def __enter__(self) -> Terminal:
        self.bars.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self.bars.stop()

    def clear(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None

    def __call__(self, event: Event) -> None:
        from rich.markup import escape

        match event:
            case Started(step, reason, number, count):
                self.clear()
                self.task = self.bars.add_task(f"{number}/{count} {step}", total=None, amount=escape(reason))
            case Cached(step):
                self.console.print(f"[dim]= {step}  cached[/dim]")
            case Finished(step, seconds, summary):
                self.clear()
                about = f"  [dim]{escape(summary)}[/dim]" if summary else ""
                self.console.print(f"[green]✓[/green] {step}  [dim]{duration(seconds)}[/dim]{about}")
            case Failed(step):
                self.clear()
                self.console.print(f"[red]✗[/red] {step}")
            case Note(_, text):
                self.console.print(f"  [dim]{escape(text)}[/dim]")
            case Warned(step):
                self.console.print(f"[yellow]![/yellow] {step}: {escape(str(event))}")
            case Progress(step, _, done, total):
                left = self.pace.left(event)
                if self.task is None:
                    self.task = self.bars.add_task(step, total=None, amount="")
                elif time.monotonic() - self.last < 0.1 and done != total:
                    return
                self.last = time.monotonic()
                text = escape(f"{progress_text(event)}{left}".strip())
                self.bars.update(self.task, total=total, completed=done, amount=text)


def progress_text(event: Progress) -> str:
    """ "model.safetensors 1.2/4.0 GB, 3.1/16.0 GB in all, 85.0 MB/s, 2 min 32 s left", as far as it is known."""
    whole = amount(event.done, event.total, event.unit)
    if event.part_done is not None:
        part = amount(event.part_done, event.part_total, event.unit)
        text = f"{event.what} {part}, {whole} in all"
    else:
        text = f"{event.what} {whole}".strip()
    if event.rate:
        text += f", {amount(event.rate, None, event.unit)}/s"
        if event.total and event.done < event.total:
            text += f", {duration((event.total - event.done) / event.rate)} left"
    return text


def amount(done: float, total: float | None, unit: str) -> str:
    """ "12/200 prompts", "1.2/16.0 GB"."""
    if unit == "B":
        scale, name = next(
            (
                (scale, name)
                for scale, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
                if max(done, total or 0) >= scale
            ),
            (1.0, "B"),
        )
        digits = 1 if scale > 1 else 0
        return f"{done / scale:.{digits}f}{f'/{total / scale:.{digits}f}' if total else ''} {name}"
    return f"{done:.0f}{f'/{total:.0f}' if total else ''} {unit}".rstrip()


def duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
