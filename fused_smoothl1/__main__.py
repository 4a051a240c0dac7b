"""`python -m fused_smoothl1`: a self-check to paste into a bug report.

It says what is installed, which backend computes here and why, and whether the loss and its
gradients agree with the formula, computed in float64. The exit status is 0 only if all agrees.
"""

import itertools
import os
import platform
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fused_smoothl1
from fused_smoothl1 import dispatch, eager
from fused_smoothl1.problem import FLOAT_DTYPES

ROWS = 500  # boxes of 4 coordinates: more than one block of the kernel
SIGMA = 3.0
ROUNDINGS = 16  # allowed error, in epsilons of the result's dtype and of its largest value
CASES = (
    *itertools.product(("sum",), FLOAT_DTYPES, (False, True)),
    *itertools.product(("none", "mean", "batchmean"), (torch.float32,), (False, True)),
)


def main() -> int:
    """Print the report; return 0 if everything agrees with the formula and 1 if not."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device, name = torch.device("cpu"), platform.machine()
    if accelerator is not None and accelerator.type in dispatch.TRITON_DEVICES:
        device = torch.device(accelerator.type, torch.accelerator.current_device_index())
        name = torch.get_device_module(device).get_device_properties(device).name
    _say("python", f"{platform.python_version()} on {platform.platform()}")
    _say("torch", torch.__version__)
    _say("triton", _triton_version())
    _say("fused_smoothl1", fused_smoothl1.__version__)
    _say("device", f"{device}, {name}")
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("ignore")
        warnings.filterwarnings("always", "fused_smoothl1")
        try:
            dispatch.backend_on(device)
        except (RuntimeError, ValueError) as error:
            _say("backend", f"none: {error}")
            return 1
        # Every case is run, also after one that failed.
        errors = [_error_of(*case, device) for case in CASES]
    # (Only now: a kernel may have turned out not to compile.)
    _say("backend", _backend(device, [str(warning.message) for warning in caught]))
    agreed = sum(error <= ROUNDINGS for error in errors)
    # (Python's max may pass a NaN over, PyTorch's does not.)
    largest = f"largest error {torch.tensor(errors).max():.2g} eps, allowed {ROUNDINGS}"
    cases = f"{agreed} of {len(CASES)} cases agree with the formula in float64"
    _say("agreement", f"{cases}: {largest}")
    return int(agreed < len(CASES))


def _say(what: str, text: str) -> None:
    print(f"{what + ':':16}{text}", flush=True)


def _triton_version() -> str:
    try:
        import triton

        return str(triton.__version__)
    except Exception as error:  # It may be another module of this name.
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == "triton"
        return "not installed" if is_missing else f"broken: {error!r}"


def _backend(device: torch.device, told: list[str]) -> str:
    """Name the backend, and what made the dispatch choose it."""
    name = "eager PyTorch" if dispatch.backend_on(device) is eager else "Triton kernel"
    choice = os.environ.get("FUSED_SMOOTHL1_BACKEND", "auto")
    if told:
        return f"{name}: {told[-1]}"
    if choice != "auto":
        return f"{name}, because FUSED_SMOOTHL1_BACKEND={choice}"
    devices = " and ".join(dispatch.TRITON_DEVICES)
    return f"{name}, because this is {device.type} and the kernel is for {devices}"


def _error_of(reduction: str, dtype: torch.dtype, masked: bool, device: torch.device) -> float:
    """Return the largest error of loss and gradients in eps; tell if it is more than allowed.

    Masked means that NaN is excluded by a mask.
    """
    generator = torch.Generator().manual_seed(0)
    input, target, inside, outside = (
        torch.randn(ROWS, columns, generator=generator).to(dtype) for columns in (4, 4, 1, 4)
    )
    operands, exact = [input, target, inside, outside], [input, target, inside, outside]
    if masked:
        mask = inside > 0
        operands[:3] = input.where(mask, torch.nan), target.where(mask, torch.nan), mask
        exact[2] = mask
    operands = [t.to(device) for t in operands]
    try:
        loss = fused_smoothl1.smooth_l1_loss
        results = _differentiated(loss, operands, masked, sigma=SIGMA, reduction=reduction)
        wanted = _differentiated(_formula, [t.double() for t in exact], masked, reduction=reduction)
        # A NaN anywhere makes the largest of them NaN, which is not below anything.
        error = float(torch.stack(list(map(_error, results, wanted))).max())
    except Exception:  # Whatever a compiler or a driver raises belongs in the report.
        traceback.print_exc(file=sys.stdout)
        error = torch.inf
    if not error <= ROUNDINGS:
        weights = "a mask over NaN" if masked else "float weights"
        _say("FAIL", f"{dtype}, {reduction}, {weights}: off by {error:.2g} of {ROUNDINGS} eps")
    return error


def _differentiated(
    function: Callable[..., Tensor], operands: list[Tensor], masked: bool, **options: Any
) -> list[Tensor]:
    """Return the loss, and its gradients by input, target and the weights that are no mask."""
    wanted = [t.requires_grad_() for i, t in enumerate(operands) if not (masked and i == 2)]
    loss = function(*operands, **options)
    return [loss.detach(), *torch.autograd.grad((2 * loss).sum(), wanted)]


def _formula(
    input: Tensor, target: Tensor, inside: Tensor, outside: Tensor, reduction: str
) -> Tensor:
    """Compute the loss as the documentation writes it."""
    x, beta = inside * (input - target), 1 / SIGMA**2
    loss = outside * torch.where(x.abs() < beta, 0.5 * x**2 / beta, x.abs() - 0.5 * beta)
    divisors = {"mean": loss.numel(), "batchmean": len(loss)}
    return loss if reduction == "none" else loss.sum() / divisors.get(reduction, 1)


def _error(result: Tensor, wanted: Tensor) -> Tensor:
    difference = (result.cpu().double() - wanted).abs().max()
    return difference / wanted.abs().max() / torch.finfo(result.dtype).eps


if __name__ == "__main__":
    sys.exit(main())
