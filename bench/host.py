"""`python -m bench host`: what a call costs the host, beside PyTorch's own loss.

Forward and backward of so few elements that a GPU waits for the host. Without a GPU, a stand-in for
Triton's driver launches nothing: the host does all that it does for a GPU up to there, and
PyTorch's operators compute on the CPU, in one thread. Times are medians, interleaved in one run;
that of the first call, with the compilation of its kernels, is of an empty cache.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (the name PyTorch users know it by)

from bench import stand_in
from bench.measure import measure
from bench.rivals import composition
from fused_smoothl1 import smooth_l1_loss

ROWS = 1000  # of boxes
SECONDS = 5.0
SIGMA = 3.0
BETA = 1 / SIGMA**2

Loss = Callable[[], Tensor]
Times = dict[str, dict[str, float]]


def main(arguments: Sequence[str]) -> int:
    """Measure, and print a table or JSON; return 0."""
    parser = argparse.ArgumentParser(prog="python -m bench host", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print it as JSON, nothing else")
    as_json = parser.parse_args(arguments).json
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if torch.cuda.is_available():
            times = _with_first_calls(torch.device("cuda"))
        else:
            os.environ.update(stand_in.ENVIRONMENT)
            torch.set_num_threads(1)
            with stand_in.gpu():
                times = _with_first_calls(torch.device("cpu"))
    if as_json:
        print(json.dumps(times, indent=1))
    else:
        # Imported here so that --json needs no more than the library.
        from bench.report import console, host_table

        console().print(host_table(times))
    return 0


def host_us(device: torch.device) -> Times:
    """Return the microseconds of a step, for each kind of call and each of those who make it.

    `fused` is this library. `torch` is `F.smooth_l1_loss` without the weights, of the same
    reduction, and `composition` has them around it. The `ratio` is that of `fused` to `torch`.
    """
    calls = _calls(device)
    steps = {(call, name): [step] for call, own in calls.items() for name, step in own.items()}
    times: Times = {call: {} for call in calls}
    for (call, name), timing in measure(steps, device, SECONDS).items():
        times[call][f"{name}_us"] = round(1e3 * timing.median_ms, 2)
    for own in times.values():
        own["ratio"] = round(own["fused_us"] / own["torch_us"], 3)
    return times


def _with_first_calls(device: torch.device) -> Times:
    calls, first = _calls(device), {}
    # Imports and the start of a device are no part of a call.
    smooth_l1_loss(*torch.zeros(2, 1, device=device))
    for call, own in calls.items():
        began = time.perf_counter()
        own["fused"]()
        first[call] = 1e3 * (time.perf_counter() - began)
    times = host_us(device)
    for call, milliseconds in first.items():
        times[call]["first_ms"] = round(milliseconds, 1)
    return times


def _calls(device: torch.device) -> dict[str, dict[str, Callable[[], None]]]:
    generator = torch.Generator().manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    input, target, outside = make(ROWS, 4).requires_grad_(), make(ROWS, 4), make(ROWS, 4)
    inside, mask = make(ROWS, 1), make(ROWS, 1) > 0
    floats, positives, upstream = mask.float(), mask.sum(), torch.ones_like(target)
    beta = torch.tensor(BETA, device=device)

    def step_of(loss: Loss, upstream: Tensor | None = None) -> Callable[[], None]:
        def step() -> None:
            input.grad = None
            loss().backward(upstream)

        return step

    mean = step_of(lambda: F.smooth_l1_loss(input, target, beta=BETA))
    return {
        "plain": {
            "fused": step_of(lambda: smooth_l1_loss(input, target, beta=BETA)),
            "torch": mean,
        },
        "tensor_beta": {
            "fused": step_of(lambda: smooth_l1_loss(input, target, beta=beta)),
            "torch": mean,
        },
        "weighted": {
            "fused": step_of(lambda: smooth_l1_loss(input, target, inside, outside, beta=BETA)),
            "torch": mean,
            "composition": step_of(
                lambda: composition(input, target, inside, outside, sigma=SIGMA, reduction="mean")
            ),
        },
        "masked": {
            "fused": step_of(
                lambda: smooth_l1_loss(
                    input, target, mask, beta=BETA, reduction="sum", normalizer=positives
                )
            ),
            "torch": step_of(lambda: F.smooth_l1_loss(input, target, beta=BETA, reduction="sum")),
            "composition": step_of(
                lambda: composition(
                    input, target, floats, sigma=SIGMA, reduction="sum", normalizer=positives
                )
            ),
        },
        "none": {
            "fused": step_of(
                lambda: smooth_l1_loss(input, target, beta=BETA, reduction="none"), upstream
            ),
            "torch": step_of(
                lambda: F.smooth_l1_loss(input, target, beta=BETA, reduction="none"), upstream
            ),
        },
    }
