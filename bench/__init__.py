"""Benchmarks of fused_smoothl1: `python -m bench` from the repository's root."""

import os

# torch.profiler reads this when torch is loaded; without it, it reports each start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
