"""Every kind of launch gives the oracle's answer: the tests that are run under compute-sanitizer.

    compute-sanitizer python -m pytest -m sanitize

The calls are those whose machine code `python -m bench codegen` shows.
"""

import os
from types import SimpleNamespace
from typing import Any

import pytest

from bench.codegen.calls import calls
from tests import conftest
from tests.support import check, gaussian, maker

# Memory that was never written must look so to the tool.
pytestmark = [pytest.mark.sanitize, pytest.mark.usefixtures("unpoisoned")]

NAMES = [f"{call.dtype} {call.name}" for call in calls(rows=1)]


@pytest.mark.parametrize("rows", [1, 33, 1031])
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_call(name: str, rows: int, triton_backend: str, device: str) -> None:
    call = calls(rows)[NAMES.index(name)]
    operands, options = call.bind(maker(device))
    upstreams: list[Any] = [1.0, 3.7]
    if options["reduction"] == "none":  # a loss of every element gets a gradient for each
        upstreams.append(call.upstream(gaussian(*operands[0].shape, seed=99, device=device)))
    for upstream in upstreams:
        check(*operands, upstream=upstream, **options)


def test_each_tensor_is_an_allocation(monkeypatch: pytest.MonkeyPatch) -> None:
    """In PyTorch's large blocks the tool would see no access beyond a tensor's end."""
    name = "PYTORCH_NO_CUDA_MEMORY_CACHING"
    for chosen in ("", "sanitize"):
        monkeypatch.setenv(name, "unset")
        monkeypatch.delenv(name)
        options = SimpleNamespace(
            getoption={"markexpr": chosen}.get, addinivalue_line=lambda *line: None
        )
        conftest.pytest_configure(options)  # type: ignore[arg-type]
        assert (os.environ.get(name) == "1") == (chosen == "sanitize")
