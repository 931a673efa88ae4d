"""`protect:` on apply: what was gated per element is taken out of the subspace again, and the leak is reported."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubforge.errors import StepError
from hubforge.lab.tiny import tiny_lora
from hubforge.op import Artifact, Context
from hubforge.stages.apply import Apply
from hubforge.stages.apply_to_gain import ApplyToGain
from hubforge.stages.ties import Ties
from hubforge.tensors.engine import run_tensor_op
from hubforge.tensors.projection import Subspaces, leak, remove, stored_leaks, summary
from hubforge.tensors.reader import open_checkpoint

LINEAR = re.compile(r"_proj\.weight$")


@pytest.fixture(scope="module")
def masks(tiny_llama, tmp_path_factory):
    """A random subspace of each linear layer, and a random Fisher."""
    folder, generator = tmp_path_factory.mktemp("masks"), torch.Generator().manual_seed(0)
    core, fisher = {}, {}
    with open_checkpoint(tiny_llama) as checkpoint:
        for name, info in checkpoint.tensors.items():
            if LINEAR.search(name):
                fisher[name] = torch.rand(*info.shape, generator=generator)
                for part, size in zip("UV", info.shape, strict=True):
                    core[f"{name}.{part}"] = torch.linalg.qr(torch.randn(size, 8, generator=generator)).Q.contiguous()
    for name, tensors in (("core", core), ("fisher", fisher)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / f"{'subspace' if name == 'core' else name}.safetensors")
    layers = {str(number): {"sum": number + 1.0} for number in range(2)}
    (folder / "fisher" / "layer_importance.json").write_text(json.dumps({"layers": layers}))
    return folder


def applied(tmp_path, model, adapter, masks, **fields):
    inputs = {
        "it": Artifact("it", "model", "1", model),
        "prose": Artifact("prose", "adapter", "2", adapter),
        "core": Artifact("core", "mask", "3", masks / "core"),
        "fisher": Artifact("fisher", "mask", "4", masks / "fisher"),
    }
    op = Apply.model_validate({"model": "it", "adapters": ["prose"], "dtype": "float32"} | fields)
    return run_tensor_op(op, Context("stages.x", tmp_path, inputs, where="r.yaml:5")), tmp_path


@pytest.mark.parametrize("normalize", ["minmax", "rank"])
def test_a_gated_change_is_taken_out_of_the_subspace(tmp_path, tiny_llama, tiny_loras, masks, normalize):
    gate = {"importance": "fisher", "normalize": normalize, "layer_damping": False}
    metrics, out = applied(tmp_path / "a", tiny_llama, tiny_loras["one"], masks, protect="core", **gate)
    free, _ = applied(tmp_path / "b", tiny_llama, tiny_loras["one"], masks, **gate)
    assert "leak" not in free
    assert metrics["leak"]["matrices"] == 14 and metrics["leak"]["worst"] < 1e-5  # float32 W + Δ rounds Δ
    mask = Subspaces(masks / "core")
    with open_checkpoint(tiny_llama) as base, open_checkpoint(out) as made:
        name = "model.layers.1.mlp.up_proj.weight"
        assert leak(made.read(name) - base.read(name).float(), mask.read(name)).worst < 1e-5
    with open_checkpoint(tiny_llama) as base, open_checkpoint(tmp_path / "b") as made:
        assert leak(made.read(name) - base.read(name).float(), mask.read(name)).worst > 0.1


def test_the_leak_into_eight_bit_floats_is_of_their_values(tmp_path, tiny_llama, tiny_loras, masks, tensors_of):
    small = tmp_path / "small"
    shutil.copytree(tiny_llama, small, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = tensors_of(tiny_llama)
    for name in [name for name in tensors if LINEAR.search(name)]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.tensor(2.0)
    save_file(tensors, small / "model.safetensors")
    metrics, _ = applied(tmp_path / "out", small, tiny_loras["one"], masks, protect="core")
    assert metrics["leak"]["matrices"] == 14 and metrics["leak"]["worst"] < 1e-5


def test_what_ties_pushes_back_is_taken_out_again(tmp_path, tiny_llama, masks):
    """Two adapters that keep clear of the subspace, merged by TIES: the factors' signs are elected one by one."""
    mask, generator = Subspaces(masks / "core"), torch.Generator().manual_seed(2)
    for number in (1, 2):
        folder = tiny_lora(tmp_path / str(number), tiny_llama, rank=8, seed=number)
        factors = load_file(folder / "adapter_model.safetensors")
        for key in [key for key in factors if "lora_A" in key]:
            name = key.removeprefix("base_model.model.").replace("lora_A.", "")
            core, b = mask.read(name), key.replace("lora_A", "lora_B")
            factors[key] = remove(torch.randn(factors[key].shape, generator=generator).T, core.V).T.contiguous()
            factors[b] = remove(torch.randn(factors[b].shape, generator=generator), core.U)
        save_file(factors, folder / "adapter_model.safetensors")
    inputs = {str(number): Artifact(str(number), "adapter", str(number), tmp_path / str(number)) for number in (1, 2)}
    (tmp_path / "ties").mkdir()
    Ties(adapters=["1", "2"], density=0.5).run(Context("stages.t", tmp_path / "ties", inputs))

    def leaks(out, adapter, **fields):
        applied(tmp_path / out, tiny_llama, adapter, masks, **fields)
        with open_checkpoint(tiny_llama) as base, open_checkpoint(tmp_path / out) as made:
            return summary(stored_leaks(base, made, mask))["worst"]

    assert leaks("clear", tmp_path / "1") < 1e-5
    assert leaks("pushed", tmp_path / "ties") > 0.1
    assert leaks("again", tmp_path / "ties", protect="core") < 1e-5


def test_what_the_mask_does_not_cover_is_an_error(tmp_path, tiny_llama, tiny_loras, masks):
    few = tmp_path / "masks" / "core"
    few.mkdir(parents=True)
    with open_checkpoint(masks / "core") as checkpoint:
        save_file({n: checkpoint.read(n) for n in checkpoint if ".layers.0." in n}, few / "subspace.safetensors")
    with pytest.raises(StepError, match=r"r\.yaml:5: .*no subspace for model\.layers\.1"):
        applied(tmp_path / "out", tiny_llama, tiny_loras["one"], few.parent, protect="core")


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("importance", r"model\.\S+ is \[.*\] in it, but model\.\S+ is \[.*\] in fisher\n  The mask is of another"),
        ("protect", r"model\.\S+ is \[.*\] in the model, but .* is for \["),
    ],
)
def test_a_mask_of_another_model_is_found_before_any_step(tmp_path, tiny_llama, tiny_llama_256, masks, field, message):
    """Before the adapter is trained, too: it need not be there."""
    inputs = {
        "it": Artifact("it", "model", "1", tiny_llama_256),
        "core": Artifact("core", "mask", "3", masks / "core"),
        "fisher": Artifact("fisher", "mask", "4", masks / "fisher"),
    }
    named = {"importance": "fisher", "protect": "core"}[field]
    op = Apply.model_validate({"model": "it", "adapters": ["prose"], field: named})
    with pytest.raises(StepError, match=message):
        op.preflight(Context("stages.x", tmp_path, inputs))
    op.preflight(Context("stages.x", tmp_path, inputs | {"it": Artifact("it", "model", "1", tiny_llama)}))


def test_a_mask_without_any_tensor_of_the_model_is_refused(tmp_path, tiny_llama, masks):
    save_file({"encoder.block.0.weight": torch.ones(2, 2)}, tmp_path / "fisher.safetensors")
    inputs = {"it": Artifact("it", "model", "1", tiny_llama), "f": Artifact("f", "mask", "2", tmp_path)}
    op = Apply.model_validate({"model": "it", "adapters": ["a"], "importance": "f", "layer_damping": False})
    with pytest.raises(StepError, match="f has no tensor of it"):
        op.preflight(Context("stages.x", tmp_path, inputs))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"projection": "two_sided"}, "projection: two_sided without `protect`"),
        ({"normalize": "rank"}, "normalize: rank without `importance`"),
    ],
)
def test_how_to_use_a_mask_that_is_not_named_is_refused(fields, message):
    """Else the change would go in unprotected, by a slip of one line."""
    with pytest.raises(ValueError, match=message):
        Apply.model_validate({"model": "it", "adapters": ["a"]} | fields)
    if "projection" in fields:
        with pytest.raises(ValueError, match=message):
            ApplyToGain.model_validate({"model": "it", "adapters": ["a"], "data": "rows", "gain": 0.1} | fields)
