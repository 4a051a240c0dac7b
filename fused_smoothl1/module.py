"""The loss as a module that keeps its options."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from fused_smoothl1.functional import Reduction, TensorOrNumber, check_options, smooth_l1_loss

if TYPE_CHECKING:
    F = TypeVar("F")

    def _typed_like(function: F) -> Callable[[object], F]: ...


class SmoothL1Loss(nn.Module):
    """Weighted Smooth L1 loss: :func:`fused_smoothl1.smooth_l1_loss` with its options kept.

    Args:
        sigma: in (0, inf]; ``beta`` is ``1 / sigma ** 2``.
        beta: in [0, inf); at most one of ``sigma`` and ``beta`` is given, neither means 1. A tensor
            becomes a buffer of the module, and a parameter one of its parameters: both move and
            are converted with it, and are in its ``state_dict``. A new value is written into it
            (``loss.beta.fill_(0.5)``).
        reduction: ``"none"``, ``"sum"``, ``"mean"`` or ``"batchmean"``.

    Raises:
        TypeError: if ``sigma`` or ``beta`` is neither a real number nor a tensor of a float dtype.
        ValueError: if an option has a value that is not allowed, or both are given.
    """

    sigma: TensorOrNumber | None
    beta: TensorOrNumber | None
    reduction: Reduction

    def __init__(
        self,
        *,
        sigma: TensorOrNumber | None = None,
        beta: TensorOrNumber | None = None,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and keep the options."""
        super().__init__()
        check_options(sigma, beta, reduction)
        if sigma is None and beta is None:
            beta = 1.0  # kept for those who read it, as in PyTorch's module
        for name, value in (("sigma", sigma), ("beta", beta)):
            registers_itself = isinstance(value, (nn.Parameter, nn.Buffer))  # when it is assigned
            if isinstance(value, Tensor) and not registers_itself:
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.reduction = reduction

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        inside_weights: Tensor | None = None,
        outside_weights: TensorOrNumber | None = None,
        normalizer: TensorOrNumber | None = None,
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

    if TYPE_CHECKING:
        # nn.Module's takes and returns anything. Pyright would not see `__call__ = forward`.
        @_typed_like(forward)
        def __call__(self) -> None:
            """Return what `forward` returns."""

    def extra_repr(self) -> str:
        """Return the options that are kept; of tensors the shape, as values may be on a GPU."""
        options = {"sigma": self.sigma, "beta": self.beta, "reduction": self.reduction}
        return ", ".join(
            f"{name}=tensor of shape {tuple(value.shape)}"
            if isinstance(value, Tensor)
            else f"{name}={value!r}"
            for name, value in options.items()
            if value is not None
        )
