"""A plugin of pytest, for bench/gpu.sh: print the report of each failure as soon as it is there."""

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Print it, in the process that has the terminal."""
    if report.failed:
        print(f"\n{report.nodeid}, {report.when}:\n{report.longreprtext}", flush=True)
