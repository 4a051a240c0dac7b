"""Compile what the launcher would launch, for a GPU that is not there.

A call is specialized and compiled as a launch would be, by the launcher's and Triton's own code;
what would be launched is compiled instead.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

from bench import stand_in

Launch = tuple[dict[str, Any], Any]  # its arguments, and what was compiled instead


class UnknownTargetError(Exception):
    """The installed Triton can compile nothing for a target."""


def launches(call: Callable[[], object], target: str) -> list[Launch]:
    """Make the call as if its tensors lay on a GPU of this target; return its launches.

    The environment must be `stand_in.ENVIRONMENT`.
    """
    from fused_smoothl1.launcher import Code

    recorded: list[Launch] = []

    def compile(
        code: Code, programs: int, stream: int, tensors: Any, addresses: Any, others: Any
    ) -> None:
        kernel, arguments = code.kernel, (*code.grouped(tensors), *others)
        compiled = kernel.warmup(*arguments, grid=(programs,), **code.options)
        recorded.append((dict(zip(kernel.arg_names, arguments, strict=True)), compiled))

    with stand_in.gpu(target), mock.patch.object(Code, "launch", compile):
        try:
            call()
        except Exception:
            _check_that_target_is_known()
            raise
    return recorded


def _check_that_target_is_known() -> None:
    import triton

    @triton.jit
    def nothing() -> None:
        pass

    try:
        nothing.warmup(grid=(1,), enable_fp_fusion=False)
    except Exception as error:
        raise UnknownTargetError(f"{type(error).__name__}: {error}".splitlines()[0]) from error
