"""The workloads: which operands, of which sizes and types, the loss is measured on."""

from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

HEAD = 10_752  # elements of a Fast R-CNN head's output: 128 regions x 21 classes x 4
RPN = 86_184  # elements of an RPN's output at 600 x 1000 pixels
COORDINATES = 4
SELECTED_BOXES = 0.01  # of `row_mask`
SELECTED_ELEMENTS = 0.5  # of `element_mask`
# Of `drafter`, by device: sequences, and the size of a token's hidden state.
DRAFTED = {"cuda": (8, 4096), "cpu": (2, 1024)}
LATENTS = (4, 64, 64)  # of an image, which a diffusion model learns: a sample of `tensor_beta`
SELECTED_TOKENS = 0.5
FLOAT16_LOSS_SCALE = 65536.0  # GradScaler's first scale: without one, float16 gradients underflow
SEED = 20_150_604
GRAPH = "_graph"
CASES = {
    "rpn": "the real targets and weights of one training image of a region proposal network",
    "dense": "an inside and an outside weight for each element, and the mean",
    "row_mask": f"a bool mask that selects {SELECTED_BOXES:.0%} of the boxes; the sum is divided by"
    " their number",
    "element_mask": f"a bool mask that selects {SELECTED_ELEMENTS:.0%} of the elements; the sum is"
    " divided by their number",
    "broadcast": "an inside weight for each coordinate, and an outside weight for each box",
    "no_weights": "input and target alone, as `F.smooth_l1_loss` takes them",
    "none": "no weights and no reduction: the loss of each element, and a gradient for each",
    "tensor_beta": "a beta for each sample, as a schedule of a diffusion model's noise gives it",
    "drafter": f"hidden states of tokens, of which a mask selects {SELECTED_TOKENS:.0%}, as"
    " drafters for speculative decoding regress them",
    "kernelbench": "problem 96 of KernelBench's level 1: a square matrix, the forward pass alone",
    GRAPH: "an ending: the same in a CUDA graph, so the time of the kernels without the host's",
}
"""What each case is, and the ending of its name, for those who read the figures."""


@dataclass(frozen=True)
class Spec:
    """What to build: a case, its number of elements, and the type of its float operands.

    With `graph`, the steps on it are replayed from a CUDA graph.
    """

    case: str
    numel: int
    dtype: torch.dtype = torch.float32
    graph: bool = False

    @property
    def name(self) -> str:
        """What the rows are found under."""
        return self.case + GRAPH * self.graph

    @property
    def dtype_name(self) -> str:
        """The type without its module, as in "float32"."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} {self.numel:,} {self.dtype_name}"


@dataclass(frozen=True, eq=False)
class Workload:
    """One call of the loss: operands on the device, and options.

    It is differentiated where the input requires a gradient; `upstream` arrives at a loss of every
    element.
    """

    spec: Spec
    input: Tensor
    target: Tensor
    inside_weights: Tensor | None = None
    outside_weights: Tensor | None = None
    beta: Tensor | None = None
    normalizer: Tensor | None = None
    upstream: Tensor | None = None
    reduction: str = "mean"
    sigma: float = 1.0
    """Where there is no tensor `beta`."""

    @property
    def backward(self) -> bool:
        """Whether it is differentiated."""
        return self.input.requires_grad

    @property
    def is_weighted(self) -> bool:
        """Whether there are weights or masks."""
        return self.inside_weights is not None or self.outside_weights is not None

    @property
    def operands(self) -> tuple[Tensor | None, ...]:
        """The operands beside the input, in the order of the loss's arguments."""
        return self.target, self.inside_weights, self.outside_weights

    @property
    def options(self) -> dict[str, Any]:
        """The loss's other arguments."""
        others = {"reduction": self.reduction, "normalizer": self.normalizer}
        return others | ({"sigma": self.sigma} if self.beta is None else {"beta": self.beta})

    @property
    def loss_scale(self) -> float:
        """The gradient that arrives at a reduced loss: 1, or what GradScaler sends to float16."""
        return FLOAT16_LOSS_SCALE if self.spec.dtype == torch.float16 else 1.0

    @property
    def needed_bytes(self) -> int:
        """Bytes of the operands that have to be read once, whatever the program.

        Under a mask, input and target of what it selects alone: the rest takes no part.
        """
        pair, tensors = _bytes(self.input, self.target), self._tensors()
        excluded = sum(
            pair * int((~mask).sum()) // mask.numel()
            for mask in tensors.values()
            if mask.dtype == torch.bool
        )
        return _bytes(*tensors.values()) - excluded

    @property
    def floor_bytes(self) -> int:
        """Bytes that no program can avoid moving: each operand in once, the gradient out once.

        A loss of every element goes out before its gradient comes in, so then input and target are
        needed twice. Memory moves in sectors (32 bytes on a GPU) and cache lines, which this leaves
        out: it is a floor.
        """
        floor = self.needed_bytes + (_bytes(self.input) if self.backward else 0)
        if self.upstream is not None:
            floor += _bytes(self.upstream, self.input, self.target)
        return floor

    def copy(self) -> "Workload":
        """Return the same workload on other memory."""
        copies: Any = {
            name: tensor.detach().clone().requires_grad_(tensor.requires_grad)
            for name, tensor in self._tensors().items()
        }
        return replace(self, **copies)

    def _tensors(self) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def specs(device: torch.device, quick: bool) -> list[Spec]:
    """Return the workloads of a run, the most telling first (a run may be interrupted)."""
    if quick:
        return [Spec("rpn", RPN), Spec("dense", 2**20), Spec("row_mask", 2**20)]
    return _gpu_specs() if device.type == "cuda" else _cpu_specs()


def _gpu_specs() -> list[Spec]:
    half, brain, largest = torch.float16, torch.bfloat16, 2**26
    weighted, plain = ("dense", "row_mask"), ("no_weights", "none", "broadcast")
    listed = [Spec("dense", largest), Spec("dense", largest, brain), Spec("kernelbench", 2**30)]
    listed += [Spec("drafter", largest, brain), Spec("row_mask", largest), Spec("rpn", RPN)]
    # In graphs there is no time of the host: what is left is the kernels'.
    listed += [Spec("dense", HEAD), Spec("rpn", RPN, graph=True), Spec("dense", HEAD, graph=True)]
    listed += [Spec("drafter", largest, brain, graph=True)]
    listed += [Spec(case, n, graph=True) for n in (largest, 2**24, 2**22) for case in weighted]
    listed += [Spec("no_weights", n, graph=True) for n in (HEAD, RPN, 2**22)]
    listed += [Spec("tensor_beta", largest, graph=True)]
    listed += [Spec("dense", n) for n in (RPN, 2**22, 2**24)]
    listed += [Spec(case, n) for n in (RPN, 2**22) for case in ("row_mask", "no_weights")]
    listed += [Spec(case, largest) for case in (*plain, "tensor_beta")]
    listed += [Spec("dense", largest, half), Spec("row_mask", largest, brain)]
    listed += [Spec("row_mask", n) for n in (HEAD, 2**24)]
    listed += [Spec(case, n) for n in (HEAD, RPN, 2**22, 2**24) for case in plain]
    listed += [Spec("dense", 2**20)]
    listed += [Spec("dense", n, dtype) for dtype in (brain, half) for n in (RPN, 2**24)]
    return list(dict.fromkeys(listed))


def _cpu_specs() -> list[Spec]:
    # In float32 alone: nobody trains a detector on a CPU in 16 bits.
    listed = [Spec("rpn", RPN)]
    for case in ("dense", "row_mask", "element_mask", "broadcast", "no_weights", "none"):
        listed += [Spec(case, n) for n in (HEAD, RPN, 2**20, 2**22, 2**24)]
    listed += [Spec("tensor_beta", n) for n in (2**20, 2**22, 2**24)]
    return [*listed, Spec("kernelbench", 2**24), Spec("drafter", 2**19)]


def build(spec: Spec, device: torch.device) -> Workload:
    """Make the operands of a workload on the device, the same ones at every run."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(spec.dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def weights(*shape: int) -> Tensor:
        return (uniform(*shape) + 0.5).to(spec.dtype)

    boxes = (spec.numel // COORDINATES, COORDINATES)
    batch, hidden = DRAFTED[device.type]
    tokens = (batch, spec.numel // batch // hidden, hidden)
    matrix = (round(spec.numel**0.5),) * 2
    samples = (spec.numel // prod(LATENTS), *LATENTS)
    shapes = {"kernelbench": matrix, "drafter": tokens, "tensor_beta": samples}
    shape = shapes.get(spec.case, boxes)
    plain = Workload(spec, normal(*shape).requires_grad_(), normal(*shape))
    match spec.case:
        case "no_weights":
            return plain
        case "dense":
            inside, outside = weights(*shape), weights(*shape)
            return replace(plain, inside_weights=inside, outside_weights=outside)
        case "none":
            return replace(plain, upstream=weights(*shape), reduction="none")
        case "broadcast":
            inside, outside = weights(1, COORDINATES), weights(boxes[0], 1)
            plain = replace(plain, reduction="batchmean")
            return replace(plain, inside_weights=inside, outside_weights=outside)
        case "row_mask" | "element_mask":
            if spec.case == "row_mask":
                mask = uniform(boxes[0], 1) < SELECTED_BOXES
            else:
                mask = uniform(*shape) < SELECTED_ELEMENTS
            selected = mask.sum().clamp(min=1).float()
            return replace(plain, reduction="sum", inside_weights=mask, normalizer=selected)
        case "drafter":
            # The mean over a state, then over the selected tokens: the normalizer stands for both.
            mask = uniform(*tokens[:2], 1) < SELECTED_TOKENS
            selected = drafter_normalizer(mask, hidden)
            return replace(plain, reduction="sum", outside_weights=mask, normalizer=selected)
        case "tensor_beta":
            return replace(plain, beta=uniform(len(plain.input), 1, 1, 1))
        case "kernelbench":
            return replace(plain, input=plain.input.detach())
        case "rpn":
            # Imported here because loading scikit-learn takes a second.
            from bench.rpn import paste_digits, targets_of

            rng = np.random.default_rng(0)
            made = targets_of(paste_digits(rng).boxes, rng)
            target, inside, outside = (tensor.to(device) for tensor in made)
            # Small, as the deltas of a young network are.
            prediction = torch.randn(target.shape, generator=torch.Generator().manual_seed(SEED))
            input = (0.3 * prediction).to(device).requires_grad_()
            operands = (input, target, inside, outside)
            return Workload(spec, *operands, reduction="batchmean", sigma=3.0)
    raise ValueError(f"there is no case {spec.case!r}")


def rotation(workload: Workload, cache_bytes: int, most: int) -> list[Workload]:
    """Return the workload and copies of it (`most` in all).

    What has to be read of them is together twice as large as the cache: steps that take them in
    turn read from DRAM.
    """
    wanted = min(-(-2 * cache_bytes // workload.needed_bytes), most)
    return [workload, *(workload.copy() for _ in range(wanted - 1))]


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def drafter_normalizer(mask: Tensor, hidden: int) -> Tensor:
    """Return the elements of the selected tokens, kept from 0 as such training code does it.

    `hidden` is the size of a token's hidden state.
    """
    return hidden * (mask.sum() + 1e-5)
