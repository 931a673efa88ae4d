"""Block Lanczos: a few leading eigenvectors, and what a random block would miss."""

import numpy as np
import pytest
import torch

from hubforge.tensors import krylov, spectrum
from hubforge.tensors.krylov import few_leading
from hubforge.tensors.spectrum import leading

SIZE = 800
SPECTRA = {
    "gap": np.r_[np.linspace(2, 1, 12), np.linspace(0.3, 0.1, SIZE - 12)],
    "half": np.arange(1.0, SIZE + 1) ** -0.5,
    "one": np.arange(1.0, SIZE + 1) ** -1.0,
    "flat": np.linspace(1, 0.5, SIZE),
    "cluster": np.r_[np.full(40, 1.0), np.linspace(0.3, 0.1, SIZE - 40)],
    "many": np.r_[np.full(24, 1.0), np.linspace(0.3, 0.1, SIZE - 24)],  # more of one kind than vectors in a block
}


def matrix(values, columns=1000, seed=0):
    """float32, with these singular values and random singular vectors, of which the left ones come with it."""
    draw = np.random.default_rng(seed)
    left, right = (np.linalg.qr(draw.standard_normal((n, len(values))))[0] for n in (len(values), columns))
    return ((left * values) @ right.T).astype(np.float32), left


def sine(found, true):
    found = np.asarray(found, np.float64)
    return np.linalg.norm(found - true @ (true.T @ found), 2)


@pytest.mark.parametrize("name", ["gap", "half", "one"])
def test_a_few_leading_eigenvectors_come_out(name):
    W, left = matrix(SPECTRA[name])
    found = few_leading(lambda X: W @ (W.T @ X), SIZE, 12, 16)
    assert sine(left[:, :12], np.linalg.qr(found.vectors.astype(np.float64))[0]) < 1e-4
    assert SPECTRA[name][28] ** 2 < found.beyond < SPECTRA[name][11] ** 2


def test_an_eigenvector_that_the_start_lacks_is_missed_and_noticed(monkeypatch):
    """What is missing would be larger than what is left: the second block sees it."""
    W, left = matrix(SPECTRA["gap"])
    first = left[:, :1].astype(np.float32)
    looks = []

    def multiply(X):
        """Without the first eigenvector, which rounding would bring back sooner or later; looks see it."""
        return W @ (W.T @ (X if looks else X - first @ (first.T @ X)))

    real = krylov._largest_left
    monkeypatch.setattr(krylov, "_largest_left", lambda *given: looks.append(1) or real(*given))
    assert few_leading(multiply, SIZE, 11, 16) is None and looks
    monkeypatch.setattr(krylov, "_largest_left", real)
    looks.clear()
    assert few_leading(multiply, SIZE, 11, 16) is not None


@pytest.mark.parametrize("values", [SPECTRA["flat"], np.arange(1.0, SIZE + 1) ** -3.0], ids=["flat", "steep"])
def test_what_float32_cannot_find_is_given_up(values):
    """A spectrum that hardly falls, and one that falls below what float32 can tell."""
    W, _ = matrix(values)
    assert few_leading(lambda X: W @ (W.T @ X), SIZE, 36, 16) is None


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize(
    ("name", "k", "solver"),
    [
        ("gap", 12, "krylov"),
        ("half", 12, "krylov"),
        ("one", 12, "krylov"),
        ("flat", 12, "refined"),
        ("cluster", 24, "exact"),
        ("many", 24, "krylov"),
    ],
)
def test_the_subspace_is_that_of_a_float64_svd(name, k, solver, tall):
    W, left = matrix(SPECTRA[name])
    found = leading(torch.from_numpy(W.T.copy() if tall else W), k)
    near = found.V if tall else found.U
    if name == "cluster":  # any 24 of 40, which only rounding tells apart
        assert sine(near, left[:, :40]) < 1e-6 and found.angle_bound > 1e-4
    else:
        assert sine(near, left[:, :k]) < found.angle_bound + 1e-6 < 1.1e-4
    assert found.solver == solver
    assert found.energy == pytest.approx(float((SPECTRA[name] ** 2).sum()), rel=1e-6)
    torch.testing.assert_close(near.T @ near, torch.eye(k), rtol=0, atol=1e-6)


def test_blocks_make_no_difference_beyond_the_bound(monkeypatch):
    W = torch.from_numpy(matrix(SPECTRA["half"])[0])
    whole = leading(W, 12)
    monkeypatch.setattr(spectrum, "_BLOCK", 30_000)
    wide, tall = leading(W, 12), leading(W.T.contiguous(), 12)
    assert sine(wide.U, whole.U.double().numpy()) < wide.angle_bound + whole.angle_bound < 1e-4
    assert sine(tall.V, whole.U.double().numpy()) < tall.angle_bound + whole.angle_bound < 1e-4


@pytest.mark.parametrize("name", ["adapter", "few rows", "one element"])
def test_no_more_directions_than_the_matrix_has(name):
    """The Krylov space ends early, in exact zeros too."""
    W, draw = np.zeros((SIZE, 1000), np.float32), np.random.default_rng(1)
    if name == "adapter":
        W[:] = draw.standard_normal((SIZE, 8)) @ draw.standard_normal((8, 1000))
    elif name == "few rows":
        W[:8] = draw.standard_normal((8, 1000))
    else:
        W[5, 7] = 3.0
    found = leading(torch.from_numpy(W), 24)
    U, S, _ = torch.linalg.svd(torch.from_numpy(W).double(), full_matrices=False)
    count = 1 if name == "one element" else 8
    assert found.rank >= count and found.captured == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(found.S[:count].double(), S[:count], rtol=1e-5, atol=0)
    assert sine(found.U[:, :count], U[:, :count].numpy()) < 1e-4


def test_energy_stops_before_the_limit():
    W, left = matrix(SPECTRA["one"])
    shares = (SPECTRA["one"] ** 2).cumsum() / (SPECTRA["one"] ** 2).sum()
    found = leading(torch.from_numpy(W), 12, energy=float(shares[4]) - 1e-4)
    assert (found.rank, found.solver) == (5, "krylov")
    assert found.captured == pytest.approx(float(shares[4]), rel=1e-6) and sine(found.U, left[:, :5]) < 1e-4


@pytest.mark.parametrize(("k", "solver"), [(12, "krylov"), (60, "refined")])
@pytest.mark.parametrize("unit", [1e-22, 1e19])
def test_values_whose_squares_float32_cannot_hold(unit, k, solver):
    W, left = matrix(SPECTRA["half"])
    found = leading(torch.from_numpy(W * np.float32(unit)), k)
    assert found.solver == solver and sine(found.U, left[:, :k]) < 1e-4
    torch.testing.assert_close(found.S.double() / unit, torch.from_numpy(SPECTRA["half"][:k]), rtol=1e-5, atol=0)
