"""The control mask: orthonormal, of the shapes it was asked for, uniform, and the same from the same seed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hubforge.masks.random_subspace import RandomSubspace
from hubforge.op import Artifact, Context
from hubforge.tensors.projection import Subspaces


@pytest.fixture
def core(tmp_path):
    folder = tmp_path / "core"
    folder.mkdir()
    tensors = {}
    for name, rank in (("a.weight", 3), ("b.weight", 5)):
        tensors |= {f"{name}.{part}": torch.eye(size)[:, :rank].contiguous() for part, size in (("U", 60), ("V", 40))}
    save_file(tensors, folder / "subspace.safetensors")
    (folder / "subspace.json").write_text(json.dumps({"unchanged": ["c.weight"], "matrices": {}}))
    return Artifact("core", "mask", "k", folder)


def made(core, out, seed=0):
    out.mkdir()
    metrics = RandomSubspace(like="core", seed=seed).run(Context("masks.random", out, {"core": core}))
    return metrics, load_file(out / "subspace.safetensors")


def test_it_has_the_shapes_and_is_orthonormal(core, tmp_path):
    metrics, found = made(core, tmp_path / "one")
    assert metrics == {"rank": 5, "matrices": 2, "unchanged": 1}
    assert {name: tuple(basis.shape) for name, basis in found.items()} == {
        "a.weight.U": (60, 3), "a.weight.V": (40, 3), "b.weight.U": (60, 5), "b.weight.V": (40, 5)
    }  # fmt: skip
    for basis in found.values():
        torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]), rtol=0, atol=1e-6)
    mask = Subspaces(tmp_path / "one")
    assert mask.is_unchanged("c.weight") and mask.find("a.weight", (60, 40)) == "a.weight"


def test_no_direction_is_favoured(core, tmp_path):
    """A fixed unit vector has on average k / n of its square in a random subspace of rank k: here 5 / 60."""
    shares = [float(made(core, tmp_path / str(seed), seed)[1]["b.weight.U"][7].square().sum()) for seed in range(200)]
    assert sum(shares) / 200 == pytest.approx(5 / 60, abs=0.012)  # three standard errors


def test_the_seed_decides(core, tmp_path):
    one, same, other = (made(core, tmp_path / name, seed)[1] for name, seed in (("a", 4), ("b", 4), ("c", 5)))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["a.weight.U"], other["a.weight.U"])
    assert not torch.equal(one["a.weight.U"], one["b.weight.U"][:, :3])
