"""The two formulas of `python -m bench train` are one loss: this library's, and its best rival."""

import numpy as np
import pytest
import torch

from bench.demos.train import FORMULAS, OPTIONS
from bench.rivals import FUSED
from tests import oracle
from tests.support import gaussian

SHAPE = (2, 36, 5, 7)


def test_the_rival_is_the_best_composition() -> None:
    assert list(FORMULAS) == ["eager_composition", FUSED]


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str, device: str, backend: str) -> None:
    input, target, inside, outside = (
        gaussian(*SHAPE, seed=seed, device=device, requires_grad=seed == 0) for seed in range(4)
    )
    loss = FORMULAS[name](input, target, inside, outside, **OPTIONS)
    (gradient,) = torch.autograd.grad(loss, input)
    truth = oracle.smooth_l1(input, target, inside, outside, **OPTIONS)
    np.testing.assert_allclose(loss.item(), truth.loss, rtol=1e-5)
    np.testing.assert_allclose(gradient.cpu().numpy(), truth.input, rtol=1e-5, atol=1e-6)
