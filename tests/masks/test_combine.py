"""Gates: importance in [0, 1] made of masks, to be looked at, and the same in a merge as what `apply` does itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubforge.errors import HubforgeError, StepError
from hubforge.events import Event, Progress
from hubforge.masks.combine import Combine
from hubforge.masks.layers import Layers
from hubforge.op import Artifact, Context
from hubforge.stages.apply import Apply
from hubforge.tensors.engine import run_tensor_op
from hubforge.tensors.gate import Spread, normalized

UP, DOWN = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.down_proj.weight"


def mask(folder: Path, tensors: dict[str, torch.Tensor], stem: str = "fisher") -> Path:
    folder.mkdir()
    save_file(tensors, folder / f"{stem}.safetensors")
    return folder


def made(op: Combine | Layers, out: Path, report=print, **masks: Path) -> dict[str, torch.Tensor]:
    out.mkdir(exist_ok=True)
    inputs = {name: Artifact(name, "mask", name, path) for name, path in masks.items()}
    op.run(Context("masks.gate", out, inputs, where="r.yaml:9", report=report))
    return load_file(out / "gate.safetensors") if isinstance(op, Combine) else {}


@pytest.fixture(scope="module")
def fisher(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A heavy-tailed Fisher of every linear of the tiny Llama, and of its layers."""
    generator = torch.Generator().manual_seed(3)
    weights = {n: t for shard in tiny_llama.glob("*.safetensors") for n, t in load_file(shard).items() if "proj" in n}
    values = {n: torch.randn(t.shape, generator=generator).mul(2).exp().bfloat16() for n, t in weights.items()}
    folder = mask(tmp_path_factory.mktemp("masks") / "fisher", values)
    sums = {str(n): sum(float(t.float().sum()) for m, t in values.items() if f".{n}." in m) for n in range(2)}
    layers = {n: {"sum": total * (2 + int(n)), "mean": total / 1000, "count": 1000} for n, total in sums.items()}
    layers["2"] = {"sum": 1.0, "mean": 1.0, "count": 1}  # so that neither end of minmax is all there is
    (folder / "layer_importance.json").write_text(json.dumps({"layers": layers}))
    return folder


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("product", [[0.0, 0.25, 0.5]]),
        ("max", [[0.5, 0.5, 1.0]]),
        ("mean", [[0.25, 0.5, 0.75]]),
        ("either", [[0.5, 0.75, 1.0]]),
    ],
)
def test_two_masks_by_hand(how: str, expected: list[list[float]], tmp_path: Path) -> None:
    """minmax of [2, 3, 4] is [0, .5, 1]; the gate beside it, .5 throughout, is taken as it is."""
    one = mask(tmp_path / "a", {UP: torch.tensor([[2.0, 3.0, 4.0]])})
    gate = mask(tmp_path / "b", {UP: torch.full((1, 3), 0.5)}, "gate")
    op = Combine(masks=["a", "b"], how=how)
    assert made(op, tmp_path / "out", a=one, b=gate)[UP].tolist() == expected


def test_a_gate_is_described_for_the_card(tmp_path: Path) -> None:
    folder = mask(tmp_path / "a", {UP: torch.tensor([[0.0, 1.0]]), DOWN: torch.tensor([[0.0, 3.0, 4.0, 4.0]])})
    made(Combine(masks=["a"], dtype="float32"), tmp_path / "out", a=folder)
    facts = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert facts["layers"]["1"] == {"sum": 2.75, "count": 4, "mean": 0.6875}
    assert facts["total"] == {"sum": 3.75, "count": 6, "mean": 0.625}
    assert facts["histogram"] == [2, *[0] * 14, 1, *[0] * 3, 3]


@pytest.mark.parametrize("how", ["minmax", "log", "sqrt", "rank", "clip:0.9"])
def test_global_scope_is_normalising_all_tensors_as_one(how: str, fisher: Path, tmp_path: Path) -> None:
    values = load_file(fisher / "fisher.safetensors")
    every = torch.cat([values[name].float().flatten() for name in sorted(values)])
    low = float(every.min())
    expected = normalized(every, how, {"min": low, "max": float(every.max())})
    found = made(Combine(masks=["f"], normalize=how, scope="global", dtype="float32"), tmp_path / "out", f=fisher)
    torch.testing.assert_close(torch.cat([found[name].flatten() for name in sorted(found)]), expected)


def test_counting_by_bits_is_exact() -> None:
    """Ranks and quantiles of bfloat16 values in one pass, beside sorting them; zeros and ties included."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).mul(3).exp().bfloat16()
    values[:50] = 0
    spread = Spread()
    for part in values.split(777):
        spread.add(part)
    ordered = values.double().sort().values
    assert spread.exact
    assert [spread.quantile(p) for p in (0.001, 0.5, 0.99, 1.0)] == [float(ordered[i]) for i in (4, 2499, 4949, 4999)]
    below = torch.searchsorted(ordered, values.double())
    until = torch.searchsorted(ordered, values.double(), right=True)
    middle = (below + until - 1).double() / 2 / 4999
    torch.testing.assert_close(spread.normalized(values, "rank").double(), middle, rtol=0, atol=1e-7)


@pytest.mark.parametrize("normalize", ["minmax", "log", "sqrt", "rank", "clip", "clip:0.9"])
def test_apply_with_a_gate_is_apply_that_normalises_itself(
    normalize: str, fisher: Path, tiny_llama: Path, tiny_loras: dict[str, Path], tmp_path: Path, tensors_of
) -> None:
    """Of weights and layers: 1 − (1 − F_param)(1 − F_layer) is what `either` makes of the mask and its `layers`."""
    made(Layers(mask="f"), tmp_path / "layers", f=fisher)
    parts = {"f": fisher, "l": tmp_path / "layers"}
    for dtype in ("float32", "bfloat16"):
        made(Combine(masks=["f", "l"], how="either", normalize=normalize, dtype=dtype), tmp_path / dtype, **parts)

    def applied(name: str, given: Path, **fields: object) -> dict[str, torch.Tensor]:
        inputs = {
            "m": Artifact("m", "model", "1", tiny_llama),
            "a": Artifact("a", "adapter", "2", tiny_loras["one"]),
            "f": Artifact("f", "mask", "3", given),
        }
        op = Apply.model_validate({"model": "m", "adapters": ["a"], "scale": 0.5, "dtype": "float32"} | fields)
        (tmp_path / name).mkdir()
        run_tensor_op(op, Context("stages.x", tmp_path / name, inputs, where="r.yaml:5"))
        return tensors_of(tmp_path / name)

    inline = applied("inline", fisher, importance="f", normalize=normalize)
    gated = {"importance": "f", "normalize": "none"}
    exact, rounded = (applied(f"with-{dtype}", tmp_path / dtype, **gated) for dtype in ("float32", "bfloat16"))
    base, free = tensors_of(tiny_llama), applied("free", fisher)
    for name in inline:
        torch.testing.assert_close(exact[name], inline[name], rtol=1e-6, atol=1e-6)  # 1 − (1 − F) is F, rounded
        change = (free[name] - base[name].float()).abs()
        assert bool(((rounded[name] - inline[name]).abs() <= 2**-9 * change + 1e-6).all())
    assert any(not torch.equal(inline[name], base[name].float()) for name in inline)


def test_layers_by_sum_or_mean(fisher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "f"
    folder.mkdir()
    save_file(
        {UP: torch.ones(2, 2), DOWN: torch.ones(2, 2), "lm_head.weight": torch.ones(2)}, folder / "fisher.safetensors"
    )
    layers = {"0": {"sum": 4.0, "mean": 3.0, "count": 1}, "1": {"sum": 8.0, "mean": 1.0, "count": 1}}
    (folder / "layer_importance.json").write_text(json.dumps({"layers": layers}))
    for of, expected in (("sum", {"0": 0.0, "1": 1.0}), ("mean", {"0": 1.0, "1": 0.0})):
        made(Layers(mask="f", of=of), tmp_path / of, f=folder)
        content = json.loads((tmp_path / of / "layers.json").read_text())
        assert {layer: facts["importance"] for layer, facts in content["layers"].items()} == expected
        assert content["tensors"] == {UP: [2, 2], DOWN: [2, 2]}
    assert made(Combine(masks=["l"]), tmp_path / "out", l=tmp_path / "mean")[UP].tolist() == [[1.0, 1.0], [1.0, 1.0]]


def test_layers_without_a_summary_are_counted(tmp_path: Path) -> None:
    folder = mask(tmp_path / "f", {UP: torch.full((2, 2), 3.0), DOWN: torch.tensor([[1.0, 2.0]])})
    made(Layers(mask="f", normalize="rank"), tmp_path / "l", f=folder)
    assert json.loads((tmp_path / "l" / "layers.json").read_text())["layers"] == {
        "0": {"sum": 12.0, "importance": 1.0},
        "1": {"sum": 3.0, "importance": 0.0},
    }


def test_prefixes_may_differ(tmp_path: Path) -> None:
    one = mask(tmp_path / "a", {UP: torch.tensor([[0.0, 1.0]])}, "gate")
    other = mask(tmp_path / "b", {UP.replace("model.", "model.language_model.", 1): torch.tensor([[1.0, 0.5]])}, "gate")
    assert made(Combine(masks=["a", "b"]), tmp_path / "out", a=one, b=other)[UP].tolist() == [[0.0, 0.5]]


def test_a_killed_run_goes_on_and_gives_the_same_bytes(fisher: Path, tmp_path: Path) -> None:
    op = Combine(masks=["f"], normalize="rank", scope="global")
    made(op, tmp_path / "whole", f=fisher)

    class Killed(BaseException):
        pass

    def kill(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 5 and not event.what:
            raise Killed

    with pytest.raises(Killed):
        made(op, tmp_path / "cut", kill, f=fisher)
    assert not (tmp_path / "cut" / "gate.safetensors").exists()
    made(op, tmp_path / "cut", f=fisher)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "cut")]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, rf"r.yaml:9: b has no {UP}\n  Make both of one model"),
        ({UP: torch.ones(2, 2)}, rf"r.yaml:9: {UP} of b is \[2, 2\], not \[1, 2\]"),
        ({UP: torch.tensor([[-1.0, 2.0]])}, rf"r.yaml:9: {UP} of b holds values from -1 to 2"),
        ({UP: torch.tensor([[float("nan"), 2.0]])}, rf"r.yaml:9: {UP} of b holds values from nan to nan"),
        ({UP: torch.zeros(1, 2)}, rf"r.yaml:9: {UP} of b is zero throughout\n  Nothing would be spared"),
    ],
    ids=["absent", "shape", "negative", "nan", "zero"],
)
def test_a_mask_that_does_not_fit_is_named(tensors: dict[str, torch.Tensor], message: str, tmp_path: Path) -> None:
    one = mask(tmp_path / "a", {UP: torch.tensor([[0.0, 1.0]])})
    other = mask(tmp_path / "b", tensors or {DOWN: torch.ones(1, 2)})
    with pytest.raises(HubforgeError, match=message):
        made(Combine(masks=["a", "b"]), tmp_path / "out", a=one, b=other)


def test_masks_of_two_models_are_found_in_the_preflight(tmp_path: Path) -> None:
    inputs = {
        name: Artifact(name, "mask", name, mask(tmp_path / name, {UP: torch.ones(1, size)}))
        for name, size in (("a", 2), ("b", 3))
    }
    op = Combine(masks=["a", "b"])
    op.preflight(Context("masks.gate", tmp_path, {"a": inputs["a"]}))  # b is not made yet.
    with pytest.raises(StepError, match=rf"{UP} of b is \[1, 3\], not \[1, 2\]"):
        op.preflight(Context("masks.gate", tmp_path, inputs))


def test_a_fisher_that_is_zero_is_no_measure_of_layers_or_of_all(tmp_path: Path) -> None:
    some = mask(tmp_path / "a", {UP: torch.ones(1, 2), DOWN: torch.zeros(1, 2)})
    none = mask(tmp_path / "b", {UP: torch.zeros(1, 2), DOWN: torch.zeros(1, 2)})
    with pytest.raises(StepError, match=r"r.yaml:9: layer 1 of a is zero throughout"):
        made(Layers(mask="a"), tmp_path / "layers", a=some)
    # Over the whole mask a tensor of zeros matters least; a mask of zeros says nothing.
    op = Combine(masks=["a"], scope="global")
    assert made(op, tmp_path / "gate", a=some)[DOWN].tolist() == [[0.0, 0.0]]
    with pytest.raises(StepError, match="a is zero throughout"):
        made(op, tmp_path / "none", a=none)
    bad = mask(tmp_path / "c", {UP: torch.ones(1, 2), DOWN: torch.tensor([[1.0, float("nan")]])})
    with pytest.raises(StepError, match=r"r.yaml:9: the sum of layer 1 of a is nan\n  Importance is finite"):
        made(Layers(mask="a"), tmp_path / "nan", a=bad)
    # A gate of zeros is one: it changes in full.
    (none / "fisher.safetensors").rename(none / "gate.safetensors")
    made(Layers(mask="a"), tmp_path / "of-gate", a=none)


def test_a_fisher_is_no_gate_and_a_gate_not_to_be_normalised_again(
    fisher: Path, tiny_llama: Path, tiny_loras: dict[str, Path], tmp_path: Path
) -> None:
    gate = mask(tmp_path / "gate", {UP: torch.rand(128, 64)}, "gate")

    def applied(path: Path, normalize: str) -> None:
        inputs = {
            "m": Artifact("m", "model", "1", tiny_llama),
            "a": Artifact("a", "adapter", "2", tiny_loras["up"] if "up" in tiny_loras else tiny_loras["one"]),
            "f": Artifact("f", "mask", "3", path),
        }
        op = Apply(model="m", adapters=["a"], importance="f", normalize=normalize)
        out = tmp_path / f"{path.name}-{normalize}"
        out.mkdir()
        run_tensor_op(op, Context("stages.x", out, inputs, where="r.yaml:5"))

    with pytest.raises(StepError, match=r"r.yaml:5: f is a Fisher, and `normalize: none` is for gates"):
        applied(fisher, "none")
    with pytest.raises(StepError, match=r"values outside \[0, 1\]\n  Set `normalize: minmax`"):
        applied(fisher / "fisher.safetensors", "none")
    with pytest.raises(StepError, match=r"f has no importance for|f is a gate, normalised already"):
        applied(gate, "minmax")


@pytest.mark.parametrize(
    ("op", "fields", "message"),
    [
        (Combine, {"masks": ["a"], "normalize": "clip:1.5"}, "'clip:1.5' is no normalisation: minmax, log"),
        (Combine, {"masks": ["a", "a"]}, "masks names one of them twice"),
        (Layers, {"mask": "a", "normalize": "none"}, r"sums are not in \[0, 1\]"),
        (Apply, {"model": "m", "adapters": ["a"], "normalize": "none", "layer_damping": True}, "takes a gate as it is"),
    ],
)
def test_fields_that_make_no_sense(op: type, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.model_validate(fields)
