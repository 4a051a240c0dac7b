"""`python -m bench.determinism`: on CUDA, are the bits the same at every run?

Each call is repeated, then run on several streams at once, then replayed from a CUDA graph; every
loss and gradient must equal the first run's bit for bit.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.calls import Call, calls

ROWS = (33, 200_003)  # one block, and more blocks than any GPU runs at once
REPEATS = 20
STREAMS = 4
RUNS_PER_STREAM = 5
REPLAYS = 5


def main() -> int:
    """Check every call; return 1 if bits differ or there is no GPU."""
    if not torch.cuda.is_available():
        print("bench.determinism: PyTorch sees no CUDA device here; nothing was run")
        return 1
    device = torch.device("cuda")
    checked, differing = 0, []
    for rows in ROWS:
        for call in calls(rows, device):
            checked += 1
            differing += [f"{call.name}, {rows} rows: {where}" for where in _differences(call)]
    print(
        f"bench.determinism: {checked} calls, each {REPEATS} times in a row, {RUNS_PER_STREAM}"
        f" times on {STREAMS} streams at once, {REPLAYS} times from a graph;"
        f" {len(differing)} differences",
        *differing,
        sep="\n  ",
    )
    return int(bool(differing))


def _differences(call: Call) -> Iterator[str]:
    """Yield where the bits are not those of the first run."""
    first = call()
    if not all(_same_bits(first, call()) for _ in range(REPEATS)):
        yield "repeated"
    if not all(_same_bits(first, outputs) for outputs in _on_streams(call)):
        yield "on several streams"
    if not all(_same_bits(first, outputs) for outputs in _replayed(call)):
        yield "from a CUDA graph"


def _same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    """Compare bytes, so that NaN equals itself and 0 differs from -0."""
    return all(torch.equal(_bytes_of(a), _bytes_of(b)) for a, b in zip(first, second, strict=True))


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _new_stream() -> torch.cuda.Stream:
    untyped: Any = torch.cuda.Stream  # its constructor has no types
    stream: torch.cuda.Stream = untyped()
    return stream


def _on_streams(call: Call) -> list[list[Tensor]]:
    """Run on several streams at once: queue everything, then wait for all."""
    streams = [_new_stream() for _ in range(STREAMS)]
    outputs = []
    torch.cuda.synchronize()
    for _ in range(RUNS_PER_STREAM):
        for stream in streams:
            with torch.cuda.stream(stream):
                outputs.append(call())
    torch.cuda.synchronize()
    return outputs


def _replayed(call: Call) -> Iterator[list[Tensor]]:
    """Capture forward and backward in one graph and replay it over spoilt outputs."""
    warm_up = _new_stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        call()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    for _ in range(REPLAYS):
        for output in outputs:
            output.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        yield outputs


if __name__ == "__main__":
    sys.exit(main())
