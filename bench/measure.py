"""The one way of measuring: time, memory, launches, and the copy they are compared with."""

import gc
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

Action = Callable[[], object]
Name = TypeVar("Name")

FEWEST_ROUNDS, MOST_ROUNDS = 5, 25
COPY_SECONDS = 0.5
SAMPLE_MS = 4.0  # aim for one sample: far above the clock's grain and the first launch's delay
FEWEST_REPEATS, MOST_REPEATS = 8, 128  # on a GPU: its queue has to fill to show its pace
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}  # of each buffer: many times any cache
WARM_UPS = 3  # of what a graph captures, as PyTorch's documentation has it
TRACED_LAUNCHES = ("kernel", "gpu_memset", "gpu_memcpy")


class Timing(NamedTuple):
    """Milliseconds per step over the samples of all rounds."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def measure(
    actions: Mapping[Name, Sequence[Action]],
    device: torch.device,
    seconds: float,
    steps: int = 1,
) -> dict[Name, Timing]:
    """Time several actions, interleaved round by round so that noise hits all alike.

    Each name comes with the same action on one or more sets of operands. A sample runs the action
    back to back, so a GPU's figure is its pace in a running program: host time where launching is
    the limit, device time where memory is. All samples walk one shared circle of operand sets:
    what an action reads was last read a whole circle ago, longer than the L2 remembers. A warm-up
    is not counted. There are as many rounds as fit into `seconds`, within limits. An action may do
    several `steps`, as a graph of all sets does; times are those of one.
    """
    if not actions:
        return {}
    sets = len(next(iter(actions.values())))
    turn = itertools.cycle(range(sets))
    samplers = {name: _sampler(choices, turn, device) for name, choices in actions.items()}
    samples: dict[Name, list[float]] = {name: [] for name in actions}
    rounds, done = MOST_ROUNDS, 0
    gc.collect()
    gc.disable()  # so that it does not run inside somebody's sample
    began = time.perf_counter()
    try:
        while done < rounds:
            for name, sample in samplers.items():
                samples[name].append(sample())
            done += 1
            per_round = (time.perf_counter() - began) / done
            rounds = int(np.clip(seconds / per_round, FEWEST_ROUNDS, MOST_ROUNDS))
    finally:
        gc.enable()
    return {
        name: Timing(*(float(value) / steps for value in np.percentile(values, [50, 20, 80])))
        for name, values in samples.items()
    }


@contextmanager
def cores_kept_busy(count: int) -> Iterator[None]:
    """Have so many processes spin meanwhile, each of which wants a core for itself."""
    # They end with this one, however it ends.
    spin = f"import os\nwhile os.getppid() == {os.getpid()}: pass"
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen([sys.executable, "-c", spin]))
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def copy_gbps(device: torch.device) -> float:
    """Return the device's copy bandwidth in GB/s (1e9), counting bytes read and bytes written."""
    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, device=device)
    sink = torch.zeros_like(source)
    timing = measure({"copy": [lambda: sink.copy_(source)]}, device, COPY_SECONDS)["copy"]
    return 2 * size / timing.median_ms / 1e6


def peak_extra_bytes(action: Action, device: torch.device) -> int | None:
    """Return the most bytes that were live at once beyond those before the step.

    The gradient, which every rival must make, is part of it. None where it cannot be had.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        action()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU allocator keeps no peak, but the profiler sees each allocation (+) and release (-).
    events = _trace(action, [ProfilerActivity.CPU])
    changes = [(float(e["ts"]), e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    live = itertools.accumulate(size for _, size in sorted(changes, key=lambda change: change[0]))
    return max(0, *live) if changes else None


def launches(action: Action) -> int | None:
    """Return how many kernels, fills and copies a step puts on a GPU; None if nothing is seen."""
    events = _trace(action, [ProfilerActivity.CPU, ProfilerActivity.CUDA])
    return sum(event.get("cat") in TRACED_LAUNCHES for event in events) or None


def replayed(actions: Sequence[Callable[[], Any]], device: torch.device) -> Callable[[], Any]:
    """Capture the actions in one CUDA graph; return its replay, which does all of them anew.

    It gives the tensors of the first. (Graphs of one action each, replayed in turns, would each
    take longer: a GPU is slow in going from one of many graphs to the next.)
    """
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):  # what a first run allocates or compiles is no part of a graph
        for _ in range(WARM_UPS):
            for action in actions:
                action()
    torch.cuda.current_stream(device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [action() for action in actions]

    def replay(kept: object = actions) -> Any:
        # The graph reads the memory of what the actions hold, and does not keep it alive.
        graph.replay()
        return results[0]

    return replay


def _sampler(
    choices: Sequence[Action], turn: Iterator[int], device: torch.device
) -> Callable[[], float]:
    """Warm the action up and return what takes one sample of it, in milliseconds per step."""

    def on_cpu() -> float:
        steps, began, elapsed = 0, time.perf_counter(), 0.0
        while elapsed < SAMPLE_MS:
            choices[next(turn)]()
            steps += 1
            elapsed = (time.perf_counter() - began) * 1e3
        return elapsed / steps

    def on_gpu(repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(repeats):
            choices[next(turn)]()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / repeats

    if device.type != "cuda":
        on_cpu()
        return on_cpu
    on_gpu(FEWEST_REPEATS)
    repeats = int(np.clip(SAMPLE_MS / on_gpu(FEWEST_REPEATS), FEWEST_REPEATS, MOST_REPEATS))
    return lambda: on_gpu(repeats)


def _trace(action: Action, activities: list[ProfilerActivity]) -> list[dict[str, Any]]:
    """Run once under the profiler and return the events of its trace."""
    with profile(activities=activities, profile_memory=True) as profiler:
        action()
        if ProfilerActivity.CUDA in activities:
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return list(json.loads(path.read_text())["traceEvents"])
