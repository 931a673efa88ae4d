"""What the guard keeps out of B·A while an optimiser moves the factors; no trainer, only matrices."""

import pytest
import torch

from hubforge.adapters._guard import Factors, Guard
from hubforge.tensors.projection import Subspace

OUT, IN, K, RANK = 24, 20, 5, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def subspace() -> Subspace:
    return Subspace(torch.linalg.qr(random(OUT, K, seed=1)).Q, torch.linalg.qr(random(IN, K, seed=2)).Q)


def fresh() -> Factors:
    """As PEFT draws them: A random, B zero."""
    return Factors(torch.nn.Parameter(random(RANK, IN, seed=3) / 4), torch.nn.Parameter(torch.zeros(OUT, RANK)))


OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.01),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.02, momentum=0.9),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.05),
}


def trained(guard: Guard, factors: Factors, optimizer: str = "adamw", steps: int = 200) -> float:
    """Fit B·A to noisy targets under the guard; the final loss."""
    optimizer = OPTIMIZERS[optimizer]([factors.a, factors.b])
    wanted, generator = random(OUT, IN, seed=4), torch.Generator().manual_seed(5)
    with torch.no_grad():
        guard.begin()
    for _ in range(steps):
        x = torch.randn(32, IN, generator=generator)
        loss = (x @ factors.a.T @ factors.b.T - x @ wanted.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            guard.before_step()
        optimizer.step()
        with torch.no_grad():
            guard.after_step()
    return loss.item()


def guarded(subspace: Subspace, how: str, optimizer: str = "adamw", strength: float = 1.0) -> tuple[Guard, Factors]:
    factors = fresh()
    guard = Guard({"m": factors}, {"m": subspace}, how, strength)
    trained(guard, factors, optimizer)
    return guard, factors


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_two_sided_leaks_rounding_only(subspace, optimizer):
    guard, _ = guarded(subspace, "two_sided", optimizer)
    assert guard.leaks()["m"].worst < 2e-7


def test_gradients_alone_as_published_leak_under_adam(subspace):
    """Adam divides each element by its own size, which leads out of any subspace; and A starts anywhere."""
    found = guarded(subspace, "published")[0].leaks()["m"]
    assert found.left > 0.05 and found.right > 0.1


def test_gradients_alone_hold_u_under_plain_descent_but_not_v(subspace):
    found = guarded(subspace, "published", "sgd")[0].leaks()["m"]
    assert found.left < 1e-5 and found.right > 0.1  # rounding adds up, since nothing mends it


@pytest.mark.parametrize(("how", "clear_of_u", "clear_of_v"), [("left", True, False), ("right", False, True)])
def test_one_sided_projections_hold_their_side(subspace, how, clear_of_u, clear_of_v):
    found = guarded(subspace, how)[0].leaks()["m"]
    assert (found.left < 2e-7) == clear_of_u and (found.right < 2e-7) == clear_of_v
    assert max(found.left, found.right) > 0.1


def test_core_removes_the_core_and_nothing_else(subspace):
    guard, factors = guarded(subspace, "core")
    delta = (factors.b @ factors.a).detach().double()
    U, V = subspace.U.double(), subspace.V.double()
    assert (U.T @ delta @ V).norm() < 1e-6 * delta.norm()
    found = guard.leaks()["m"]
    assert found.left > 0.1 and found.right > 0.1


def test_core_can_reach_every_change_without_a_core(subspace):
    """Δ = (I−P)Δ + PΔ(I−Q): the first part has its B clear of U, the second its A clear of V."""
    thin = random(OUT, 2, seed=6) @ random(2, IN, seed=7)
    P, Q = subspace.U @ subspace.U.T, subspace.V @ subspace.V.T
    wanted = thin - P @ thin @ Q
    halves = [torch.linalg.svd(part, full_matrices=False) for part in (wanted - P @ wanted, P @ wanted)]
    b = torch.cat([(u * s)[:, :2] for u, s, _ in halves], 1)
    a = torch.cat([v[:2] for _, _, v in halves])
    factors = Factors(torch.nn.Parameter(a), torch.nn.Parameter(b))
    with torch.no_grad():
        Guard({"m": factors}, {"m": subspace}, "core").begin()
    torch.testing.assert_close(factors.b @ factors.a, wanted, rtol=0, atol=1e-5)


def test_scale_damps_the_step_not_the_gradient(subspace):
    """One step of plain descent by hand: B moves by −lr · (I − sUUᵀ) · G."""
    factors = Factors(torch.nn.Parameter(random(RANK, IN)), torch.nn.Parameter(random(OUT, RANK, seed=8)))
    before, gradient = factors.b.detach().clone(), random(OUT, RANK, seed=9)
    factors.a.grad, factors.b.grad = torch.zeros(RANK, IN), gradient.clone()
    guard = Guard({"m": factors}, {"m": subspace}, "scale", 0.75)
    optimizer = torch.optim.SGD([factors.b], lr=0.1)
    with torch.no_grad():
        guard.before_step()
    assert torch.equal(factors.b.grad, gradient)
    optimizer.step()
    with torch.no_grad():
        guard.after_step()
    expected = before - 0.1 * (gradient - 0.75 * subspace.U @ (subspace.U.T @ gradient))
    torch.testing.assert_close(factors.b.detach(), expected, rtol=0, atol=1e-6)


def test_the_more_scale_damps_the_less_leaks(subspace):
    leaks = [guarded(subspace, "scale", strength=strength)[0].leaks()["m"].worst for strength in (0.25, 0.75, 1.0)]
    assert leaks[0] > leaks[1] > 0.02 and leaks[2] < 1e-6


def test_beginning_twice_is_beginning_once(subspace):
    factors = fresh()
    guard = Guard({"m": factors}, {"m": subspace})
    with torch.no_grad():
        guard.begin()
        once = factors.a.detach().clone()
        guard.begin()
    torch.testing.assert_close(factors.a.detach(), once, rtol=0, atol=1e-7)
    assert not torch.equal(once, fresh().a)


def test_accumulated_gradients_are_projected_as_their_sum(subspace):
    """One call on the sum gives what calls on every part would: the operator is linear and idempotent."""

    def projected(parts: list[torch.Tensor], each: bool) -> torch.Tensor:
        factors = fresh()
        factors.a.grad, factors.b.grad = torch.zeros(RANK, IN), torch.zeros(OUT, RANK)
        guard = Guard({"m": factors}, {"m": subspace})
        with torch.no_grad():
            for part in parts:
                factors.b.grad += part
                if each:
                    guard.before_step()
            guard.before_step()
        return factors.b.grad

    parts = [random(OUT, RANK, seed=seed) for seed in range(4)]
    torch.testing.assert_close(projected(parts, True), projected(parts, False), rtol=0, atol=2e-6)


def test_it_costs_learning_no_more_than_it_must(subspace):
    """With gradients projected too, the loss is no worse than with projection after each step alone."""
    with_gradients, without = fresh(), fresh()
    both = trained(Guard({"m": with_gradients}, {"m": subspace}), with_gradients)
    after_only = Guard({"m": without}, {"m": subspace})
    after_only.before_step = lambda: None
    assert both <= trained(after_only, without) * 1.001


def test_watching_changes_nothing(subspace):
    free, watched = fresh(), fresh()
    trained(Guard({"m": free}, {}), free)
    guard = Guard({"m": watched}, {}, watched={"m": subspace})
    trained(guard, watched)
    assert torch.equal(free.b, watched.b)
    assert guard.leaks()["m"].worst > 0.1
