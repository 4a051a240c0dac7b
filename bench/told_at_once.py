"""A plugin of pytest, for bench/gpu.sh: print the report of each failure as soon as it is there."""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print it (of xdist's processes, only the main one's output is seen)."""
    if report.failed:
        print(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}", flush=True)
