"""The loss as a module that keeps its options."""

from torch import Tensor, nn

from fused_smoothl1.functional import Weights, check_options, smooth_l1_loss


class SmoothL1Loss(nn.Module):
    """Weighted Smooth L1 loss: :func:`fused_smoothl1.smooth_l1_loss` with its options kept.

    Args:
        sigma: in (0, inf]; ``beta`` is ``1 / sigma ** 2``.
        beta: in [0, inf); at most one of ``sigma`` and ``beta`` is given, neither means 1.
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.

    Raises:
        TypeError: if ``sigma`` or ``beta`` is not a real number.
        ValueError: if an option has a value that is not allowed, or both are given.
    """

    def __init__(
        self, *, sigma: float | None = None, beta: float | None = None, reduction: str = "mean"
    ) -> None:
        """Check and keep the options."""
        super().__init__()
        check_options(sigma, beta, reduction)
        self.sigma = sigma
        self.beta = beta
        self.reduction = reduction

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        inside_weights: Weights = None,
        outside_weights: Weights = None,
        normalizer: Tensor | float | None = None,
    ) -> Tensor:
        """Return the loss; the arguments are those of :func:`fused_smoothl1.smooth_l1_loss`."""
        return smooth_l1_loss(
            input,
            target,
            inside_weights,
            outside_weights,
            sigma=self.sigma,
            beta=self.beta,
            reduction=self.reduction,
            normalizer=normalizer,
        )

    def extra_repr(self) -> str:
        """Return the options that were given."""
        options = {"sigma": self.sigma, "beta": self.beta, "reduction": self.reduction}
        return ", ".join(
            f"{name}={value!r}" for name, value in options.items() if value is not None
        )
