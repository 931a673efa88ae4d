"""`breadcrumbs_ties`: by hand, its laws, and one wrong input."""

import pytest
import torch

from hubforge.stages.breadcrumbs import Breadcrumbs
from hubforge.stages.breadcrumbs_ties import BreadcrumbsTies


def test_by_hand(merge):
    w = {"m": [0.0, 0.0, 0.0, 0.0], "a": [9.0, 4.0, 3.0, 1.0], "b": [-2.0, -5.0, 6.0, 7.0]}
    # A quarter goes as outlier (9; 7), half is kept: (0, 4, 3, 0) and (0, -5, 6, 0). The sums: 0, -1, 9, 0.
    op = BreadcrumbsTies(base_model="m", models=["a", "b"], density=0.5, gamma=0.25)
    assert merge(op, w).tolist() == [0.0, -5.0, 9.0, 0.0]


def test_one_model_is_breadcrumbs(merge, family):
    fields = {"base_model": "m", "models": ["b"], "density": 0.4}
    assert torch.equal(merge(BreadcrumbsTies(**fields), family), merge(Breadcrumbs(**fields), family))


def test_against_a_loop_in_float64(merge, family):
    op = BreadcrumbsTies(base_model="m", models=["a", "b", "c"], density=0.4, gamma=0.05, weights=[1.0, 0.5, -1.0])
    merged = merge(op, family, rows=10)
    parts = []
    for ref, weight in [("a", 1.0), ("b", 0.5), ("c", -1.0)]:
        delta = (family[ref] - family["m"]).flatten()
        chosen = delta.abs().argsort(descending=True)[int(0.05 * 3072) : int(0.05 * 3072) + int(0.4 * 3072)]
        part = torch.zeros(3072).double()
        part[chosen] = weight * delta[chosen].double()
        parts.append(part.view(64, 48))
    for i in range(0, 64, 9):
        for j in range(48):
            values = [float(part[i, j]) for part in parts]
            change = sum(value for value in values if (value > 0) == (sum(values) >= 0))
            assert merged[i, j].item() == pytest.approx(float(family["m"][i, j]) + change, abs=1e-6)


def test_one_density_for_each_model():
    with pytest.raises(ValueError, match="density has 1 entries for 2 models"):
        BreadcrumbsTies(base_model="m", models=["a", "b"], density=[0.5])
