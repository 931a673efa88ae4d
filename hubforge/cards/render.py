"""From a release to the files of a card: README.md and its pictures, the same bytes every time."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, FileSystemLoader, StrictUndefined, TemplateError, TemplateNotFound

from hubforge.cards import components, frontmatter, making, markdown, masks, numbers, provenance, quants, results, usage
from hubforge.cards.bounds import BoundedEnvironment, bounded
from hubforge.cards.licenses import bearing_licenses, check_license, inherited_license
from hubforge.cards.lineage import Lineage, find_target
from hubforge.cards.pictures import results_picture
from hubforge.cards.pipeline import pipeline_picture
from hubforge.cards.training import training_pictures
from hubforge.errors import HubforgeError
from hubforge.release import FILE_NAME, SUMS_NAME, Release
from hubforge.sections import wrap, wrap_rest

README = "README.md"
_SECTION = re.compile(r"sections/(\d+-[\w-]+?)(?:\.(model|adapter|mask|gguf))?\.md\.j2")


def render(
    release: Release, target: str, *, siblings: Sequence[Release] = (), templates: Path | None = None
) -> dict[str, bytes]:
    """The card of one target: path in the repository -> bytes, README.md first, then its pictures.

    siblings: for a mask repository, the releases of its other folders. templates: a folder whose page templates and
    sections take the place of those of the same name, or come besides. Raises HubforgeError for an unknown target,
    and for a template that is wrong, naming it and the line.
    """
    lineage = Lineage(release, find_target(release, target))
    pictures = draw(lineage)
    # Our own templates are known to end, and a limit on memory is one for the whole process.
    with nullcontext() if templates is None else bounded():
        page = _page(lineage, pictures, siblings, _environment(templates))
    return {README: page.encode(errors="replace"), **{path: drawn.encode() for path, drawn in sorted(pictures.items())}}


def templates_folder() -> Path:
    """Where the templates are: in the installed package, or at the top of a source checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_cards", package.parent / "cards"):
        if (folder / "model.md.j2").is_file():
            return folder
    raise HubforgeError(
        "the card templates are missing",
        where=str(package),
        mend="Install hubforge again, or run it from its checkout.",
    )


def draw(lineage: Lineage) -> dict[str, str]:
    """The pictures of a card: path in the repository -> SVG."""
    if lineage.target.kind == "mask":
        return masks.mask_pictures(lineage)
    pictures = {"assets/pipeline.svg": pipeline_picture(lineage)}
    if lineage.entries:
        pictures["assets/results.svg"] = results_picture(lineage, lineage.entries[0])
    pictures |= training_pictures(lineage)
    return {path: drawn for path, drawn in pictures.items() if drawn}


def _environment(templates: Path | None) -> BoundedEnvironment:
    if templates is not None and not templates.is_dir():
        raise HubforgeError(f"the folder of card templates {str(templates)!r} does not exist", where=str(templates))
    folders = [folder for folder in (templates, templates_folder()) if folder is not None]
    environment = BoundedEnvironment(
        loader=ChoiceLoader([FileSystemLoader(folder) for folder in folders]),
        undefined=StrictUndefined,
        autoescape=False,  # the output is Markdown; the filters below make strings safe for it
        finalize=lambda value: "" if value is None else value,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=False,
    )
    environment.filters.update(
        text=markdown.text,
        code=markdown.code,
        prose=markdown.prose,
        link=markdown.link,
        linkify=markdown.linkify,
        repo_link=markdown.repo_link,
        fence=markdown.fence,
        table=markdown.table,
        size=numbers.size,
        count=numbers.count,
        big_count=numbers.big_count,
        short=numbers.short,
        share=numbers.share,
        duration=numbers.duration,
        py=_python_string,
        sh=lambda value: shlex.quote(str(value)),
        plain=numbers.plain,
    )
    return environment


def _python_string(value: object) -> str:
    """The value as a Python string literal, in double quotes unless that would need more escapes."""
    words = str(value)
    return repr(words) if '"' in words and "'" not in words else json.dumps(words, ensure_ascii=False)


def _page(
    lineage: Lineage, pictures: dict[str, str], siblings: Sequence[Release], environment: BoundedEnvironment
) -> str:
    kind = lineage.target.kind
    names = _context(lineage, pictures, siblings)

    def sections(leave_out: Sequence[str] = ()) -> str:
        found = _sections(environment.list_templates(), kind)
        parts = [(name, _render(environment, path, names).strip()) for name, path in found if name not in leave_out]
        return "\n".join(wrap(name, tidy(part)) for name, part in _distinct(parts) if part)

    page = _render(environment, f"{kind}.md.j2", {**names, "sections": sections})
    return tidy(wrap_rest(tidy(page)))


def _distinct(parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those sections, with a number behind a name that was there already."""
    names = [name for name, _ in parts]
    return [
        (f"{name}-{before + 1}" if (before := names[:index].count(name)) else name, text)
        for index, (name, text) in enumerate(parts)
    ]


def tidy(page: str) -> str:
    """The page with single blank lines between blocks and no spaces at line ends; fenced blocks stay as they are."""
    lines: list[str] = []
    fence = ""
    for line in page.strip().split("\n"):
        marks = re.match(r" {0,3}(`{3,}|~{3,})", line)
        if marks and not fence:
            fence = marks[1]
        elif marks and line.strip().startswith(fence) and not line.strip().strip(fence[0]):
            fence = ""
        elif not fence:
            line = line.rstrip()
            if not line and lines and not lines[-1]:
                continue
        lines.append(line)
    return "\n".join(lines).strip() + "\n"


def _sections(templates: Sequence[str], kind: str) -> list[tuple[str, str]]:
    """Name and path of each section of a page of that kind, in order.

    `NN-name.KIND.md.j2` takes the place of `NN-name.md.j2`.
    """
    found: dict[str, str] = {}
    for name in templates:
        match = _SECTION.fullmatch(name)
        if match and (match[2] == kind or (match[2] is None and match[1] not in found)):
            found[match[1]] = name
    return [(key.split("-", 1)[1], found[key]) for key in sorted(found)]


def _render(environment: BoundedEnvironment, name: str, names: dict[str, Any]) -> str:
    """One template rendered; whatever goes wrong in it becomes an error naming the template and the line."""
    try:
        return environment.get_template(name).render(names)
    except HubforgeError:
        raise
    except TemplateNotFound as error:
        raise HubforgeError(f"the template {error.name!r} is missing", where=name) from error
    except TemplateError as error:
        path, line = getattr(error, "filename", None), getattr(error, "lineno", None)
        if line is None:
            path, line = _failing_line(error, name)
        raise _template_error(error, path or name, line) from error
    except Exception as error:  # a filter or a comparison given what it cannot take; the sandbox's refusals too
        path, line = _failing_line(error, name)
        raise _template_error(error, path or name, line) from error


def _template_error(error: Exception, path: str, line: int | None) -> HubforgeError:
    said = "it takes too much memory" if isinstance(error, MemoryError) else " ".join(str(error).split())[:500]
    return HubforgeError(
        f"the card template cannot be rendered: {said}",
        where=f"{path}:{line}" if line else path,
        mend="docs/cards.md lists what a template may use.",
    )


def _failing_line(error: BaseException, name: str) -> tuple[str | None, int | None]:
    """The last frame of the traceback that lies in a template: Jinja gives them the template's path and line."""
    place: tuple[str | None, int | None] = (None, None)
    trace = error.__traceback__
    while trace is not None:
        path = trace.tb_frame.f_code.co_filename
        if path.endswith(".md.j2"):
            place = (path, trace.tb_lineno)
        trace = trace.tb_next
    return place if place[0] else (name, None)


def _context(lineage: Lineage, pictures: dict[str, str], siblings: Sequence[Release]) -> dict[str, Any]:
    """All that a template may use; docs/cards.md says what each is."""
    release, target = lineage.release, lineage.target
    return {
        "release": release,
        "target": target,
        "card": release.card,
        "primary": usage.is_primary(lineage),
        "title": usage.title(lineage),
        "front_matter": frontmatter.dump(frontmatter.front_matter(lineage)),
        "glance": usage.glance(lineage),
        "usage": usage.usage(lineage),
        "files": usage.file_rows(lineage, pictures),
        "pictures": sorted(pictures),
        "evals": results.eval_views(lineage),
        "gates": results.gate_rows(lineage),
        "models": components.model_rows(lineage),
        "adapters": components.adapter_rows(lineage),
        "steps": making.step_views(lineage),
        "quants": quants.quant_rows(lineage) if target.kind == "gguf" else [],
        "quant_notes": quants.quant_notes(lineage) if target.kind == "gguf" else [],
        "prompt_format": quants.prompt_format(lineage) if target.kind == "gguf" else "",
        "quant_evals": quants.quant_evals(lineage) if target.kind == "gguf" else [],
        "folders": masks.folder_views(lineage, siblings) if target.kind == "mask" else [],
        "inputs": provenance.input_rows(lineage),
        "step_rows": provenance.step_rows(lineage),
        "versions": provenance.versions(lineage),
        "machine": provenance.one_machine(lineage),
        "commands": provenance.commands(lineage),
        "recipe_commits": provenance.recipe_commits(lineage),
        "license": inherited_license(release, target.name),
        "license_inputs": bearing_licenses(release, target.name),
        "license_problems": check_license(release, target.name),
        "references": usage.references(lineage),
        "release_file": lineage.place(FILE_NAME),
        "sums_file": lineage.place(SUMS_NAME),
    }
