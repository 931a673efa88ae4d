"""U, S and V are the leading singular triples of W_instruct − W_pretrained, found exactly and written whole."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubforge.errors import HubforgeError, SourceError, StepError
from hubforge.events import Event, Note, Progress, Warned
from hubforge.masks._pair import rounding_energy
from hubforge.masks.subspace import Subspace
from hubforge.op import Artifact, Context
from hubforge.tensors import spectrum
from hubforge.tensors.spectrum import leading

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
K_PROJ = Q_PROJ.replace("q_proj", "k_proj")


def op(**fields: object) -> Subspace:
    return Subspace.model_validate({"instruct": "it", "pretrained": "pt", "rank": 8} | fields)


def context(out: Path, instruct: Path, pretrained: Path, report: Callable[[Event], None] = print) -> Context:
    out.mkdir(exist_ok=True)
    inputs = {"it": Artifact("it", "model", "k", instruct), "pt": Artifact("pt", "model", "k", pretrained)}
    return Context("masks.core", out, inputs, where="r.yaml:8", report=report)


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(shard).items()}


def with_weights(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model folder with other weights, in one file."""
    shutil.copytree(folder, out)
    weights = weights_of(folder)
    change(weights)
    for shard in out.glob("*.safetensors*"):
        shard.unlink()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "model.safetensors")
    return out


def sine(found: torch.Tensor, true: torch.Tensor) -> float:
    """Of the largest principal angle between the spans of two sets of orthonormal columns."""
    found, true = found.double(), true.double()
    return float(torch.linalg.matrix_norm(found - true @ (true.T @ found), 2))


def matrix(rows: int, columns: int, spectrum: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """A float32 matrix with that spectrum and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    count = len(spectrum)
    left = torch.linalg.qr(torch.randn(rows, count, dtype=torch.float64, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(columns, count, dtype=torch.float64, generator=generator))[0]
    return ((left * spectrum) @ right.T).float()


INDEX = torch.arange(1, 97, dtype=torch.float64)
SPECTRA = {
    "gap": torch.cat([torch.linspace(2, 1, 12), torch.linspace(0.3, 0.1, 84)]).double(),
    "half": INDEX**-0.5,
    "one": INDEX**-1.0,
    "steep": INDEX**-2.0,
}


@pytest.mark.parametrize("shape", [(96, 200), (200, 96)], ids=["wide", "tall"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_subspace_is_that_of_a_float64_svd(spectrum: str, shape: tuple[int, int]) -> None:
    W = matrix(*shape, SPECTRA[spectrum])
    found = leading(W, 12)
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    assert sine(found.U, U[:, :12]) < 1e-5
    assert sine(found.V, Vh[:12].T) < 1e-5
    torch.testing.assert_close(found.S.double(), S[:12], rtol=1e-6, atol=0)
    torch.testing.assert_close(found.U.T @ W @ found.V, torch.diag(found.S), rtol=1e-5, atol=1e-6 * float(S[0]))
    assert found.captured == pytest.approx(float((S[:12] ** 2).sum() / (S**2).sum()), rel=1e-6)
    assert max(sine(found.U, U[:, :12]), sine(found.V, Vh[:12].T)) < found.angle_bound + 1e-6  # float32
    assert found.angle_bound < 1e-4


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_vectors_are_orthonormal(spectrum: str) -> None:
    found = leading(matrix(96, 200, SPECTRA[spectrum]), 40)
    for vectors in (found.U.double(), found.V.double()):
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(40).double(), rtol=0, atol=1e-6)


def test_a_float32_gram_matrix_would_not_do() -> None:
    """Why the solver works in float64: from a float32 Gram matrix the same steps give another subspace."""
    spectrum = torch.arange(1, 97, dtype=torch.float64) ** -2.0
    W = matrix(96, 200, spectrum)
    true = torch.linalg.svd(W.double())[0][:, :40]
    vectors = torch.linalg.eigh(W @ W.T)[1][:, -40:]
    assert sine(vectors, true) > 1e-2
    assert sine(leading(W, 40).U, true) < 1e-5


def test_a_two_by_two_by_hand() -> None:
    found = leading(torch.tensor([[3.0, 0.0], [0.0, -4.0]]), 1)
    assert found.S.tolist() == [4.0]
    assert found.U.abs().flatten().tolist() == [0.0, 1.0]
    assert float(found.U[1, 0] * found.V[1, 0]) == -1.0
    assert found.captured == pytest.approx(16 / 25)


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.640001, 2), (0.999, 2), (1.0, 2)])
def test_energy_keeps_as_few_directions_as_hold_it(energy: float, rank: int) -> None:
    assert leading(torch.diag(torch.tensor([4.0, 3.0])), 2, energy).rank == rank


def test_no_more_directions_than_the_matrix_has() -> None:
    """A delta of rank 3, such as a LoRA makes: the fourth direction would be rounding noise."""
    W = matrix(40, 60, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).double().float()
    found = leading(W, 8)
    assert found.captured == pytest.approx(1.0, abs=1e-6)
    assert leading((W != 0) * 2.0, 8).rank == 1
    assert leading(torch.zeros(4, 6), 2).rank == 0


def test_a_spectrum_without_a_gap_says_so() -> None:
    assert leading(torch.eye(8), 3).angle_bound == 1.0
    assert leading(torch.eye(8), 8).angle_bound == 0.0


@pytest.mark.parametrize(
    ("spectrum", "k", "solver"), [("gap", 12, "refined"), ("half", 12, "refined"), ("steep", 36, "exact")]
)
def test_the_spectrum_chooses_the_solver(spectrum: str, k: int, solver: str) -> None:
    """A steep spectrum has lost its small eigenvalues in float32: its effective rank is 1.08² / 1.004."""
    assert leading(matrix(96, 200, SPECTRA[spectrum]), k).solver == solver


@pytest.mark.parametrize("spectrum", ["gap", "half"])
def test_refined_vectors_that_miss_the_bound_give_way_to_exact_ones(
    spectrum: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spoil what float32 gave: the bound sees it, and the answer is as good as ever."""
    import numpy
    import scipy.linalg

    W, real = matrix(96, 200, SPECTRA[spectrum]), scipy.linalg.eigh
    assert leading(W, 12).solver == "refined"

    def spoiled(G: Any, **how: Any) -> Any:
        values, vectors = real(G, **how)
        if vectors.dtype == numpy.float32:
            vectors = vectors + numpy.random.default_rng(0).normal(0, 0.02, vectors.shape)
        return values, vectors

    monkeypatch.setattr(scipy.linalg, "eigh", spoiled)
    found = leading(W, 12)
    assert found.solver == "exact"
    assert sine(found.U, torch.linalg.svd(W.double())[0][:, :12]) < 1e-6


def test_refined_vectors_find_what_a_float32_gram_matrix_loses() -> None:
    """Two directions of nearly equal size: their order is lost in float32, and found by Rayleigh and Ritz."""
    spectrum = torch.cat([torch.linspace(2, 1, 11), torch.tensor([1 - 1e-4, 1 - 2e-4]), torch.linspace(0.3, 0.1, 83)])
    W = matrix(96, 200, spectrum.double())
    found, true = leading(W, 12), torch.linalg.svd(W.double())[0][:, :12]
    assert found.solver == "refined" and found.angle_bound < 1e-4
    assert sine(found.U, true) < 1e-5


def test_a_solver_that_fails_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eigenvectors that are none: the residual shows it."""
    import scipy.linalg

    real = scipy.linalg.eigh

    def wrong(*args: Any, **how: Any) -> Any:
        values, vectors = real(*args, **how)
        return values, vectors[::-1].copy()

    monkeypatch.setattr(scipy.linalg, "eigh", wrong)
    with pytest.raises(StepError, match="did not converge: residual"):
        leading(matrix(30, 40, torch.linspace(2, 1, 30).double()), 4)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    W = matrix(30, 77, torch.linspace(2, 1, 30).double())
    whole = leading(W, 5)
    monkeypatch.setattr(spectrum, "_BLOCK", 100)
    torch.testing.assert_close(leading(W, 5).U.abs(), whole.U.abs(), rtol=0, atol=1e-6)
    torch.testing.assert_close(leading(W.T, 5).V.abs(), whole.U.abs(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_energy_is_that_of_rounding(dtype: torch.dtype) -> None:
    values = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    lost = (values.to(dtype).float() - values).double() ** 2
    some = torch.arange(len(values)) % 3 == 0
    assert rounding_energy(values.to(dtype), some) == pytest.approx(float(lost[some].sum()), rel=0.02)
    assert rounding_energy(torch.zeros(3, dtype=dtype), torch.ones(3, dtype=torch.bool)) == 0.0


def test_float32_counts_as_exact() -> None:
    assert rounding_energy(torch.randn(3), torch.ones(3, dtype=torch.bool)) == 0.0


def test_every_matrix_is_written_under_its_checkpoint_name(
    tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    metrics = op().run(context(out, tiny_llama_other, tiny_llama))
    written = load_file(out / "subspace.safetensors")
    one, other = weights_of(tiny_llama_other), weights_of(tiny_llama)
    names = [name for name in one if "_proj" in name]
    assert sorted(written) == sorted(f"{name}.{part}" for name in names for part in "USV")
    for name in names:
        delta = one[name].double() - other[name].double()
        U, S, V = (written[f"{name}.{part}"] for part in "USV")
        true = torch.linalg.svd(delta, full_matrices=False)
        assert U.dtype == torch.float32 and U.shape == (delta.shape[0], 8) and V.shape == (delta.shape[1], 8)
        torch.testing.assert_close(S.double(), true.S[:8], rtol=1e-6, atol=0)
        assert sine(U, true.U[:, :8]) < 1e-5 and sine(V, true.Vh[:8].T) < 1e-5
    facts = json.loads((out / "subspace.json").read_text())
    matrix = facts["matrices"][Q_PROJ]
    delta = one[Q_PROJ].double() - other[Q_PROJ].double()
    S = torch.linalg.svdvals(delta)
    assert matrix["energy_captured"] == pytest.approx(float((S[:8] ** 2).sum() / (S**2).sum()), rel=1e-6)
    assert matrix["norm"] == pytest.approx(float(delta.norm()))
    assert matrix["relative"] == pytest.approx(float(delta.norm() / other[Q_PROJ].double().norm()))
    assert sum(entry["energy_share"] for entry in facts["matrices"].values()) == pytest.approx(1)
    assert metrics["matrices"] == 14 and [entry["layer"] for entry in metrics["layers"]] == [0, 1]
    assert sorted(path.name for path in out.iterdir()) == ["subspace.json", "subspace.safetensors"]


def test_projecting_a_delta_out_leaves_nothing_in_the_subspace(
    tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path
) -> None:
    """What the mask is for: (I − UUᵀ) A (I − VVᵀ) has no part along U or V."""
    op(targets="q_proj").run(context(tmp_path / "out", tiny_llama_other, tiny_llama))
    written = load_file(tmp_path / "out" / "subspace.safetensors")
    U, V = written[f"{Q_PROJ}.U"], written[f"{Q_PROJ}.V"]
    A = torch.randn(len(U), len(V), generator=torch.Generator().manual_seed(0))
    A = A - U @ (U.T @ A)
    A = A - (A @ V) @ V.T
    assert float((U.T @ A).norm() / A.norm()) < 1e-6
    assert float((A @ V).norm() / A.norm()) < 1e-6


def test_narrow_matrices_keep_a_share_of_their_directions(
    tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path
) -> None:
    """Rank 24 of 64 × 64 queries, yet 16 of 32 × 64 keys."""
    seen: list[Event] = []
    metrics = op(rank=24, targets="[qk]_proj").run(context(tmp_path / "out", tiny_llama_other, tiny_llama, seen.append))
    written = load_file(tmp_path / "out" / "subspace.safetensors")
    assert written[f"{Q_PROJ}.U"].shape == (64, 24)
    assert written[f"{K_PROJ}.U"].shape == (32, 16)
    assert metrics["capped"] == 2
    assert any(isinstance(event, Note) and "rank 24 is limited in 2 matrices: to 16 in" in event.text for event in seen)


def test_a_rank_larger_than_a_matrix_is_warned_about(tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path) -> None:
    seen: list[Event] = []
    op(rank=40, targets="[qk]_proj").run(context(tmp_path / "out", tiny_llama_other, tiny_llama, seen.append))
    (warned,) = [event for event in seen if isinstance(event, Warned)]
    assert str(warned) == (
        f"r.yaml:8: rank 40 is limited in 4 matrices: to 16 in {K_PROJ}; 2 have no such rank: {K_PROJ} is [32, 64]"
    )


def test_a_fisher_with_a_matrix_of_zeros_or_nan_has_no_subspace(tmp_path: Path) -> None:
    for value, message in ((0.0, "is zero throughout"), (float("nan"), "holds NaN or infinity")):
        folder = tmp_path / str(value)
        folder.mkdir()
        values = {Q_PROJ: torch.full((8, 8), value), K_PROJ: torch.rand(8, 8)}
        save_file(values, folder / "fisher.safetensors")
        ctx = Context("masks.w", folder / "out", {"f": Artifact("f", "mask", "k", folder)}, where="r.yaml:8")
        ctx.out.mkdir()
        with pytest.raises(StepError, match=rf"r.yaml:8: {Q_PROJ} of .*{message}"):
            Subspace.model_validate({"fisher": "f", "rank": 4}).run(ctx)


def test_energy_alone_is_a_rank_per_matrix(tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path) -> None:
    """As many directions as hold a fifth of ‖Δ‖², at most half of the smaller side."""
    out = tmp_path / "out"
    metrics = op(rank=None, energy=0.2).run(context(out, tiny_llama_other, tiny_llama))
    one, other = weights_of(tiny_llama_other), weights_of(tiny_llama)
    ranks = set()
    for name, matrix in json.loads((out / "subspace.json").read_text())["matrices"].items():
        S = torch.linalg.svdvals(one[name].double() - other[name].double()) ** 2
        rank = int((S.cumsum(0) / S.sum() < 0.2).sum()) + 1
        assert load_file(out / "subspace.safetensors")[f"{name}.S"].shape == (rank,)
        assert matrix["energy_captured"] >= 0.2
        ranks.add(rank)
    assert len(ranks) > 1 and metrics["rank"] == max(ranks) == metrics["directions"]["max"]
    assert metrics["capped"] == 0


def test_the_subspace_of_a_fisher_is_that_of_its_matrices(tmp_path: Path) -> None:
    """The leading directions of F itself: nearly all of a matrix of squares lies in the first."""
    generator = torch.Generator().manual_seed(0)
    F = torch.randn(40, 60, generator=generator).square().bfloat16()
    (tmp_path / "f").mkdir()
    save_file({Q_PROJ: F, "model.layers.0.experts": F[None].clone()}, tmp_path / "f" / "fisher.safetensors")
    (tmp_path / "out").mkdir()
    ctx = Context("masks.weak", tmp_path / "out", {"f": Artifact("f", "mask", "k", tmp_path / "f")})
    weak = Subspace.model_validate({"fisher": "f", "rank": 4})
    weak.preflight(ctx)
    weak.run(ctx)
    written = load_file(tmp_path / "out" / "subspace.safetensors")
    U, S, _ = torch.linalg.svd(F.double(), full_matrices=False)
    assert sine(written[f"{Q_PROJ}.U"], U[:, :4]) < 1e-5
    facts = json.loads((tmp_path / "out" / "subspace.json").read_text())
    assert facts["of"] == "fisher" and facts["matrices"][Q_PROJ]["relative"] is None
    assert float(S[0] ** 2 / (S**2).sum()) > 0.3 and list(facts["matrices"]) == [Q_PROJ]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": None}, "give `rank` .*, `energy` .*, or both"),
        ({"pretrained": None}, "`pretrained` is missing"),
        ({"fisher": "f"}, "give `instruct` and `pretrained`, or `fisher` alone"),
        ({"instruct": None, "pretrained": None}, "give `instruct` and `pretrained`, or `fisher` alone"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"instruct": "pt"}, "pt is named twice, and does not differ from itself"),
    ],
)
def test_fields_that_say_too_little_or_too_much(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op(**fields)


def test_matrices_that_do_not_differ_are_left_out_and_listed(tiny_llama: Path, tmp_path: Path) -> None:
    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights[Q_PROJ] = weights[Q_PROJ] + torch.outer(torch.ones(64), torch.ones(64)).bfloat16()

    other = with_weights(tiny_llama, tmp_path / "other", nudge)
    out = tmp_path / "out"
    metrics = op(rank=4, energy=0.9).run(context(out, other, tiny_llama))
    assert sorted(load_file(out / "subspace.safetensors")) == [f"{Q_PROJ}.{part}" for part in "SUV"]
    # The change is of rank one, but for the rounding of the sums to bfloat16.
    assert load_file(out / "subspace.safetensors")[f"{Q_PROJ}.U"].shape == (64, 1)
    assert (metrics["matrices"], metrics["unchanged"]) == (1, 13)
    assert len(json.loads((out / "subspace.json").read_text())["unchanged"]) == 13
    assert sorted(path.name for path in out.iterdir()) == ["subspace.json", "subspace.safetensors"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("fields", [{}, {"energy": 0.05}], ids=["as laid out", "cut to rank"])
def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path, fields: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    undisturbed = op(**fields).run(context(whole, tiny_llama_other, tiny_llama))
    calls: list[torch.Size] = []
    real = leading
    monkeypatch.setattr(spectrum, "leading", lambda W, *rest: calls.append(W.shape) or real(W, *rest))

    def kill_at_five(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 5:
            raise Killed

    with pytest.raises(Killed):
        op(**fields).run(context(cut, tiny_llama_other, tiny_llama, kill_at_five))
    assert len(calls) == 5 and not (cut / "subspace.safetensors").exists()
    assert op(**fields).run(context(cut, tiny_llama_other, tiny_llama)) == undisturbed
    assert len(calls) == 14
    assert {p.name: p.read_bytes() for p in cut.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


@pytest.mark.parametrize("moment", ["settle", "_cut", "write_json"])
def test_a_run_killed_while_it_finishes_computes_nothing_twice(
    tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hubforge.masks import subspace as module

    fields = {"energy": 0.05} if moment == "_cut" else {}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    op(**fields).run(context(whole, tiny_llama_other, tiny_llama))
    real = getattr(module, moment)

    def kill(*args: Any) -> Any:
        if moment == "write_json" and args[0].name != "subspace.json":
            return real(*args)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(module, moment, kill)
        op(**fields).run(context(cut, tiny_llama_other, tiny_llama))
    monkeypatch.setattr(spectrum, "leading", lambda *_: pytest.fail("computed again"))
    op(**fields).run(context(cut, tiny_llama_other, tiny_llama))
    assert {p.name: p.read_bytes() for p in cut.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_the_digests_taken_while_writing_are_those_of_the_files(
    tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path
) -> None:
    import hashlib

    for fields in ({}, {"energy": 0.05}):
        ctx = context(tmp_path / f"out{len(fields)}", tiny_llama_other, tiny_llama)
        op(**fields).run(ctx)
        assert list(ctx.sha256) == ["subspace.safetensors"]
        for name, digest in ctx.sha256.items():
            assert hashlib.sha256((ctx.out / name).read_bytes()).hexdigest() == digest


def test_prefixes_may_differ(tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path) -> None:
    def prefix(weights: dict[str, torch.Tensor]) -> None:
        for name in list(weights):
            weights[name.replace("model.", "model.language_model.", 1)] = weights.pop(name)

    renamed = with_weights(tiny_llama, tmp_path / "renamed", prefix)
    op().run(context(tmp_path / "a", tiny_llama_other, renamed))
    op().run(context(tmp_path / "b", tiny_llama_other, tiny_llama))
    files = [(tmp_path / name / "subspace.safetensors").read_bytes() for name in "ab"]
    assert files[0] == files[1]


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights[Q_PROJ]


def widen(weights: dict[str, torch.Tensor]) -> None:
    weights[Q_PROJ] = torch.zeros(64, 32)


def poison(weights: dict[str, torch.Tensor]) -> None:
    weights[Q_PROJ][3, 4] = float("inf")


def deepen(weights: dict[str, torch.Tensor]) -> None:
    weights.update(
        {name.replace(".1.", ".2."): tensor.clone() for name, tensor in list(weights.items()) if ".1." in name}
    )


def quantise(weights: dict[str, torch.Tensor]) -> None:
    weights[Q_PROJ] = weights[Q_PROJ].to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (deepen, SourceError, r"pt: has 3 decoder layers, and \S+ has 2\n  Both must be"),
        (drop, SourceError, rf"pt: has no tensor {Q_PROJ}, which \S+ has"),
        (widen, SourceError, rf"pt: {Q_PROJ} is of shape \[64, 32\]\n  In \S+ it is \[64, 64\]"),
        (quantise, SourceError, rf"model.safetensors: {Q_PROJ} is quantised to F8_E4M3"),
        (poison, StepError, rf"r.yaml:8: {Q_PROJ} of .*\.safetensors holds NaN or infinity\n  Make or fetch"),
        (lambda weights: None, StepError, "r.yaml:8: the two models do not differ in any matrix"),
    ],
    ids=["layers", "absent", "shape", "quantised", "inf", "same"],
)
def test_what_makes_no_pair_is_named(
    tiny_llama: Path,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    error: type[HubforgeError],
    message: str,
) -> None:
    pretrained = with_weights(tiny_llama, tmp_path / "pt", change)
    with pytest.raises(error, match=message):
        op().run(context(tmp_path / "out", tiny_llama, pretrained))


def test_another_tokenizer_is_refused_in_the_preflight(
    tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama_other, tmp_path / "other"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary['"'] = vocabulary['"'], vocabulary["!"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SourceError, match=r"another tokenizer than .*other/tokenizer.json: 2 tokens differ, the first"):
        op().preflight(context(tmp_path / "out", folder, tiny_llama))
    op().preflight(context(tmp_path / "out", tiny_llama_other, tiny_llama))


def test_renamed_added_tokens_are_reported_only(tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama_other, tmp_path / "other"))
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    old = tokenizer["added_tokens"][0]["content"]
    tokenizer["added_tokens"][0]["content"] = "<turn>"
    tokenizer["model"]["vocab"]["<turn>"] = tokenizer["model"]["vocab"].pop(old, tokenizer["added_tokens"][0]["id"])
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    seen: list[Event] = []
    op().run(context(tmp_path / "out", folder, tiny_llama, seen.append))
    assert any(isinstance(event, Note) and f"'<turn>' and '{old}'" in event.text for event in seen)


def test_tokenizers_that_cannot_be_compared_are_warned_about(
    tiny_llama: Path, tiny_llama_other: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama_other, tmp_path / "other"))
    (folder / "tokenizer.json").unlink()
    seen: list[Event] = []
    ctx = context(tmp_path / "out", folder, tiny_llama, seen.append)
    op().preflight(ctx)
    assert seen == []  # Told once, by the run.
    op().run(ctx)
    (warned,) = [event for event in seen if isinstance(event, Warned)]
    assert str(warned) == f"r.yaml:8: the tokenizers are not compared: no tokenizer.json in {folder}"


def test_gemma_covers_the_decoder_alone(tiny_gemma4_multimodal: Path, tmp_path: Path) -> None:
    def shift(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            weights[name] = tensor * 1.5

    other = with_weights(tiny_gemma4_multimodal, tmp_path / "other", shift)
    metrics = op(rank=2).run(context(tmp_path / "out", other, tiny_gemma4_multimodal))
    assert metrics["matrices"] == 4 * 7 - 2 * 2
    assert all("language_model.layers" in name for name in load_file(tmp_path / "out" / "subspace.safetensors"))
