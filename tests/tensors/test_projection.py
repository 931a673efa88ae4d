"""What each projection does to the parts of a change: in both spans, in U's alone, in V's alone, in neither."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from hubforge.errors import SourceError, StepError
from hubforge.tensors.projection import (
    Leak,
    Subspace,
    Subspaces,
    factored_leak,
    leak,
    orthonormal,
    protect,
    remove,
    stored_leaks,
    summary,
    worst_held,
)
from hubforge.tensors.reader import open_checkpoint

OUT, IN, K = 24, 20, 5


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def subspace() -> Subspace:
    return Subspace(torch.linalg.qr(random(OUT, K, seed=1)).Q, torch.linalg.qr(random(IN, K, seed=2)).Q)


def parts(subspace: Subspace) -> list[torch.Tensor]:
    """A change cut in four: PΔQ, PΔ(I−Q), (I−P)ΔQ, (I−P)Δ(I−Q)."""
    delta = random(OUT, IN, seed=3)
    P, Q = subspace.U @ subspace.U.T, subspace.V @ subspace.V.T
    inside_u, beside_u = P @ delta, delta - P @ delta
    return [inside_u @ Q, inside_u - inside_u @ Q, beside_u @ Q, beside_u - beside_u @ Q]


GAINS = [
    ("two_sided", [0, 0, 0, 1]),
    ("left", [0, 0, 1, 1]),
    ("right", [0, 1, 0, 1]),
    ("core", [0, 1, 1, 1]),
    ("published", [-1, 0, 0, 1]),
]


@pytest.mark.parametrize(("how", "gains"), GAINS, ids=[how for how, _ in GAINS])
def test_gains_of_the_four_parts(subspace, how, gains):
    for part, gain in zip(parts(subspace), gains, strict=True):
        torch.testing.assert_close(protect(part, subspace, how), gain * part, rtol=0, atol=2e-6)


def test_scale_damps_each_side_it_touches(subspace):
    for part, gain in zip(parts(subspace), [0.0625, 0.25, 0.25, 1], strict=True):
        torch.testing.assert_close(protect(part, subspace, "scale", 0.75), gain * part, rtol=0, atol=2e-6)


@pytest.mark.parametrize("how", ["two_sided", "left", "right", "core"])
def test_twice_is_once(subspace, how):
    once = protect(random(OUT, IN), subspace, how)
    torch.testing.assert_close(protect(once, subspace, how), once, rtol=0, atol=2e-6)


def test_the_published_formula_brings_the_core_back_when_applied_twice(subspace):
    core = parts(subspace)[0]
    twice = protect(protect(core, subspace, "published"), subspace, "published")
    torch.testing.assert_close(twice, core, rtol=0, atol=2e-6)


def test_removing_a_direction_by_hand():
    basis = torch.tensor([[1.0], [0.0]])
    assert remove(torch.tensor([[3.0], [4.0]]), basis).tolist() == [[0.0], [4.0]]
    assert remove(torch.tensor([[3.0], [4.0]]), basis, 0.5).tolist() == [[1.5], [4.0]]


def test_leak_by_hand():
    one = Subspace(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]]))
    found = leak(torch.tensor([[0.0, 3.0], [4.0, 0.0]]), one)  # row 0 of norm 3, column 1 of norm 3, in all 5
    assert found == Leak(pytest.approx(0.6), pytest.approx(0.6), pytest.approx(0.6))
    other = Subspace(one.U, torch.tensor([[1.0], [0.0]]))  # row 0 and column 0 share an element that is zero
    assert leak(torch.tensor([[0.0, 3.0], [4.0, 0.0]]), other) == Leak(pytest.approx(0.6), pytest.approx(0.8), 0.0)
    assert leak(torch.zeros(2, 2), one) is None


def test_leak_of_factors_is_that_of_their_product(subspace):
    a, b = random(3, IN, seed=4), random(OUT, 3, seed=5)
    direct, factored = leak(b @ a, subspace), factored_leak(a, b, subspace)
    assert factored.left == pytest.approx(direct.left, rel=1e-6)
    assert factored.right == pytest.approx(direct.right, rel=1e-6)
    assert factored.core == pytest.approx(direct.core, rel=1e-6)


def test_leak_of_factors_tells_a_millionth_of_a_millionth_from_zero(subspace):
    """Squares of 1e-12 are 1e-24: lost beside 1 unless each is summed by itself."""
    a = remove(random(3, IN, seed=4).double().T, subspace.V.double()).T
    b = remove(random(OUT, 3, seed=5).double(), orthonormal64(subspace.U))
    clean = factored_leak(a, b, Subspace(orthonormal64(subspace.U), subspace.V))
    assert clean.left < 1e-14
    spoilt = b + 1e-12 * b.norm() * subspace.U.double() @ random(K, 3, seed=6).double()
    assert 1e-12 < factored_leak(a, spoilt, Subspace(orthonormal64(subspace.U), subspace.V)).left < 1e-10


def orthonormal64(basis: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(basis.double()).Q


def test_leak_of_factors_that_are_zero_is_unknown(subspace):
    assert factored_leak(random(3, IN), torch.zeros(OUT, 3), subspace) is None


def test_summary_names_the_worst_matrix():
    found = summary({"a": Leak(0.1, 0.2, 0.1), "b": Leak(0.3, 0.0, 0.0)})
    assert found["worst"] == 0.3 and found["worst_matrix"] == "b" and found["matrices"] == 2
    assert found["mean_left"] == pytest.approx(0.2) and found["mean_right"] == pytest.approx(0.1)
    assert (found["worst_core"], found["mean_core"]) == (0.1, pytest.approx(0.05))
    assert summary({}) == {}
    held = {how: worst_held(found, how) for how in ("two_sided", "left", "right", "core")}
    assert held == {"two_sided": 0.3, "left": 0.3, "right": 0.2, "core": 0.1}
    assert worst_held({}, "left") is None


NAME = "model.layers.0.mlp.up_proj.weight"


def write_mask(folder, subspace, names=(NAME,), unchanged=()):
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name in names:
        tensors |= {f"{name}.U": subspace.U.contiguous(), f"{name}.V": subspace.V.contiguous()}
        tensors |= {f"{name}.S": torch.ones(subspace.U.shape[1])}
    save_file(tensors, folder / "subspace.safetensors")
    (folder / "subspace.json").write_text(json.dumps({"unchanged": list(unchanged)}))
    return folder


def test_a_mask_is_found_under_either_prefix(tmp_path, subspace):
    mask = Subspaces(write_mask(tmp_path / "mask", subspace))
    own = mask.find(NAME.replace("model.", "model.language_model."), (OUT, IN))
    assert own == NAME and mask.rank(own) == K
    read = mask.read(own)
    assert torch.equal(read.U, subspace.U) and torch.equal(read.V, subspace.V)


def test_a_mask_beside_a_fisher_file_is_still_found(tmp_path, subspace):
    folder = write_mask(tmp_path / "mask", subspace)
    shutil.copy(folder / "subspace.safetensors", folder / "fisher.safetensors")
    assert Subspaces(folder).names == (NAME,)


def test_a_mask_of_another_model_is_refused_by_shape(tmp_path, subspace):
    mask = Subspaces(write_mask(tmp_path / "mask", subspace))
    with pytest.raises(StepError, match=r"r\.yaml:3: .*up_proj\.weight is \[24, 21\] in the model.* for \[24, 20\]"):
        mask.bind({NAME: (OUT, IN + 1)}, "r.yaml:3")


def test_nothing_may_change_unprotected_but_what_has_nothing_to_protect(tmp_path, subspace):
    same, bare = NAME.replace("up", "down"), NAME.replace("up", "gate")
    mask = Subspaces(write_mask(tmp_path / "mask", subspace, unchanged=[same]))
    assert mask.bind({NAME: (OUT, IN), same: (IN, OUT)}) == {NAME: NAME}
    with pytest.raises(StepError, match=r"no subspace for .*gate_proj"):
        mask.bind({NAME: (OUT, IN), bare: (OUT, IN)})


def test_a_mask_without_subspaces_is_refused(tmp_path):
    save_file({NAME: torch.ones(2, 2)}, tmp_path / "fisher.safetensors")
    with pytest.raises(SourceError, match="holds no subspace"):
        Subspaces(tmp_path)


def test_a_basis_stored_in_bfloat16_is_made_orthonormal_again(tmp_path, subspace):
    rough = subspace.U.bfloat16().float()
    assert (rough.T @ rough - torch.eye(K)).abs().max() > 1e-4
    mended = orthonormal(rough, "x.U", tmp_path)
    torch.testing.assert_close(mended.T @ mended, torch.eye(K), rtol=0, atol=1e-6)
    torch.testing.assert_close(mended @ (mended.T @ rough), rough, rtol=0, atol=1e-6)  # the same span


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 0, 1e-4), (torch.bfloat16, 0.1, 0.9)])
def test_rounding_a_small_change_puts_it_back_into_the_subspace(tmp_path, subspace, dtype, least, most):
    """A thousandth of the weights is less than bfloat16 keeps of them: what is stored is mostly rounding."""
    mask, other = write_mask(tmp_path / "mask", subspace), "lm_head.weight"
    weight = random(OUT, IN, seed=8).to(dtype).float()
    change = 1e-3 * protect(random(OUT, IN, seed=9), subspace)
    save_file({NAME: weight.to(dtype), other: weight - 1}, tmp_path / "base.safetensors")
    save_file({NAME: (weight + change).to(dtype), other: weight + 1}, tmp_path / "made.safetensors")
    with open_checkpoint(tmp_path / "base.safetensors") as base, open_checkpoint(tmp_path / "made.safetensors") as made:
        found = stored_leaks(base, made, Subspaces(mask))
        assert stored_leaks(base, base, Subspaces(mask)) == {}
    assert found.keys() == {NAME}
    assert least <= found[NAME].worst <= most  # float32 weights around 1 hold a change of 1e-3 to 1e-4 of itself


def test_padding_is_no_direction_and_dependent_columns_are_refused(tmp_path, subspace):
    padded = torch.cat([subspace.U, torch.zeros(OUT, 2)], 1)
    assert torch.equal(orthonormal(padded, "x.U", tmp_path), subspace.U)
    with pytest.raises(SourceError, match=r"columns of x\.U are no basis"):
        orthonormal(subspace.U[:, [0, 1, 1]], "x.U", tmp_path)
