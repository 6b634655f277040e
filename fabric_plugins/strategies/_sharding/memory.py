"""What a rank holds where parameters are divided, before anything is set up."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts import MemoryEstimate, PrecisionPolicy

__all__ = ["divided_memory"]


def divided_memory(
    module: nn.Module,
    optimizer: Optimizer,
    blocks: Sequence[nn.Module],
    *,
    ranks: int,
    kept: bool | int | None,
    policy: PrecisionPolicy,
) -> MemoryEstimate:
    """Divide parameters, gradients and state along their first dimension, and add what FSDP2 has whole at one time.

    During ``backward`` that is: what is gathered and stays so, the unit that is computed and the next one, the whole
    gradients of the outermost unit, but for weights that several modules share, which have theirs only when the last of
    these was computed, and those of one block, with the copy that is reduced. The outermost unit's are reduced last,
    when no block is whole any more: there are its parameters and gradients, then its gradients and the copy, then the
    copy and what the backend makes of it, which on the CPU is one more.

    Args:
        module: The model after a step of one process alone.
        optimizer: Its optimizer.
        blocks: The units inside of it, the innermost first.
        ranks: Over how many ranks it is divided.
        kept: The option ``reshard_after_forward``.
        policy: What the precision asks for.
    """

    def part(tensor: torch.Tensor) -> int:
        # Every rank's part is as large as the first one's: FSDP2 pads the others.
        first, *rest = tensor.shape or (1,)
        return -(-first // ranks) * prod(rest) * tensor.element_size()

    known: set[nn.Parameter] = set()
    units = []
    for unit in (*blocks, module):
        own = [one for one in unit.parameters() if one not in known]
        known.update(own)
        units.append(own)
    *inner, outermost = units
    whole = [_gathered(own, policy.compute_dtype) for own in inner]
    root = _gathered(outermost, policy.compute_dtype)
    if kept is None:
        stays, passing = root, sorted(whole)[-2:]
    elif kept is False:
        stays, passing = root + sum(whole), []
    else:
        stays, passing = 0, sorted([*whole, root])[-2:]
    trained = [[one for one in own if one.requires_grad] for own in units]
    gradients = [_gathered(own, policy.compute_dtype) for own in trained]
    reduced = [_gathered(own, policy.reduce_dtype) for own in trained]
    of_blocks = sum(passing) + max(map(sum, zip(gradients[:-1], reduced[:-1], strict=True)), default=0)
    users = Counter(one for its in module.modules() for one in its.parameters(recurse=False))
    early = _gathered((one for one in trained[-1] if users[one] == 1), policy.compute_dtype)
    held = MemoryEstimate.of(module, optimizer, part)
    last = max(root + gradients[-1], gradients[-1] + reduced[-1], 2 * reduced[-1])
    return replace(held, in_flight=stays + early + of_blocks, in_flight_last=last)


def _gathered(parameters: Iterable[torch.Tensor], dtype: torch.dtype | None) -> int:
    return sum(one.numel() * (one.element_size() if dtype is None else dtype.itemsize) for one in parameters)
