"""The module is the function with its options kept; a tensor is a buffer, a parameter stays one."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.testing import assert_close

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss
from tests import support
from tests.support import DEVICE, REDUCTIONS, Loss, Shape, boxes, call, results

pytestmark = support.on_both

# (Options that go by the name of a variable have no types.)
loss: Loss = smooth_l1_loss
module: Callable[..., SmoothL1Loss] = SmoothL1Loss
by_name = pytest.mark.parametrize("name", ["sigma", "beta"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_is_the_function(reduction: Any) -> None:
    """With all options kept but the normalizer; it can be copied, saved, moved and hooked."""
    operands, options = call("float32 row mask, int64 normalizer", reduction=reduction)
    expected = loss(*operands, **options)
    normalizer = options.pop("normalizer")
    criterion: Any = SmoothL1Loss(sigma=3.0, reduction=reduction)
    twins = [copy.copy(criterion), copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    for twin in (*twins, criterion.half().to(DEVICE).eval()):
        assert repr(twin) == f"SmoothL1Loss(sigma=3.0, reduction={reduction!r})"
        assert not [*twin.state_dict(), *twin.parameters()]
        assert torch.equal(twin(*operands, normalizer=normalizer), expected)
    criterion.register_forward_hook(lambda criterion, operands, loss: 2 * loss)
    assert torch.equal(criterion(*operands, normalizer=normalizer), 2 * expected)


def test_options_that_are_kept() -> None:
    old, new = nn.SmoothL1Loss(), SmoothL1Loss()
    assert (new.beta, new.reduction) == (old.beta, old.reduction)
    assert SmoothL1Loss(sigma=3.0).beta is None
    assert repr(SmoothL1Loss(beta=0.0)) == "SmoothL1Loss(beta=0.0, reduction='mean')"


@by_name
def test_keeps_a_tensor(name: str) -> None:
    """A buffer, which moves, is saved and loaded, and may be changed between steps."""
    value, operands, file = torch.tensor([0.3, 0.5, 1, 2], device=DEVICE), boxes(6), io.BytesIO()
    kept, other = (module(**{name: t.clone()}) for t in (value, torch.ones_like(value)))
    assert dict(kept.named_buffers()).keys() == {name}
    assert not list(kept.parameters())
    assert repr(kept) == f"SmoothL1Loss({name}=tensor of shape (4,), reduction='mean')"
    torch.save(kept.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    exportable = copy.deepcopy(kept)
    exported = torch.export.export(exportable, tuple(t.detach() for t in operands)).module()
    for one, factor in product((kept, other, exported), (1.0, 2.0)):
        one.get_buffer(name).mul_(factor)
        assert_close(one(*operands), loss(*operands, **{name: factor * value}))
    assert kept.double().get_buffer(name).dtype == torch.float64
    assert not module(**{name: nn.Buffer(value, persistent=False)}).state_dict()


@by_name
def test_trains_a_parameter(name: str) -> None:
    """And a functional call puts another in its place."""
    parameter, other = (nn.Parameter(torch.tensor(n, device=DEVICE)) for n in (0.5, 0.7))
    criterion, operands = module(**{name: parameter}), boxes(6)
    assert list(criterion.parameters()) == [parameter]
    assert not list(criterion.buffers())
    _, _, expected = results(loss, operands, **{name: parameter})
    criterion(*operands).backward()
    assert_close(parameter.grad, expected)
    replaced = functional_call(criterion, {name: other}, tuple(operands))
    assert_close(replaced, loss(*operands, **{name: other}))


@pytest.mark.parametrize("shape", [(), (6, 1)], ids=str)
def test_one_compilation_for_all_values(shape: Shape) -> None:
    """As an argument and as a buffer, also of values that are not allowed."""
    counter = CompileCounterWithBackend("inductor")
    criterion = module(beta=torch.ones(shape, device=DEVICE), reduction="sum")

    def step(*operands: Tensor, beta: Tensor) -> Tensor:
        total = loss(*operands, beta=beta) + criterion(*operands[:3])
        return total + loss(*operands[:2], sigma=beta + 0.5)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for value in (1.0, 0.5, 0.0, 3.0, -1.0, math.nan):
        criterion.get_buffer("beta").fill_(value)
        operands = boxes(6, (6, 1), (6, 4), grad=4)
        beta = torch.full(shape, value, device=DEVICE, requires_grad=True)
        pair = (results(function, operands, beta=beta) for function in (compiled, step))
        assert_close(*pair, equal_nan=True)
    assert counter.frame_count == 1
