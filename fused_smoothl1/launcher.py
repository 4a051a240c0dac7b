"""How a kernel is launched on a device, without asking Triton each time what it has compiled."""

import threading
from collections.abc import Callable, Hashable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs

from fused_smoothl1.problem import NoKernelError

INT32_MAX = 2**31 - 1
# Triton compiles other code where an address or an integer is a multiple of this.
DIVISOR = 16

# What a compiled kernel is launched with. Where a version of Triton does not have all of this, each
# launch is Triton's own.
LAUNCHED_WITH = ("run", "function", "packed_metadata")
# What Triton does not do without, for a message.
REQUIREMENTS = (
    "it takes a version of Triton that knows the GPU, the driver's library, a C compiler (CC) and "
    "a folder to write to (TRITON_CACHE_DIR)"
)
# Words of errors of the driver that may not recur: the tools are not at fault.
TRANSIENT = ("out of memory", "captur")
NO_HOOKS = None, None, None  # Metadata for hooks, a hook before and one after the launch.

# Held while a kernel is compiled: with several threads, Python 3.11 was seen to fail in making
# syntax trees, which would be taken for a Triton that is broken.
_compiling = threading.RLock()

Arguments = tuple[Any, ...]


class Facts(NamedTuple):
    """What decides how kernels are launched on a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    is_negated: bool
    """Whether its values are those in memory, negated."""
    misalignment: int
    """By how much its address misses a multiple of `DIVISOR`."""
    is_large: bool
    """Whether its storage is beyond the reach of 32-bit offsets; asked on AMD alone."""


# The facts of several tensors, as plain tuples: these are made at each call.
FactTuples = tuple[tuple[Any, ...] | None, ...]


@dataclass(frozen=True, eq=False)
class Gpu:
    """A device, and what those who launch kernels on it ask."""

    device: torch.device
    module: Any
    """PyTorch's module for such devices; None where something stands in for a GPU."""
    multiprocessors: int
    driver: Any
    """Triton's driver; None in the interpreter."""
    warp_size: int
    is_amd: bool

    def is_current(self) -> bool:
        """Whether Triton would launch to this device."""
        return self.module is None or self.module.current_device() == self.device.index

    def made_current(self) -> AbstractContextManager[None]:
        """Let Triton launch to this device."""
        return self.module.device(self.device)  # type: ignore[no-any-return]

    def is_capturing(self) -> bool:
        """Whether launches on the current stream are captured in a graph."""
        ask = getattr(self.module, "is_current_stream_capturing", None)
        return ask is not None and ask()

    def stream(self) -> int:
        """Return the handle of the current stream."""
        if self.driver is None:
            return 0
        stream: int = self.driver.get_current_stream(self.device.index)
        return stream


@cache
def gpu_of(device: torch.device) -> Gpu:
    """Return what is known of a device.

    Raises:
        NoKernelError: if Triton has no driver for it that works.
    """
    module, multiprocessors = None, 1  # The interpreter runs one program at a time.
    if device.type != "cpu":
        module = torch.get_device_module(device)
        properties = module.get_device_properties(device)
        name = "max_compute_units" if device.type == "xpu" else "multi_processor_count"
        multiprocessors = int(getattr(properties, name))
    if knobs.runtime.interpret:
        return Gpu(device, module, multiprocessors, None, 32, False)
    try:
        driver = triton.runtime.driver.active
        target = driver.get_current_target()
    except Exception as error:
        raise NoKernelError(f"Triton cannot use {device}", REQUIREMENTS, error) from error
    is_amd = target.backend == "hip"
    return Gpu(device, module, multiprocessors, driver, target.warp_size, is_amd)


class Code:
    """What Triton compiled of a kernel for launches of one kind.

    For each launch Triton binds the arguments and specialises the code by every one of them, which
    takes far longer than the launch itself; but what it compiled can be launched as it is. All
    launches of one kind must agree in what Triton specialises by: the constants, `tensor_key` and
    `integer_key`.
    """

    def __init__(
        self, gpu: Gpu, kernel: Any, grouped: Callable[[Arguments], Arguments], warps: int
    ) -> None:
        """Take the kernel, and what makes its first arguments of all its pointers."""
        self.gpu = gpu
        self.kernel = kernel
        self.grouped = grouped
        # Without fused multiply-add each operation rounds as it does in eager PyTorch.
        self.options = {"num_warps": warps, "enable_fp_fusion": False}
        self.compiled: Any = None
        # (The interpreter compiles nothing.)
        self.is_loaded = gpu.driver is None
        self.obstacle = ""

    def launch(
        self,
        programs: int,
        stream: int,
        tensors: Arguments,
        addresses: Arguments,
        others: Arguments,
    ) -> None:
        """Launch so many programs on the current stream of the current device.

        The kernel's arguments are its pointers, which are given as tensors and as their addresses,
        and the others.

        Raises:
            NoKernelError: if it cannot be compiled or loaded. Nothing has been launched then.
        """
        compiled = self.compiled
        if compiled is not None and not self._is_observed():
            handles = stream, compiled.function, compiled.packed_metadata
            compiled.run(programs, 1, 1, *handles, *NO_HOOKS, *self.grouped(addresses), *others)
            return
        arguments = *self.grouped(tensors), *others
        if not self.is_loaded:
            self._load(arguments)
        compiled = self.kernel[(programs,)](*arguments, **self.options)
        if all(hasattr(compiled, name) for name in LAUNCHED_WITH) and not self._is_observed():
            self.compiled = compiled

    def _load(self, arguments: Arguments) -> None:
        """Compile the kernel and load it to the device.

        Triton would do so within the first launch, and its errors could not be told from those.
        """
        # (Asked once more, Triton may skip the load that failed.)
        if self.obstacle:
            raise NoKernelError(self.obstacle)
        try:
            with _compiling:
                compiled = self.kernel.warmup(*arguments, grid=(1,), **self.options)
                if compiled is not None:  # A hook may have kept Triton from compiling.
                    _ = compiled.run  # To ask for it loads it.
        except Exception as error:
            if any(words in str(error) for words in TRANSIENT):
                raise
            reason = f"Triton cannot compile or load a kernel for {self.gpu.device}"
            obstacle = NoKernelError(reason, REQUIREMENTS, error)
            self.obstacle = str(obstacle)
            raise obstacle from error
        self.is_loaded = True

    def _is_observed(self) -> bool:
        """Whether Triton is asked to tell of launches, or to compile otherwise than usual."""
        runtime = knobs.runtime
        return bool(
            getattr(runtime.launch_enter_hook, "calls", True)
            or getattr(runtime.launch_exit_hook, "calls", True)
            or self.kernel.pre_run_hooks
            or runtime.debug
            # (Triton 3.5 has none of these.)
            or getattr(runtime, "add_stages_inspection_hook", None)
            or getattr(knobs.compilation, "instrumentation_mode", None)
        )


def addresses_of(tensors: Iterable[Tensor | None]) -> tuple[int | None, ...]:
    """Return where tensors lie in memory."""
    return tuple([None if t is None else t.data_ptr() for t in tensors])


def facts_of(tensors: Iterable[Tensor | None], addresses: Iterable[Any], gpu: Gpu) -> FactTuples:
    """Return the facts of tensors that lie at these addresses."""
    is_amd = gpu.is_amd
    return tuple(
        [
            None
            if t is None
            else (
                t.dtype,
                t.shape,
                t.stride(),
                t.is_neg(),
                address % DIVISOR,
                is_amd and t.untyped_storage().nbytes() > INT32_MAX,
            )
            for t, address in zip(tensors, addresses, strict=True)
        ]
    )


def as_facts(known: FactTuples) -> list[Facts | None]:
    """Return facts with their names."""
    return [None if facts is None else Facts._make(facts) for facts in known]


def tensor_key(facts: Iterable[Facts | None]) -> Hashable:
    """Return what Triton specialises by of tensors."""
    return tuple([f and (f.dtype, f.misalignment == 0, f.is_large) for f in facts])


def integer_key(value: Any) -> Hashable:
    """Return what Triton specialises by of an integer, or of several in nested tuples."""
    if isinstance(value, tuple):
        return tuple(map(integer_key, value))
    return value and (value == 1, value % DIVISOR == 0, value > INT32_MAX)
