"""`python -m bench sweep`: the constants of the launch, varied one at a time.

Each value is checked against the composition in float64 and timed, interleaved with the code as it
is. `RESULTS.md` keeps what came of it. Without a GPU the kernel runs in Triton's interpreter
(`TRITON_INTERPRET=1`), which checks the answers and rehearses a sweep, and says nothing about time.
"""

import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import torch

from bench.rivals import Rival, autograd_step, fused_on
from bench.run import begin, parser_of
from bench.workloads import RPN, Spec

SECONDS = 2.0  # of timing a workload
AS_BUILT = "as built"
VARIED: tuple[dict[str, int], ...] = (
    {},
    {"TILE_BYTES": 2048},
    {"MOST_ELEMENTS": 2048},
    {"TILE_BYTES": 8192, "MOST_ELEMENTS": 2048},  # a larger tile has more elements too
    {"THREADS": 64},
    {"THREADS": 256},
    {"PROGRAMS_PER_MULTIPROCESSOR": 4},
    {"PROGRAMS_PER_MULTIPROCESSOR": 16},
    {"PROGRAMS_PER_MULTIPROCESSOR": 32},
    {"MULTIPLY_BELOW": 0},
    {"MULTIPLY_BELOW": 1 << 30},
)


def main(arguments: Sequence[str]) -> int:
    """Run the sweep; return 0, 1 if an answer is wrong or cannot be had, or 130 if interrupted."""
    options = parser_of("python -m bench sweep", __doc__ or "").parse_args(arguments)
    run = begin(options, rivals(options.device), SECONDS, "sweep-{}")
    return run.finish(lambda: run.fill(specs(run.device)), compared=AS_BUILT)


def specs(device: torch.device) -> list[Spec]:
    """Return the workloads: first the kernels alone, in graphs, then calls with the host's time."""
    if device.type == "cpu":
        return [Spec("dense", 2**14), Spec("dense", 2**14, torch.bfloat16), Spec("row_mask", 2**14)]
    alone = [Spec("dense", 2**26, graph=True), Spec("dense", 2**26, torch.bfloat16, graph=True)]
    alone += [Spec("dense", 2**22, graph=True), Spec("row_mask", 2**26, graph=True)]
    return alone + [Spec("dense", n) for n in (RPN, 2**18, 2**20, 2**22)]


def rivals(device: torch.device) -> list[Rival]:
    """Return the loss as it is, and with each of the other constants."""
    try:
        from fused_smoothl1 import launch
    except ImportError as error:
        sys.exit(f"bench: a sweep is of Triton's launches, and Triton cannot be imported: {error}")
    if (device.type == "cpu") != launch.INTERPRETED:
        sys.exit("bench: a sweep is of a GPU; without one, TRITON_INTERPRET=1 rehearses it")
    return [
        Rival(
            ", ".join(f"{name} {value}" for name, value in constants.items()) or AS_BUILT,
            partial(autograd_step, fused_on(_varied(launch, constants))),
        )
        for constants in VARIED
    ]


def _varied(launch: ModuleType, constants: dict[str, int]) -> ModuleType:
    """Load the module once more, with these constants and a memory of its own."""
    spec: Any = spec_from_file_location(f"{launch.__name__}_varied", launch.__file__)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, value in constants.items():
        assert hasattr(module, name), name
        setattr(module, name, value)
    return module
