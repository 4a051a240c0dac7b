"""What GPUs can do at most, as their makers say.

A multiprocessor of NVIDIA's issues one instruction of a warp in each of its four schedulers in each
cycle (CUDA C++ Programming Guide, "Compute Capabilities"). A compute unit of AMD's has four vector
units, each of which is busy for four cycles with a vector instruction of its 64 threads: together
they begin one in each cycle ("AMD CDNA 3 Architecture" white paper).
"""

from typing import NamedTuple


class Device(NamedTuple):
    """A GPU: the target of its code, and its limits."""

    target: str
    multiprocessors: int
    issues: int  # instructions of a warp that a multiprocessor begins in a cycle
    clock_ghz: float  # at most
    memory_gbps: float  # 1e9 bytes a second


# Multiprocessors, clock and bandwidth from: "NVIDIA A100 Tensor Core GPU Architecture" and the
# datasheet of the A100 80GB SXM; the datasheets of the H100 SXM and the H200 SXM (the clock follows
# from their 67 TFLOPS in float32); the datasheet of the L4; "NVIDIA Ada GPU Architecture"; the data
# sheet of the AMD Instinct MI300X.
DEVICES = {
    "A100": Device("sm_80", 108, 4, 1.41, 2039),
    "H100": Device("sm_90", 132, 4, 1.98, 3350),
    "H200": Device("sm_90", 132, 4, 1.98, 4800),
    "L4": Device("sm_89", 58, 4, 2.04, 300),
    "RTX 4090": Device("sm_89", 128, 4, 2.52, 1008),
    "MI300X": Device("gfx942", 304, 1, 2.1, 5300),
}


def issue_shares(target: str, instructions: float, bytes_moved: float) -> dict[str, float]:
    """Return, for each GPU of a target, which share of its issue slots an element's work takes.

    That is while memory runs at full speed: `instructions` are what a warp issues, and
    `bytes_moved` what memory moves, both for each element.
    """
    return {
        name: instructions
        * (device.memory_gbps / bytes_moved)
        / (device.multiprocessors * device.issues * device.clock_ghz)
        for name, device in DEVICES.items()
        if device.target == target
    }
