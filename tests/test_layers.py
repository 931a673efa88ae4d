"""The house holds: imports go down only, and the parts of layer 3 never import one another."""

import ast
from pathlib import Path

import pytest

import hubforge

ROOT = Path(hubforge.__file__).parent
LAYERS = {
    "cli": 6, "cli_hub": 6, "cli_output": 6, "cli_published": 6, "cli_push": 6, "__main__": 6,
    "session": 5, "run": 5, "assemble": 5, "publishing": 5, "verify": 5, "show": 5, "diagnosis": 5, "starters": 5,
    "reproduce": 5, "keys": 5, "places": 5, "garbage": 5, "mergekit": 5,
    "recipe": 4, "fusion": 4, "plan": 4, "store": 4, "catalog": 4, "manual": 4, "facts": 4, "cards": 4,
    "masks": 3, "adapters": 3, "stages": 3, "quantize": 3, "evals": 3, "publish": 3, "lock": 3, "sources": 3,
    "tensors": 2, "models": 2, "rows": 2, "llama_cpp": 2, "machine": 2, "seeding": 2,
    "op": 1, "combination": 1, "publisher": 1, "complaints": 1, "release": 1,
    "errors": 0, "events": 0, "processes": 0, "reporters": 0, "marks": 0, "sections": 0, "front_matter": 0,
}  # fmt: skip
APART = (
    "hub",
    "lab",
)  # nothing imports them but the command line; they import no more than errors, events and sections
SECTIONS = ("masks", "adapters", "stages", "quantize", "evals", "publish")


def part(module: str) -> str:
    """ "hubforge.stages.ties" -> "stages"; the package itself -> "" """
    return module.split(".")[1] if "." in module else ""


def imports() -> list[tuple[str, str, str]]:
    """(file and line, importing part, imported part) of every import of ours, those inside functions too."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        relative = path.relative_to(ROOT)
        mine = relative.parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "hubforge":
                names = [f"hubforge.{alias.name}" for alias in node.names if not alias.name.startswith("__")]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            ours = (part(name) for name in names if name.startswith("hubforge."))
            found += [(f"{relative}:{node.lineno}", mine, theirs) for theirs in ours if theirs != mine]
    return found


def test_every_part_has_a_layer():
    parts = {path.name.removesuffix(".py") for path in ROOT.iterdir() if not path.name.startswith(("_", "py.typed"))}
    assert parts <= {*LAYERS, *APART}


def test_imports_go_down_only():
    wrong = [
        f"{where}: {mine} ({LAYERS[mine]}) imports {theirs} ({LAYERS[theirs]})"
        for where, mine, theirs in imports()
        if mine in LAYERS and theirs in LAYERS and LAYERS[theirs] > LAYERS[mine]
    ]
    assert wrong == []


def test_sections_never_import_one_another():
    wrong = [where for where, mine, theirs in imports() if mine in SECTIONS and theirs in SECTIONS]
    assert wrong == []


@pytest.mark.parametrize("apart", APART)
def test_hub_and_lab_stand_apart(apart):
    assert {mine for _, mine, theirs in imports() if theirs == apart} <= {"cli_hub", "session", "places"}
    assert {theirs for _, mine, theirs in imports() if mine == apart} <= {"errors", "events", "sections"}
