"""DiLoCo: ranks train by themselves for many steps, and an outer optimizer steps on how far they came.

Every ``sync_every`` steps the mean over the ranks of (parameters then - parameters now) is the gradient on which
Nesterov momentum steps from the parameters then; all ranks go on from there (https://arxiv.org/abs/2311.08105).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn
from torch.optim import SGD, Optimizer

from fabric_core.contracts import (
    Collectives,
    PluginOptions,
    PrecisionPolicy,
    ProcessGroup,
    Strategy,
    StrategyCapabilities,
    World,
)


class DiLoCoOptions(PluginOptions):
    """The options of the strategy ``diloco``; the defaults are the paper's."""

    sync_every: int = Field(default=500, ge=1)
    """After how many steps of an optimizer the outer optimizer steps on the parameters that it trains."""
    outer_lr: float = Field(default=0.7, gt=0)
    """The outer optimizer's learning rate."""
    outer_momentum: float = Field(default=0.9, ge=0, lt=1)
    """The outer optimizer's Nesterov momentum; 0 is none."""


class DiLoCoStrategy(Strategy):
    """Each rank trains by itself; every ``sync_every`` steps an outer optimizer joins what they learnt.

    What is saved in one file is where the outer optimizer is: the steps that ranks made since then are left out, so a
    training that goes on from the file counts from there.
    """

    Options = DiLoCoOptions
    options: DiLoCoOptions
    capabilities = StrategyCapabilities(distributed=True, synchronous=False)

    def __init__(self, options: DiLoCoOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._outer: list[_Outer] = []  # in the order of the optimizers' setup
        self._restored: list[Mapping[str, Any]] = []

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join the other ranks."""
        self._group = ProcessGroup(world)
        return self._group

    def teardown(self) -> None:
        """Forget models and optimizers."""
        self._outer.clear()

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Start every rank from rank 0's values."""
        self._group.broadcast_tensors([one.detach() for one in (*module.parameters(), *module.buffers())], 0)
        return module

    def setup_optimizer(self, optimizer: Optimizer, replaced: Mapping[torch.Tensor, torch.Tensor]) -> Optimizer:
        """Give it an outer optimizer, in the state that a checkpoint had that was loaded before."""
        optimizer = super().setup_optimizer(optimizer, replaced)
        if all(one.inner is not optimizer for one in self._outer):
            self._outer.append(_Outer(optimizer, self.options, self._group))
            if self._restored:
                self._outer[-1].load_state_dict(self._restored.pop(0))
        return optimizer

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step; every ``sync_every`` steps the outer optimizer does, too."""
        result = super().optimizer_step(optimizer, closure)
        for one in self._outer:
            if one.inner is optimizer:
                one.count()
        return result

    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        """Give the parameters where the outer optimizer is, or this rank's."""
        state = super().module_state(module, full)
        if full:
            starts = {
                id(own): start for one in self._outer for own, start in zip(one.parameters, one.starts, strict=True)
            }
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if name in state and id(parameter) in starts:
                    state[name] = starts[id(parameter)].detach().clone()
        return state

    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        """Load, and let the outer optimizer start from there."""
        super().load_module_state(module, state, full, strict)
        mine = {id(one) for one in module.parameters()}
        for one in self._outer:
            one.start(mine)

    def state_dict(self) -> dict[str, Any]:
        """Give the outer optimizers' states."""
        return {"outer": [one.optimizer.state_dict() for one in self._outer]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; an optimizer that is not set up yet, once it is."""
        self._restored = list(state["outer"])
        for one in self._outer:
            if self._restored:
                one.load_state_dict(self._restored.pop(0))


class _Outer:
    """The outer optimizer beside an inner one.

    Args:
        inner: The user's optimizer.
        options: The strategy's.
        group: What ranks communicate by.
    """

    def __init__(self, inner: Optimizer, options: DiLoCoOptions, group: Collectives) -> None:
        self.inner = inner
        self.parameters = [one for entry in inner.param_groups for one in entry["params"]]
        self.starts = [one.detach().clone() for one in self.parameters]
        momentum = options.outer_momentum
        self.optimizer = SGD(self.starts, lr=options.outer_lr, momentum=momentum, nesterov=momentum > 0)
        self._group = group
        self._every = options.sync_every
        self._steps = 0

    def start(self, only: set[int]) -> None:
        """Start from the values that some parameters have now, without steps made since."""
        for own, start in zip(self.parameters, self.starts, strict=True):
            if id(own) in only:
                start.copy_(own.detach())
        self._steps = 0

    @torch.no_grad()
    def count(self) -> None:
        """Count an inner step, and step after every so many."""
        self._steps += 1
        if self._steps < self._every:
            return
        self._steps = 0
        for dtype in dict.fromkeys(one.dtype for one in self.starts):
            same = [index for index, one in enumerate(self.starts) if one.dtype == dtype]
            moved = torch.cat([(self.starts[index] - self.parameters[index]).flatten() for index in same])
            mean = self._group.all_reduce(moved, None, "mean").split([self.starts[index].numel() for index in same])  # type: ignore[no-untyped-call]
            for index, part in zip(same, mean, strict=True):
                self.starts[index].grad = part.view_as(self.starts[index]).clone()
        self.optimizer.step()
        self.optimizer.zero_grad()
        for own, start in zip(self.parameters, self.starts, strict=True):
            own.copy_(start)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back the outer momentum; the learning rate stays what the options say."""
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
