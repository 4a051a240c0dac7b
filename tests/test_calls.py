"""Every kind of launch gives the oracle's answer: the tests that are run under compute-sanitizer.

    compute-sanitizer python -m pytest -m sanitize

The calls are those whose machine code `python -m bench codegen` shows.
"""

from typing import Any

import pytest

from bench.codegen.calls import calls
from tests import support
from tests.support import CALLS, call, check, values

# Memory that was never written must look so to the tool.
pytestmark = [support.on_kernel, pytest.mark.sanitize, pytest.mark.usefixtures("unpoisoned")]


@pytest.mark.parametrize("rows", [1, 33, 1031])
@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_call(name: str, rows: int) -> None:
    operands, options = call(name, rows)
    upstreams: list[Any] = [1.0, 3.7]
    if options["reduction"] == "none":  # a loss of every element gets a gradient for each
        view = calls(rows)[CALLS.index(name)].upstream
        upstreams.append(view(values(*operands[0].shape)))
    for upstream in upstreams:
        check(*operands, upstream=upstream, **options)
