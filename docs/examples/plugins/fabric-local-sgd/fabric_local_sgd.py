"""Local SGD: each rank steps on its own gradients, and the ranks' models are averaged every few steps.

With ``sync_every=n`` a step communicates n times less than under data parallelism. Post-local SGD averages gradients
for the first steps, while the loss falls fast, and models from then on (https://arxiv.org/abs/1808.07217).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from pydantic import Field
from torch import nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from fabric_core.contracts import (
    Collectives,
    PluginOptions,
    PrecisionPolicy,
    Preset,
    ProcessGroup,
    Strategy,
    StrategyCapabilities,
    World,
)


class LocalSGDOptions(PluginOptions):
    """The options of the strategy ``local_sgd``."""

    sync_every: int = Field(default=8, ge=1)
    """After how many steps of an optimizer the parameters that it trains are averaged."""
    warmup_steps: int = Field(default=0, ge=0)
    """For how many steps gradients are averaged instead, at each of them: post-local SGD."""


class LocalSGDStrategy(Strategy):
    """Each rank trains a model of its own; the models are averaged every ``sync_every`` steps.

    What is saved in one file is the average over the ranks, and so a training that goes on from it, or stops at a
    multiple of ``sync_every``, loses nothing.
    """

    Options = LocalSGDOptions
    options: LocalSGDOptions
    capabilities = StrategyCapabilities(
        distributed=True, synchronous=False, requires_strategy_backward=True, no_backward_sync=True
    )

    def __init__(self, options: LocalSGDOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._steps: dict[Optimizer, int] = {}  # in the order of their setup
        self._restored: list[int] = []
        self._modules: list[nn.Module] = []
        self._skipped: set[nn.Module] = set()

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join the other ranks."""
        self._group = ProcessGroup(world)
        return self._group

    def teardown(self) -> None:
        """Forget models and optimizers."""
        self._modules.clear()
        self._steps.clear()

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Start every rank from rank 0's values."""
        self._group.broadcast_tensors([one.detach() for one in (*module.parameters(), *module.buffers())], 0)
        self._modules.append(module)
        return module

    def setup_optimizer(self, optimizer: Optimizer, replaced: Mapping[torch.Tensor, torch.Tensor]) -> Optimizer:
        """Count its steps, from where a checkpoint that was loaded before says."""
        if optimizer not in self._steps:
            self._steps[optimizer] = self._restored.pop(0) if self._restored else 0
        return super().setup_optimizer(optimizer, replaced)

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the backward pass; during the warm-up, average gradients after it."""
        super().backward(loss, module, arguments)
        if min(self._steps.values(), default=0) < self.options.warmup_steps:
            for one in self._modules:
                if one not in self._skipped:
                    self._average_gradients([each for each in one.parameters() if each.requires_grad])

    def _average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average; a rank that has no gradient counts as zero where another has one."""
        if not parameters:
            return
        there = torch.tensor([one.grad is not None for one in parameters], dtype=torch.int32)
        anywhere = self._group.all_reduce(there.to(parameters[0].device), None, "max").tolist()
        used = [one for one, has in zip(parameters, anywhere, strict=True) if has]
        for one in used:
            one.grad = torch.zeros_like(one) if one.grad is None else one.grad
        average(self._group, [one.grad for one in used if one.grad is not None])

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Leave a model's gradients as they are; after the warm-up they always are."""
        added = {module} - self._skipped if enabled else set()
        self._skipped |= added
        try:
            yield
        finally:
            self._skipped -= added

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step; average the models after every ``sync_every`` steps."""
        result = super().optimizer_step(optimizer, closure)
        self._steps[optimizer] += 1
        past = self._steps[optimizer] - self.options.warmup_steps
        if past > 0 and past % self.options.sync_every == 0:
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            mine = {id(one) for one in parameters}
            buffers = [
                buffer
                for module in self._modules
                if any(id(one) in mine for one in module.parameters())
                for buffer in module.buffers()
            ]
            average(self._group, (one.detach() for one in (*parameters, *buffers)))
        return result

    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        """Give the average over the ranks, or what this rank has."""
        return self._averaged(super().module_state(module, full)) if full else super().module_state(module, full)

    def optimizer_state(self, optimizer: Optimizer, full: bool) -> dict[str, Any]:
        """Give the average over the ranks, or what this rank has."""
        state = super().optimizer_state(optimizer, full)
        return self._averaged(state) if full else state

    def _averaged(self, state: dict[str, Any]) -> dict[str, Any]:
        copies: list[torch.Tensor] = []

        def copy(one: torch.Tensor) -> torch.Tensor:
            copies.append(one.detach().clone())
            return copies[-1]

        copied: dict[str, Any] = tree_map_only(torch.Tensor, copy, state)
        average(self._group, copies)
        return copied

    def state_dict(self) -> dict[str, Any]:
        """Give how many steps each optimizer made."""
        return {"steps": list(self._steps.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on from there; optimizers that are not set up yet, once they are."""
        steps = [int(one) for one in state["steps"]]
        for optimizer in list(self._steps):
            if steps:
                self._steps[optimizer] = steps.pop(0)
        self._restored = steps


@torch.no_grad()
def average(group: Collectives, tensors: Iterable[torch.Tensor]) -> None:
    """Average floating-point tensors over the ranks, in place, in one message for each type."""
    floating = [one for one in tensors if one.is_floating_point() or one.is_complex()]
    for dtype in dict.fromkeys(one.dtype for one in floating):
        same = [one for one in floating if one.dtype == dtype]
        mean = group.all_reduce(torch.cat([one.flatten() for one in same]), None, "mean")
        for one, part in zip(same, mean.split([one.numel() for one in same]), strict=True):  # type: ignore[no-untyped-call]
            one.copy_(part.view_as(one))


POST_LOCAL_SGD: Final = Preset.of(LocalSGDStrategy, warmup_steps=100)
"""The alias ``post_local_sgd``."""
