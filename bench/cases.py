"""The workloads: which operands, of which sizes and types, the loss is measured on."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

HEAD = 10_752  # elements of a Fast R-CNN head's output: 128 regions x 21 classes x 4
RPN = 86_184  # elements of an RPN's output at 600 x 1000 pixels
COORDINATES = 4
SELECTED_SHARE = 0.01  # of the rows of `row_mask`
BATCH, HIDDEN = 8, 4096  # of `drafter`: sequences, and the size of a token's hidden state
SELECTED_TOKENS = 0.5
FLOAT16_LOSS_SCALE = 65536.0  # GradScaler's first scale: without one, float16 gradients underflow
SEED = 20_150_604


@dataclass(frozen=True)
class Spec:
    """What to build: a case, its number of elements, and the type of its float operands.

    With `graph`, the steps on it are replayed from CUDA graphs.
    """

    case: str
    numel: int
    dtype: torch.dtype = torch.float32
    graph: bool = False

    @property
    def name(self) -> str:
        """What the rows are found under."""
        return f"{self.case}_graph" if self.graph else self.case

    def __str__(self) -> str:
        return f"{self.name} {self.numel:,} {dtype_name(self.dtype)}"


@dataclass(frozen=True, eq=False)
class Workload:
    """One call of the loss: operands on the device and options.

    `upstream` arrives at a loss of every element; a reduced one gets `loss_scale`. `excluded` is
    how many elements a mask leaves out, where there is one.
    """

    spec: Spec
    input: Tensor
    target: Tensor
    inside_weights: Tensor | None = None
    outside_weights: Tensor | None = None
    normalizer: Tensor | None = None
    upstream: Tensor | None = None
    reduction: str = "mean"
    sigma: float = 1.0
    excluded: int = 0
    backward: bool = True

    @property
    def loss_scale(self) -> float:
        """The gradient that arrives at the loss: 1, or for float16 what GradScaler would send."""
        return FLOAT16_LOSS_SCALE if self.spec.dtype == torch.float16 else 1.0

    @property
    def operand_bytes(self) -> int:
        """Bytes of memory under the operands, each at its own size."""
        weights = (self.inside_weights, self.outside_weights, self.normalizer)
        return _bytes(self.input, self.target, *weights, self.upstream)

    @property
    def divisor(self) -> Tensor | float:
        """What the sum over all elements is divided by."""
        if self.normalizer is not None:
            return self.normalizer
        numbers = {"mean": self.input.numel(), "batchmean": self.input.shape[0]}
        return float(numbers.get(self.reduction, 1))

    @property
    def needed_bytes(self) -> int:
        """Bytes of the operands that have to be read once, whatever the program."""
        pair = self.input.element_size() + self.target.element_size()
        return self.operand_bytes - self.excluded * pair

    @property
    def floor_bytes(self) -> int:
        """Bytes that no program can avoid moving: each operand in once, the gradient out once.

        Under a mask, input and target of what it selects alone: the rest takes no part, so nobody
        has to load it. A loss of every element goes out before its gradient comes in, so then input
        and target are needed twice. Memory moves in sectors (32 bytes on a GPU) and cache lines,
        which this leaves out: it is a floor.
        """
        floor = self.needed_bytes
        if self.backward:
            floor += _bytes(self.input)
        if self.upstream is not None:
            floor += _bytes(self.upstream, self.input, self.target)
        return floor

    def copy(self) -> "Workload":
        """Return the same workload on other memory."""

        def clone(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone()

        return replace(
            self,
            input=self.input.detach().clone().requires_grad_(self.backward),
            target=self.target.clone(),
            inside_weights=clone(self.inside_weights),
            outside_weights=clone(self.outside_weights),
            upstream=clone(self.upstream),
        )


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's name without the module, as in "float32"."""
    return str(dtype).removeprefix("torch.")


def specs(device: torch.device, quick: bool) -> list[Spec]:
    """Return the workloads of a run, the most telling first (a run may be interrupted)."""
    if quick:
        return [Spec("rpn", RPN), Spec("dense", 2**20), Spec("row_mask", 2**20)]
    return _gpu_specs() if device.type == "cuda" else _cpu_specs()


def _gpu_specs() -> list[Spec]:
    half, brain = torch.float16, torch.bfloat16
    largest = 2**26
    first = [
        Spec("dense", largest),
        Spec("dense", largest, brain),
        Spec("kernelbench", 2**30),
        Spec("drafter", largest, brain),
        Spec("row_mask", largest),
        Spec("rpn", RPN),
        Spec("dense", HEAD),
        Spec("rpn", RPN, graph=True),
        Spec("dense", HEAD, graph=True),
    ]
    # Without the host's time, what is left is the kernels'.
    first += [Spec(case, largest, graph=True) for case in ("dense", "row_mask")]
    first += [Spec("drafter", largest, brain, graph=True)]
    first += [Spec("no_weights", n, graph=True) for n in (HEAD, RPN, 2**22)]
    first += [Spec(case, n, graph=True) for n in (2**24, 2**22) for case in ("dense", "row_mask")]
    plain = ("no_weights", "none", "broadcast")
    rest = [Spec(case, largest) for case in plain]
    rest += [Spec("dense", largest, half), Spec("row_mask", largest, brain)]
    rest += [Spec("dense", n) for n in (RPN, 2**20, 2**22, 2**24)]
    rest += [Spec(case, n) for n in (HEAD, RPN, 2**22, 2**24) for case in ("row_mask", *plain)]
    rest += [Spec("dense", n, dtype) for dtype in (brain, half) for n in (RPN, 2**24)]
    return first + rest


def _cpu_specs() -> list[Spec]:
    # In float32 alone: nobody trains a detector on a CPU in 16 bits.
    large = (2**22, 2**24)
    listed = [Spec("rpn", RPN)]
    listed += [Spec("dense", n) for n in (HEAD, RPN, 2**20, *large)]
    for case in ("row_mask", "broadcast", "no_weights"):
        listed += [Spec(case, n) for n in (HEAD, RPN, *large)]
    return [*listed, Spec("none", 2**22), Spec("kernelbench", 2**24), Spec("drafter", 2**22)]


def build(spec: Spec, device: torch.device) -> Workload:
    """Make the operands of a workload on the device, the same ones at every run."""
    workload = _BUILDERS[spec.case](spec, device)
    workload.input.requires_grad_(workload.backward)
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

    def mask(self, *shape: int, share: float) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self._device) < share


def _dense(spec: Spec, device: torch.device) -> Workload:
    """(N, 4) boxes, both weights of full size: four reads and one write of every element."""
    random, shape = _Random(spec, device), (spec.numel // COORDINATES, COORDINATES)
    operands = (random.normal(*shape), random.normal(*shape))
    return Workload(spec, *operands, random.uniform(*shape), random.uniform(*shape))


def _no_weights(spec: Spec, device: torch.device) -> Workload:
    """(N, 4) boxes and nothing else: two reads and one write."""
    random, shape = _Random(spec, device), (spec.numel // COORDINATES, COORDINATES)
    return Workload(spec, random.normal(*shape), random.normal(*shape))


def _kernelbench(spec: Spec, device: torch.device) -> Workload:
    """Level 1, problem 96 of KernelBench: a square matrix without weights, and no gradient."""
    random, side = _Random(spec, device), round(spec.numel**0.5)
    operands = (random.normal(side, side), random.normal(side, side))
    return Workload(spec, *operands, backward=False)


def _none(spec: Spec, device: torch.device) -> Workload:
    """(N, 4) boxes, the loss of every element, and a gradient of full size that arrives at it."""
    random, shape = _Random(spec, device), (spec.numel // COORDINATES, COORDINATES)
    operands = (random.normal(*shape), random.normal(*shape))
    return Workload(spec, *operands, upstream=random.uniform(*shape), reduction="none")


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
    mask = random.mask(boxes, 1, share=SELECTED_SHARE)
    selected = int(mask.sum())
    return Workload(
        spec,
        *operands,
        inside_weights=mask,
        normalizer=torch.tensor(float(max(selected, 1)), device=device),
        reduction="sum",
        excluded=(boxes - selected) * COORDINATES,
    )


def _drafter(spec: Spec, device: torch.device) -> Workload:
    """(B, T, 4096) hidden states of which a bool (B, T, 1) selects half of the tokens.

    Drafters of speculative decoding regress them: the mean over a state, then the mean over the
    selected tokens. The normalizer is what the library is given for both.
    """
    random, tokens = _Random(spec, device), spec.numel // HIDDEN // BATCH
    operands = (random.normal(BATCH, tokens, HIDDEN), random.normal(BATCH, tokens, HIDDEN))
    mask = random.mask(BATCH, tokens, 1, share=SELECTED_TOKENS)
    return Workload(
        spec,
        *operands,
        outside_weights=mask,
        normalizer=drafter_normalizer(mask),
        reduction="sum",
        excluded=(mask.numel() - int(mask.sum())) * HIDDEN,
    )


def drafter_normalizer(mask: Tensor) -> Tensor:
    """Return the elements of the selected tokens, kept from 0 as such training code does it."""
    return HIDDEN * (mask.sum() + 1e-5)


def _rpn(spec: Spec, device: torch.device) -> Workload:
    """Targets and weights of one training image, and a prediction as a young network makes it.

    The weights are floats of full size, as py-faster-rcnn passes them.
    """
    # Imported here because it needs scikit-learn, and this workload alone does.
    from bench.rpn import rpn_targets

    made = rpn_targets()
    generator = torch.Generator().manual_seed(SEED)
    prediction = 0.3 * torch.randn(made.targets.shape, generator=generator)
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
    """Yield the workload and copies of it (`most` in all).

    What has to be read of them is together twice as large as the cache: steps that take them in
    turn read from DRAM.
    """
    needed = -(-2 * cache_bytes // workload.needed_bytes)
    yield workload
    for _ in range(min(needed, most) - 1):
        yield workload.copy()


_BUILDERS: dict[str, Callable[[Spec, torch.device], Workload]] = {
    "dense": _dense,
    "kernelbench": _kernelbench,
    "none": _none,
    "row_mask": _row_mask,
    "drafter": _drafter,
    "broadcast": _broadcast,
    "no_weights": _no_weights,
    "rpn": _rpn,
}
