"""The command starts at once: what a verb does not need is not loaded. Asserted by modules, never by time."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "pydantic", "jinja2", "huggingface_hub", "peft", "lm_eval", "numpy")


def loaded_after(arguments: list[str], cwd=None) -> set[str]:
    code = (
        "import sys\n"
        f"sys.argv = ['hubforge', *{arguments!r}]\n"
        "from hubforge.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "sys.stderr.write('MODULES ' + ' '.join(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.rpartition("MODULES ")[2].split())


def test_help_loads_nothing_heavy():
    assert loaded_after(["--help"]).isdisjoint(HEAVY)


@pytest.mark.parametrize("arguments", [["--version"], ["publish", "--help"], ["init", "--help"]])
def test_parsing_a_verb_loads_what_typer_parses_with_and_no_more(arguments):
    assert loaded_after(arguments).isdisjoint(set(HEAVY) - {"pydantic"})


def test_plan_loads_neither_torch_nor_transformers(tmp_path, source_folder):
    (tmp_path / "r.yaml").write_text(
        "name: r\nsources:\n  a: {model: ./model}\n  b: {model: ./model}\n"
        "stages:\n  mixed: {op: slerp, model: a, to: b, t: 0.3}\n"
    )
    source_folder(tmp_path / "model")
    modules = loaded_after(["plan", str(tmp_path / "r.yaml")], cwd=tmp_path)
    assert modules.isdisjoint({"torch", "transformers", "peft", "lm_eval", "huggingface_hub"})
