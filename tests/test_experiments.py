"""The variants that wait for a GPU compute the same as the library: each edit still applies."""

import pytest
import torch

from bench.experiments import AS_BUILT, EXPERIMENTS, Edit, Variant, backends
from fused_smoothl1.autograd import apply
from fused_smoothl1.contract import make_problem
from tests import oracle
from tests.conftest import HAS_TRITON
from tests.support import assert_near, coin, gaussian

# Of 4 elements: several tiles or blocks and a tail, for every size of them.
ROWS = {"triton": 2063, "eager": 2**18 + 1}
CASES = [(AS_BUILT, "triton"), (AS_BUILT, "eager")] + [
    (variant, experiment.backend) for experiment in EXPERIMENTS for variant in experiment.variants
]
UPSTREAM = 3.0


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("variant", "backend"), CASES, ids=lambda case: getattr(case, "name", case)
)
def test_same_answers(variant: Variant, backend: str, masked: bool, device: str) -> None:
    if backend == "triton" and not HAS_TRITON:
        pytest.skip("waits for a machine with Triton")
    rows = ROWS[backend]
    input, target, inside, outside = (gaussian(rows, 4, seed=s, device=device) for s in range(4))
    if masked:
        inside = coin(rows, 1, seed=5, p=0.1, device=device)
    operands = (input.requires_grad_(), target, inside, outside.abs())
    reference = oracle.smooth_l1(*operands, beta=0.5, reduction="sum", upstream=UPSTREAM)
    problem = make_problem(*operands, 1.0, None, 0.5, True)
    with backends((variant,), backend) as (loaded,):
        for _ in range(2):  # What a first call keeps must serve the next.
            loss = apply(*operands, problem, loaded)
            (gradient,) = torch.autograd.grad(loss, input, torch.full_like(loss, UPSTREAM))
            dtype = torch.float32
            assert_near("gradient", gradient, reference.input, computed_in=dtype)
            assert_near("loss", loss, reference.loss, computed_in=dtype, terms=input.numel())


@pytest.mark.parametrize("old", ["no such line", "import"])
def test_an_edit_that_does_not_fit_is_an_error(old: str) -> None:
    stale = Variant("stale", (Edit("eager", old, ""),))
    with pytest.raises(ValueError, match="must hold"), backends((stale,), "eager"):
        pass
