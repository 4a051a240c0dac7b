"""The two formulas of `python -m bench drafter` are one loss, of what its mask selects."""

import numpy as np
import pytest
import torch

from bench.demos.drafter import FORMULAS, OPTIONS, drafted
from bench.demos.language_model import HIDDEN, LENGTH, encode
from tests import oracle
from tests.support import gaussian

PROMPT, ANSWER = 'def mean(data): """', 'Return the mean."""'
PAIRS = [(PROMPT, ANSWER), (PROMPT, LENGTH * "a"), (LENGTH * "a", ANSWER)]


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str, device: str, backend: str) -> None:
    """Loss and gradient are those of EAGLE's formula in float64."""
    mask = drafted(encode(PAIRS, torch.device(device)))
    shape = (len(PAIRS), LENGTH - 2, HIDDEN)
    predicted = gaussian(*shape, seed=1, device=device, requires_grad=True)
    target = gaussian(*shape, seed=2, device=device)
    loss = FORMULAS[name](predicted, target, None, mask, **OPTIONS)
    (gradient,) = torch.autograd.grad(loss, predicted)
    divisor = HIDDEN * (int(mask.sum()) + 1e-5)
    truth = oracle.smooth_l1(
        predicted, target, outside_weights=mask, reduction="sum", normalizer=divisor
    )
    np.testing.assert_allclose(loss.item(), truth.loss, rtol=1e-5)
    np.testing.assert_allclose(gradient.cpu().numpy(), truth.input, rtol=1e-5, atol=1e-12)
    assert not gradient[~mask[..., 0]].any()


def test_mask() -> None:
    """It leaves out prompts and padding: a state counts by the character that it writes."""
    texts = encode(PAIRS, torch.device("cpu"))
    short, cut, no_answer = drafted(texts)[..., 0]
    written = [chr(number + ord(" ") - 1) for number in texts[0][0, 2:][short].tolist()]
    assert "".join(written) == ANSWER
    assert cut.tolist() == [False] * (len(PROMPT) - 2) + [True] * (LENGTH - len(PROMPT))
    assert not no_answer.any()
