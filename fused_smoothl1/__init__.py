"""Smooth L1 with sigma, inside and outside weights and a reduction, as one fused GPU kernel."""

from fused_smoothl1.functional import smooth_l1_loss
from fused_smoothl1.module import SmoothL1Loss

__version__ = "0.2.0"

__all__ = ["SmoothL1Loss", "__version__", "smooth_l1_loss"]
