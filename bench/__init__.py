"""Benchmarks of fused_smoothl1: `python -m bench` from the repository's root."""

import os

COMMANDS = {
    "codegen": "bench.codegen.table",
    "drafter": "bench.demos.drafter",
    "host": "bench.host",
    "plot": "bench.plot",
    "sweep": "bench.sweep",
    "torchvision": "bench.demos.detector",
    "traffic": "bench.traffic",
    "train": "bench.demos.train",
}
"""What may follow `python -m bench`, and the modules whose `main` takes the arguments after it."""

# torch.profiler reads this when torch is loaded; without it, it reports each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
