"""A user's strict type checker accepts right uses of the package and rejects wrong ones.

The checker runs in a folder of its own and finds the package on the search path of Python, as an
installed one, so it reads the annotations only if the marker `py.typed` is there.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RIGHT = """
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fused_smoothl1
from fused_smoothl1 import SmoothL1Loss, smooth_l1_loss


class BoxHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.criterion = SmoothL1Loss(sigma=3.0, reduction="sum")

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum().clamp(min=1)
        return self.criterion(pred, target, mask, normalizer=count)


def losses(pred: Tensor, target: Tensor) -> list[Tensor]:
    mask = torch.ones(len(pred), 1, dtype=torch.bool)
    return [
        smooth_l1_loss(pred, target),
        smooth_l1_loss(pred, target, mask),
        smooth_l1_loss(pred, target, mask, 2.0, beta=0.5, reduction="batchmean"),
        smooth_l1_loss(pred, target, None, 1, sigma=3, reduction="sum", normalizer=7),
        smooth_l1_loss(pred, target, outside_weights=mask, reduction="sum", normalizer=mask.sum()),
        smooth_l1_loss(pred, target, beta=target.abs().median()),
        smooth_l1_loss(pred, target, sigma=torch.ones(4)),
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
    smooth_l1_loss(pred, target, "mask")  # a string for weights
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


def _mypy(folder: Path, code: str, search_path: Path = ROOT) -> tuple[str, set[int]]:
    """Check code as a user's file; return what mypy says, and the lines with errors."""
    (folder / "consumer.py").write_text(code)
    # Kept from run to run: reading PyTorch's annotations is nearly all of the time.
    cache = ROOT / ".mypy_cache" / "consumer"
    # --config-file= keeps the settings of a user's home out of it.
    flags = ["--strict", "--config-file=", f"--cache-dir={cache}", "--no-error-summary"]
    result = subprocess.run(
        [sys.executable, "-m", "mypy", *flags, "consumer.py"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(search_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    # Where mypy is missing or crashes it must not look as if all were well.
    assert result.returncode in (0, 1), result.stdout + result.stderr
    assert "No module named mypy" not in result.stderr, result.stderr
    errors = re.findall(r"^consumer\.py:(\d+): error", result.stdout, re.MULTILINE)
    return result.stdout, {int(line) for line in errors}


def test_right_uses_are_accepted(tmp_path: Path) -> None:
    said, _ = _mypy(tmp_path, RIGHT)
    assert said == ""


def test_wrong_uses_are_rejected(tmp_path: Path) -> None:
    said, errors = _mypy(tmp_path, WRONG)
    wrong = {n for n, line in enumerate(WRONG.splitlines(), start=1) if "  # " in line}
    assert errors == wrong, said


def test_the_marker_is_what_makes_it_typed(tmp_path: Path) -> None:
    """Without py.typed the checker must complain: else the first test would show nothing."""
    copy = tmp_path / "site" / "unmarked"  # or an editable installation would be found behind it
    shutil.copytree(ROOT / "fused_smoothl1", copy)
    (copy / "py.typed").unlink()
    (tmp_path / "user").mkdir()
    said, _ = _mypy(tmp_path / "user", RIGHT.replace("fused_smoothl1", copy.name), copy.parent)
    if "py.typed marker" not in said:
        pytest.fail(f"the package is found in another way than as an installed one:\n{said}")
