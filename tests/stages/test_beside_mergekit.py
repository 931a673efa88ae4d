"""Every method of mergekit that draws nothing, beside what mergekit 0.1.5 made of the same models.

mergekit.json was written by bench/mergekit_golden.py, with mergekit in an environment of its own. The methods that draw
(dare, della) are compared with their papers' formulas, each in its own test.
"""

import json
from pathlib import Path

import pytest
import torch

from hubforge import catalog

GOLDEN = json.loads(Path(__file__).with_name("mergekit.json").read_text(encoding="utf-8"))
MODELS, WEIGHTS = ["a", "b", "c"], [1.0, 0.6, -0.3]
THREE = {"base_model": "base", "models": MODELS}
CASES = {
    "linear": {"models": MODELS, "weights": [0.5, 0.3, 0.4]},
    "linear sum": {"models": MODELS, "weights": [0.5, 0.3, 0.4], "normalize": False},
    "slerp": {"model": "a", "to": "b", "t": 0.3},
    "nuslerp": {"models": ["a", "b"], "weights": [0.7, 0.2]},
    "nuslerp from base": {"base_model": "base", "models": ["a", "b"], "weights": [0.7, 0.2]},
    "nuslerp rows": {"models": ["a", "b"], "weights": [0.7, 0.2], "along": "rows"},
    "nuslerp columns": {"models": ["a", "b"], "weights": [0.7, 0.2], "along": "columns"},
    "multislerp": {"models": MODELS, "weights": [0.5, 0.3, 0.4]},
    "multislerp from base": THREE | {"weights": [0.5, 0.3, 0.4]},
    "karcher": {"models": MODELS},
    "task_arithmetic": {"model": "base", "models": MODELS, "weights": WEIGHTS, "scale": 0.8},
    "ties": THREE | {"weights": WEIGHTS, "density": [0.3, 0.5, 0.7]},
    "ties sum": THREE | {"weights": WEIGHTS, "density": [0.3, 0.5, 0.7], "normalize": False, "scale": 0.7},
    "ties rescaled": THREE | {"weights": WEIGHTS, "density": [0.3, 0.5, 1.0], "rescale": True},
    "breadcrumbs rescaled": THREE | {"weights": WEIGHTS, "density": 0.5, "gamma": 0.1, "rescale": True},
    "breadcrumbs": THREE | {"weights": WEIGHTS, "density": 0.5, "gamma": 0.1},
    "breadcrumbs_ties": THREE | {"weights": WEIGHTS, "density": 0.5, "gamma": 0.1},
    "model_stock": THREE,
    "model_stock rows": THREE | {"filter_wise": True},
    "sce": THREE | {"select_topk": 0.4},
    "nearswap": {"base_model": "base", "models": ["a"], "t": 0.05},
    "arcee_fusion": {"base_model": "base", "models": ["a"]},
    "ram": THREE,
    "ramplus_tl": THREE | {"r": 0.3, "alpha": 0.5},
}
# passthrough is no function of tensors here but of layers: test_passthrough.py.
OTHERWISE = {"passthrough", "dare_linear", "dare_ties", "della", "della_linear"}
RENAMED = {"ties": "ties_models"}


def op_of(case):
    method = case.split()[0]
    return catalog.find("stages", RENAMED.get(method, method))(**CASES[case])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("number", range(2), ids=["matrix", "vector"])
def test_the_numbers_are_mergekits(case, number, merge):
    w = {ref: torch.tensor(tensors[number]) for ref, tensors in GOLDEN["inputs"].items()}
    expected = torch.tensor(GOLDEN["merged"][case][number])
    for rows in (None, 5):
        found = merge(op_of(case), w, rows if expected.dim() > 1 else None, name=GOLDEN["tensors"][number])
        # Both compute in float32, in orders of their own: some roundings of numbers near 1.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_mean_has_mergekits_bits(merge):
    w = {ref: torch.tensor(tensors[0]) for ref, tensors in GOLDEN["inputs"].items()}
    for case in ("linear", "linear sum"):
        assert torch.equal(merge(op_of(case), w), torch.tensor(GOLDEN["merged"][case][0]))


def test_no_method_of_mergekit_is_left_out():
    compared = {case.split()[0] for case in CASES}
    assert compared | OTHERWISE == set(GOLDEN["methods"])
    for method in GOLDEN["methods"]:
        assert catalog.find("stages", RENAMED.get(method, method)).source


@pytest.mark.parametrize("case", GOLDEN["templates"])
def test_the_chat_template_is_mergekits(case, checkpoint_folder, context, run_op):
    asked = GOLDEN["templates"][case]
    folders = {}
    for name in asked["models"]:
        folder = folders[name] = checkpoint_folder(name, {"w": torch.ones(2, dtype=torch.bfloat16)})
        files = dict(GOLDEN["template_files"].get(name, {}))
        if held := files.pop("tokenizer_config.json", None):
            (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": held}))
        for file, text in files.items():
            (folder / file).write_text(text)
    ctx = context(**{name: ("model", folder) for name, folder in folders.items()})
    run_op(catalog.find("stages", "linear")(models=asked["models"], chat_template=asked["chat_template"]), ctx)
    written = ctx.out / "chat_template.jinja"
    assert (written.read_text() if written.exists() else None) == asked["found"]
    config = json.loads((ctx.out / "tokenizer_config.json").read_text())
    assert config.get("chat_template", asked["found"]) == asked["found"]  # No reader finds another one.
