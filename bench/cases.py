"""The workloads: which operands, of which sizes and types, the loss is measured on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.rpn import rpn_targets

HEAD = 10_752  # elements of a Fast R-CNN head's output: 128 regions x 21 classes x 4
RPN = 86_184  # elements of an RPN's output at 600 x 1000 pixels
COORDINATES = 4
SELECTED_SHARE = 0.01  # of the rows of `row_mask`
FLOAT16_LOSS_SCALE = 65536.0  # GradScaler's first scale: without one, float16 gradients underflow
SEED = 20_150_604


@dataclass(frozen=True)
class Spec:
    """What to build: a case, its number of elements, and the type of its float operands."""

    case: str
    numel: int
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return f"{self.case} {self.numel:,} {dtype_name(self.dtype)}"


@dataclass(frozen=True, eq=False)
class Workload:
    """One call of the loss: operands on the device and options.

    `selected_rows` is how many rows a mask selects, where there is one.
    """

    spec: Spec
    input: Tensor
    target: Tensor
    inside_weights: Tensor | None = None
    outside_weights: Tensor | None = None
    normalizer: Tensor | None = None
    reduction: str = "mean"
    sigma: float = 1.0
    selected_rows: int | None = None

    @property
    def loss_scale(self) -> float:
        """The gradient that arrives at the loss: 1, or for float16 what GradScaler would send."""
        return FLOAT16_LOSS_SCALE if self.spec.dtype == torch.float16 else 1.0

    @property
    def operand_bytes(self) -> int:
        """Bytes of memory under the operands, each at its own size."""
        weights = (self.inside_weights, self.outside_weights, self.normalizer)
        return _bytes(self.input, self.target, *weights)

    @property
    def floor_bytes(self) -> int:
        """Bytes that no program can avoid to move: each operand in once, the gradient out once.

        Under a mask, input and target of the selected rows alone: the others take no part, so
        nobody has to load them. Memory moves in sectors (32 bytes on a GPU) and cache lines, which
        this leaves out: it is a floor.
        """
        floor = self.operand_bytes + _bytes(self.input)
        if self.selected_rows is None:
            return floor
        skipped_rows = self.input.shape[0] - self.selected_rows
        return floor - skipped_rows * _bytes(self.input[0], self.target[0])

    def copy(self) -> "Workload":
        """Return the same workload on other memory."""

        def clone(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone()

        return replace(
            self,
            input=self.input.detach().clone().requires_grad_(),
            target=self.target.clone(),
            inside_weights=clone(self.inside_weights),
            outside_weights=clone(self.outside_weights),
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name without the module, as in "float32"."""
    return str(dtype).removeprefix("torch.")


def specs(device: torch.device, quick: bool) -> list[Spec]:
    """Return the workloads of a run, the most telling first (a run may be interrupted)."""
    if quick:
        return [Spec("rpn", RPN), Spec("dense", 2**20), Spec("row_mask", 2**20)]
    large = [2**22, 2**24]
    if device.type == "cuda":
        large.append(2**26)
    listed = [Spec("rpn", RPN)]
    listed += [Spec("dense", n) for n in (HEAD, RPN, 2**20, *large)]
    if device.type == "cuda":
        # The CPU is measured in float32 alone: nobody trains a detector there in 16 bits.
        halves = (torch.bfloat16, torch.float16)
        listed += [Spec("dense", n, dtype) for dtype in halves for n in (RPN, 2**24, 2**26)]
    for case in ("row_mask", "broadcast", "no_weights"):
        listed += [Spec(case, n) for n in (HEAD, RPN, *large)]
    return listed


def build(spec: Spec, device: torch.device) -> Workload:
    """Make the operands of a workload on the device, the same ones at every run."""
    workload = _BUILDERS[spec.case](spec, device)
    workload.input.requires_grad_()
    return workload


def _bytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


class _Random:
    """Seeded operands of one workload."""

    def __init__(self, spec: Spec, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(SEED)
        self._device = device
        self._dtype = spec.dtype

    def normal(self, *shape: int) -> Tensor:
        values = torch.randn(shape, generator=self._generator, device=self._device)
        return values.to(self._dtype)

    def uniform(self, *shape: int) -> Tensor:
        values = torch.rand(shape, generator=self._generator, device=self._device)
        return (values + 0.5).to(self._dtype)

    def mask(self, *shape: int) -> Tensor:
        values = torch.rand(shape, generator=self._generator, device=self._device)
        return values < SELECTED_SHARE


def _dense(spec: Spec, device: torch.device) -> Workload:
    """(N, 4) boxes, both weights of full size: four reads and one write of every element."""
    random, shape = _Random(spec, device), (spec.numel // COORDINATES, COORDINATES)
    operands = (random.normal(*shape), random.normal(*shape))
    return Workload(spec, *operands, random.uniform(*shape), random.uniform(*shape))


def _no_weights(spec: Spec, device: torch.device) -> Workload:
    """(N, 4) boxes and nothing else: two reads and one write."""
    random, shape = _Random(spec, device), (spec.numel // COORDINATES, COORDINATES)
    return Workload(spec, random.normal(*shape), random.normal(*shape))


def _broadcast(spec: Spec, device: torch.device) -> Workload:
    """(N, 4) boxes, a weight per coordinate (1, 4) inside and a weight per box (N, 1) outside."""
    random, boxes = _Random(spec, device), spec.numel // COORDINATES
    operands = (random.normal(boxes, COORDINATES), random.normal(boxes, COORDINATES))
    weights = (random.uniform(1, COORDINATES), random.uniform(boxes, 1))
    return Workload(spec, *operands, *weights, reduction="batchmean")


def _row_mask(spec: Spec, device: torch.device) -> Workload:
    """(N, 4) boxes of which a bool (N, 1) selects about 1%, over their number (on the device)."""
    random, boxes = _Random(spec, device), spec.numel // COORDINATES
    operands = (random.normal(boxes, COORDINATES), random.normal(boxes, COORDINATES))
    mask = random.mask(boxes, 1)
    selected = int(mask.sum())
    return Workload(
        spec,
        *operands,
        inside_weights=mask,
        normalizer=torch.tensor(float(max(selected, 1)), device=device),
        reduction="sum",
        selected_rows=selected,
    )


def _rpn(spec: Spec, device: torch.device) -> Workload:
    """Targets and weights of one training image, and a prediction as a young network makes it.

    The weights are floats of full size, as py-faster-rcnn passes them.
    """
    made = rpn_targets()
    prediction = 0.3 * torch.randn(
        made.targets.shape, generator=torch.Generator().manual_seed(SEED)
    )
    return Workload(
        spec,
        prediction.to(device),
        made.targets.to(device),
        made.inside_weights.to(device),
        made.outside_weights.to(device),
        reduction="batchmean",
        sigma=3.0,
    )


def rotation(workload: Workload, cache_bytes: int, most: int) -> Iterator[Workload]:
    """Yield the workload and copies of it, together twice as large as the cache (`most` in all).

    Steps that take them in turn read from DRAM.
    """
    needed = -(-2 * cache_bytes // workload.operand_bytes)
    yield workload
    for _ in range(min(needed, most) - 1):
        yield workload.copy()


_BUILDERS: dict[str, Callable[[Spec, torch.device], Workload]] = {
    "dense": _dense,
    "row_mask": _row_mask,
    "broadcast": _broadcast,
    "no_weights": _no_weights,
    "rpn": _rpn,
}
