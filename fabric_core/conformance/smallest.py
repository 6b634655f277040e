"""The smallest training, which a request that resolves must be able to do."""

from collections.abc import Mapping
from typing import Any

import torch

from fabric_core.conformance.cases import Training, batches, build, optimizer_for, part
from fabric_core.fabric import Fabric

__all__ = ["train"]


def train(arguments: Mapping[str, Any]) -> list[float]:
    """Train two steps by a ``Fabric`` of these arguments; runs on every rank.

    Returns:
        The losses.

    Raises:
        AssertionError: A loss is no finite number, or no parameter changed.
    """
    case = Training(optimizer="sgd")
    with Fabric(**arguments) as fabric:
        fabric.launch()
        bare = build(case, torch.float32)
        model, optimizer = fabric.setup(bare, optimizer_for(case, bare.parameters()))
        losses = []
        before = _sum(fabric, model)
        for x, y in batches(case, torch.float32):
            shard = fabric.strategy.data_shard()
            inputs, targets = (part(one, shard).to(fabric.device) for one in (x, y))
            output = model(inputs)
            loss = torch.nn.functional.mse_loss(output.float(), targets)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if not all(map(torch.isfinite, map(torch.tensor, losses))):
            raise AssertionError(f"the losses are {losses}")
        if _sum(fabric, model) == before:
            raise AssertionError("no parameter changed in two steps")
    return losses


def _sum(fabric: Fabric, model: torch.nn.Module) -> float:
    """Give a number that changes with any parameter, from whole parameters or this rank's parts."""
    own = [getattr(one, "to_local", lambda one=one: one)().detach().double().abs().sum() for one in model.parameters()]
    total = fabric.all_reduce(torch.stack(own).sum().to(fabric.device), reduce_op="sum")
    return float(total)
