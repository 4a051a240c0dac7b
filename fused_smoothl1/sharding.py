"""How the registered operators run on DTensors. Importing this registers it."""

from typing import Any

from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fused_smoothl1 import ops
from fused_smoothl1.problem import OPERANDS, Problem

Placements = list[Placement | None]
# Outputs and inputs that go together.
Rule = tuple[Placements, Placements]


def _sharded(dim: int, *operands: Any) -> Placements:
    """Return where each operand is when the input is sharded on `dim`: there, or everywhere."""
    input = operands[0]

    def placement(operand: Any) -> Placement | None:
        if operand is None:
            return None
        own = dim - input.ndim + operand.ndim
        is_broadcast = own < 0 or operand.shape[own] == 1 != input.shape[dim]
        return Replicate() if is_broadcast else Shard(own)

    return [placement(operand) for operand in operands]


def _everywhere(*arguments: Any) -> Placements:
    """Replicate every tensor; other arguments have no placement."""
    return [Replicate() if hasattr(argument, "ndim") else None for argument in arguments]


@register_sharding(ops.FORWARD)
def forward_rules(*arguments: Any) -> list[Rule]:
    """Every shard gives its part of the sum, because the divisor is global."""
    fields, needs = arguments[:-OPERANDS], arguments[-OPERANDS:]
    operands, rest = arguments[:OPERANDS], _everywhere(*arguments[OPERANDS:])
    rules: list[Rule] = [([Replicate()] * 3, _everywhere(*arguments))]
    for dim in range(operands[0].ndim):
        loss = Partial() if Problem(*fields).reduce else Shard(dim)
        gradients = (Shard(dim) if needed else Replicate() for needed in needs[:2])
        rules.append(([loss, *gradients], [*_sharded(dim, *operands), *rest]))
    return rules


@register_sharding(ops.BACKWARD)
def backward_rules(upstream: Any, *arguments: Any) -> list[Rule]:
    """Every shard gives its part of a broadcast weight's gradient."""
    fields, needs = arguments[:-OPERANDS], arguments[-OPERANDS:]
    operands, rest = arguments[:OPERANDS], _everywhere(*arguments[OPERANDS:])
    rules: list[Rule] = [([Replicate()] * OPERANDS, _everywhere(upstream, *arguments))]
    for dim in range(operands[0].ndim):
        placements = _sharded(dim, *operands)
        gradients: Placements = [
            (Partial() if isinstance(placement, Replicate) else placement)
            if needed
            else Replicate()
            for placement, needed in zip(placements, needs, strict=True)
        ]
        of_upstream = Replicate() if Problem(*fields).reduce else Shard(dim)
        rules.append((gradients, [of_upstream, *placements, *rest]))
    return rules
