"""How the registered operators run on DTensors. Importing this registers it."""

from typing import Any

from torch.distributed.tensor import Partial, Placement, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from fused_smoothl1 import ops

Placements = list[Placement | None]
# Outputs and inputs that go together.
Rule = tuple[Placements, Placements]


def _operand_placements(dim: int, *operands: Any) -> Placements:
    """Return where each operand is when the input is sharded on `dim`: there, or everywhere."""
    dims = operands[0].ndim

    def placement(operand: Any) -> Placement | None:
        if operand is None:
            return None
        own = dim - (dims - operand.ndim)
        is_broadcast = own < 0 or operand.shape[own] == 1 != operands[0].shape[dim]
        return Replicate() if is_broadcast else Shard(own)

    return [placement(operand) for operand in operands]


def _everywhere(*tensors: Any) -> Placements:
    return [None if tensor is None else Replicate() for tensor in tensors]


@register_sharding(ops.FORWARD)
def forward_rules(*arguments: Any) -> list[Rule]:
    """Every shard gives its part of the sum, because `divisor` and `count` are global."""
    *operands, divisor, beta = arguments[:6]
    reduce, _, needs_input, needs_target = arguments[-4:]
    rest: Placements = [*_everywhere(divisor, beta), *(None for _ in arguments[6:])]
    rules: list[Rule] = [([Replicate()] * 3, [*_everywhere(*operands), *rest])]
    for dim in range(operands[0].ndim):
        shard = Shard(dim)
        outputs: Placements = [
            Partial() if reduce else shard,
            shard if needs_input else Replicate(),
            shard if needs_target else Replicate(),
        ]
        rules.append((outputs, [*_operand_placements(dim, *operands), *rest]))
    return rules


@register_sharding(ops.BACKWARD)
def backward_rules(upstream: Any, *arguments: Any) -> list[Rule]:
    """Every shard gives its part of a broadcast weight's gradient."""
    *operands, divisor, beta = arguments[:6]
    reduce, _, *needs = arguments[-6:]
    rest: Placements = [*_everywhere(divisor, beta), *(None for _ in arguments[6:])]
    everywhere = _everywhere(upstream, *operands)
    rules: list[Rule] = [([Replicate()] * 4, [*everywhere, *rest])]
    for dim in range(operands[0].ndim):
        placements = _operand_placements(dim, *operands)
        outputs: Placements = [
            (Partial() if isinstance(placement, Replicate) else placement)
            if needed
            else Replicate()
            for placement, needed in zip(placements, needs, strict=True)
        ]
        above = Replicate() if reduce else Shard(dim)
        rules.append((outputs, [above, *placements, *rest]))
    return rules
