"""A user's strict type checker accepts right uses of the package and rejects wrong ones.

It runs in a folder of its own, and finds the package as it finds what is installed.
"""

import re
from pathlib import Path

from tests.support import ROOT, run_python

RIGHT = """
import torch
from torch import Tensor
from typing_extensions import assert_type

import fused_smoothl1
from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss


def losses(pred: Tensor, target: Tensor) -> list[Tensor]:
    mask = torch.ones(len(pred), 1, dtype=torch.bool)
    return [
        smooth_l1_loss(pred, target),
        smooth_l1_loss(pred, target, mask, 2.0, beta=0.5, reduction="batchmean"),
        smooth_l1_loss(pred, target, None, 1, sigma=3, reduction="sum", normalizer=7),
        smooth_l1_loss(pred, target, outside_weights=mask, reduction="sum", normalizer=mask.sum()),
        smooth_l1_loss(pred, target, beta=target.abs().median()),
        smooth_l1_loss(pred, target, sigma=torch.ones(4)),
        SmoothL1Loss(sigma=3.0, reduction="sum")(pred, target, mask, normalizer=mask.sum()),
    ]


assert_type(smooth_l1_loss(torch.zeros(2), torch.zeros(2)), Tensor)
assert_type(SmoothL1Loss()(torch.zeros(2), torch.zeros(2)), Tensor)
assert_type(fused_smoothl1.__version__, str)
"""
# Every line that has a comment is wrong, and no other.
WRONG = """
from torch import Tensor

from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss


def losses(pred: Tensor, target: Tensor) -> None:
    smooth_l1_loss(pred)  # no target
    smooth_l1_loss(pred, [1.0])  # a list for a tensor
    smooth_l1_loss(pred, target, "mask")  # a string for inside weights
    smooth_l1_loss(pred, target, None, "mask")  # a string for outside weights
    smooth_l1_loss(pred, target, 0.5)  # a number for inside weights
    smooth_l1_loss(pred, target, sigma="3")  # a string for a number
    smooth_l1_loss(pred, target, None, None, 3.0)  # sigma by position
    smooth_l1_loss(pred, target, reduction=None)  # no reduction
    smooth_l1_loss(pred, target, reduction="avg")  # no such reduction
    smooth_l1_loss(pred, target, weight=1.0)  # no such argument
    smooth_l1_loss(pred, target, beta=1.0)
    SmoothL1Loss(0.5)  # beta by position
    SmoothL1Loss(beta=[0.5])  # a list for a tensor
    SmoothL1Loss(beta=pred)
    SmoothL1Loss(reduction="Mean")  # no such reduction
    SmoothL1Loss()(pred)  # no target
    SmoothL1Loss()(pred, target, "mask")  # a string for weights
    SmoothL1Loss()(pred, target, beta=1.0)  # an option in the call
    SmoothL1Loss()(pred, target, outside_weights=2.0)
    text: str = smooth_l1_loss(pred, target)  # a tensor for a string
"""


def test_strict_type_checker(tmp_path: Path) -> None:
    # This marker makes a checker read the annotations (and be it missing here, those of an
    # installation in editable mode may be found instead).
    assert (ROOT / "fused_smoothl1" / "py.typed").exists()
    start = f"import os, mypy.__main__ as mypy\nos.chdir({str(tmp_path)!r})\nmypy.console_entry()"
    # --config-file= keeps the settings of a user's home out of it. The cache is kept from run to
    # run: reading PyTorch's annotations is nearly all of the time.
    flags = ["--strict", "--config-file=", f"--cache-dir={ROOT / '.mypy_cache' / 'consumer'}"]
    for file, code in (("right.py", RIGHT), ("wrong.py", WRONG)):
        (tmp_path / file).write_text(code)
    said = run_python("-c", start, *flags, "right.py", "wrong.py", status=[1])
    found = re.findall(r"^(\w+)\.py:(\d+): error", said, re.MULTILINE)
    wrong = {("wrong", f"{n}") for n, line in enumerate(WRONG.splitlines(), 1) if "  # " in line}
    assert {*found} == wrong, said
