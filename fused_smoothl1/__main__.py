"""`python -m fused_smoothl1`: a self-check to paste into a bug report.

It says what is installed, which backend computes here and why, and whether the loss and its
gradients agree with the formula, which this file computes in float64 on the CPU. On a GPU it adds
the speed-up over the formula in eager PyTorch. The exit status is 0 only if all agrees.
"""

import os
import platform
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

import fused_smoothl1
from fused_smoothl1 import dispatch, eager

ROWS, COLUMNS = 2000, 4  # boxes and their coordinates: more than one block of the kernel
SIGMA = 3.0
ROUNDINGS = 16  # allowed error, in epsilons of the result's dtype and of its largest value
SPEED_ROWS = 2**20
SPEED_STEPS = 50
NAMES = ("input", "target", "inside", "outside")


class Case(NamedTuple):
    """One comparison. With a mask, what it does not select is NaN in input and target."""

    reduction: str
    dtype: torch.dtype = torch.float32
    masked: bool = False

    def __str__(self) -> str:
        """Name it in a line of the report."""
        weights = "a mask over NaN" if self.masked else "float weights"
        return f"{str(self.dtype).removeprefix('torch.')}, {self.reduction}, {weights}"


CASES = (
    Case("none"),
    Case("sum"),
    Case("mean"),
    Case("batchmean"),
    Case("sum", masked=True),
    Case("none", masked=True),
    Case("sum", torch.float64),
    Case("sum", torch.float16),
    Case("sum", torch.bfloat16, masked=True),
)


def main() -> int:
    """Print the report; return 0 if everything agrees with the formula and 1 if not."""
    device = _device()
    _say("python", f"{platform.python_version()} on {platform.platform()}")
    _say("torch", torch.__version__)
    _say("triton", _triton_version())
    _say("fused_smoothl1", fused_smoothl1.__version__)
    _say("device", _device_name(device))
    try:
        _say("backend", _backend(device))
    except (RuntimeError, ValueError) as error:
        _say("backend", f"none: {error}")
        return 1
    # Every case is run and reported, also after one that failed.
    agreed = sum([_agrees(case, device) for case in CASES])
    _say("agreement", f"{agreed} of {len(CASES)} cases agree with the formula in float64")
    if agreed < len(CASES):
        return 1
    _say("speed", "measured on GPUs only" if device.type == "cpu" else _speed(device))
    return 0


def formula(input: Tensor, target: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """Compute the loss of every element as the documentation writes it."""
    beta = 1 / SIGMA**2
    x = inside * (input - target)
    small = x.abs() < beta
    return outside * torch.where(small, 0.5 * x**2 / beta, x.abs() - 0.5 * beta)


def _say(what: str, text: str) -> None:
    print(f"{what + ':':16}{text}", flush=True)


def _device() -> torch.device:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and accelerator.type in dispatch.TRITON_DEVICES:
        return torch.device(accelerator.type, torch.accelerator.current_device_index())
    return torch.device("cpu")


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu, {platform.machine()}, {torch.get_num_threads()} threads"
    properties = torch.get_device_module(device).get_device_properties(device)
    runtime = torch.version.hip or torch.version.cuda or torch.version.xpu
    return f"{device}, {properties.name}, runtime {runtime}"


def _triton_version() -> str:
    try:
        import triton
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return "not installed"
        return f"cannot be imported: {error}"
    except Exception as error:
        return f"cannot be imported: {error!r}"
    return str(triton.__version__)


def _backend(device: torch.device) -> str:
    """Name the backend, and what made the dispatch choose it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chosen = dispatch.backend_on(device)
    name = "eager PyTorch" if chosen is eager else "Triton kernel"
    choice = os.environ.get("FUSED_SMOOTHL1_BACKEND", "auto")
    if caught:
        return f"{name}: {caught[-1].message}"
    if choice != "auto":
        return f"{name}, because FUSED_SMOOTHL1_BACKEND={choice}"
    devices = " and ".join(dispatch.TRITON_DEVICES)
    return f"{name}, because this is {device.type} and the kernel is for {devices}"


def _agrees(case: Case, device: torch.device) -> bool:
    try:
        errors = _errors(case, device)
    except Exception:  # whatever a compiler or a driver raises belongs in the report
        traceback.print_exc(file=sys.stdout)
        _say("FAIL", f"{case}: the exception above")
        return False
    worst, error = max(errors.items(), key=lambda item: item[1])
    # Written so that NaN fails.
    agrees = all(value <= ROUNDINGS for value in errors.values())
    _say("ok" if agrees else "FAIL", f"{case}: off by {error:.2g} of {ROUNDINGS} eps in {worst}")
    return agrees


def _errors(case: Case, device: torch.device) -> dict[str, float]:
    """Return the errors of the loss and of each gradient, in epsilons of their largest value."""
    operands, given = _operands(case)
    wanted = _reference(case, operands)
    given = [operand.to(device) for operand in given]
    for operand in given:
        operand.requires_grad_(operand.is_floating_point())
    loss = fused_smoothl1.smooth_l1_loss(*given, sigma=SIGMA, reduction=case.reduction)
    (2 * loss).sum().backward()
    found = {"loss": loss} | {
        f"the gradient of {name}": operand.grad
        for name, operand in zip(NAMES, given, strict=True)
        if operand.grad is not None
    }
    if len(found) != 1 + sum(operand.requires_grad for operand in given):
        raise AssertionError(f"gradients are missing: there are only {', '.join(found)}")
    return {name: _error(value, wanted[name]) for name, value in found.items()}


def _error(value: Tensor, wanted: Tensor) -> float:
    difference = (value.detach().cpu().double() - wanted).abs().max()
    # A NaN is to be reported as the worst error there can be, and max() would overlook it.
    error = float(difference / wanted.abs().max() / torch.finfo(value.dtype).eps)
    return error if error == error else float("inf")


def _operands(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Return finite operands for the formula, and the same as the library gets them.

    Only the latter know masks, so only they can hold NaN where nothing is selected.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(ROWS, COLUMNS), (ROWS, COLUMNS), (ROWS, 1), (ROWS, COLUMNS)]
    plain = [torch.randn(shape, generator=generator).to(case.dtype) for shape in shapes]
    if not case.masked:
        return plain, [operand.clone() for operand in plain]
    selected = plain[2] > 0
    plain[2] = selected.to(case.dtype)
    input, target, _, outside = plain
    holes = ~selected.expand_as(input)
    nan = float("nan")
    return plain, [
        input.masked_fill(holes, nan),
        target.masked_fill(holes, nan),
        selected,
        outside.clone(),
    ]


def _reference(case: Case, operands: list[Tensor]) -> dict[str, Tensor]:
    wide = [operand.double().requires_grad_() for operand in operands]
    terms = formula(*wide)
    divisors = {"mean": ROWS * COLUMNS, "batchmean": ROWS}
    loss = terms if case.reduction == "none" else terms.sum() / divisors.get(case.reduction, 1)
    (2 * loss).sum().backward()
    gradients = {
        f"the gradient of {name}": operand.grad
        for name, operand in zip(NAMES, wide, strict=True)
        if operand.grad is not None
    }
    return {"loss": loss.detach(), **gradients}


def _speed(device: torch.device) -> str:
    """Time forward and backward of the loss and of the formula in eager PyTorch."""
    shape = (SPEED_ROWS, COLUMNS)
    input = torch.randn(shape, device=device, requires_grad=True)
    rest = [torch.randn(shape, device=device) for _ in range(3)]

    def eager_step() -> None:
        torch.autograd.grad(formula(input, *rest).sum(), input)

    def fused_step() -> None:
        loss = fused_smoothl1.smooth_l1_loss(input, *rest, sigma=SIGMA, reduction="sum")
        torch.autograd.grad(loss, input)

    slow, fast = _milliseconds(eager_step), _milliseconds(fused_step)
    return (
        f"{slow / fast:.1f} times eager's ({fast:.3f} ms, eager {slow:.3f} ms, "
        f"forward + backward of {input.numel():,} float32 elements with both weights)"
    )


def _milliseconds(step: Callable[[], None]) -> float:
    for _ in range(SPEED_STEPS // 5):  # compiles the kernel, and wakes the GPU up
        step()
    torch.accelerator.synchronize()
    began = time.perf_counter()
    for _ in range(SPEED_STEPS):
        step()
    torch.accelerator.synchronize()
    return (time.perf_counter() - began) / SPEED_STEPS * 1e3


if __name__ == "__main__":
    sys.exit(main())
