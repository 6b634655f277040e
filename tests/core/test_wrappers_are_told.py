"""What a wrapper is told: which model an optimizer trains, what was replaced, and each step that was made."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer

from fabric_core import Fabric
from fabric_core.contracts import Precision, PrecisionPolicy, Wrapper


class Told(Wrapper):
    """Writes down what it is told."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self.set_up: list[tuple[nn.Module, dict[torch.Tensor, torch.Tensor]]] = []
        self.optimizers: list[tuple[Optimizer, list[nn.Module]]] = []
        self.steps: list[Optimizer] = []

    def after_setup(self, module: nn.Module, replaced: Mapping[torch.Tensor, torch.Tensor]) -> None:
        self.set_up.append((module, dict(replaced)))

    def wrap_optimizer(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Optimizer:
        self.optimizers.append((optimizer, list(modules)))
        return optimizer

    def after_step(self, optimizer: Optimizer) -> None:
        self.steps.append(optimizer)


class Replacing(Precision):
    """Makes new parameters, as a strategy that shards does."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy()

    def convert_module(self, module: nn.Module) -> nn.Module:
        for each in module.modules():
            for name, one in list(each.named_parameters(recurse=False)):
                setattr(each, name, nn.Parameter(one.detach().clone()))
        return module


class Skipping(Precision):
    """Makes every other step."""

    turn = 0

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy()

    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        self.turn += 1
        return step(closure) if self.turn % 2 else None


def _step(fabric: Fabric, model: Any, optimizer: Any) -> None:
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()


def test_it_is_told_which_models_an_optimizer_trains(in_memory: dict[str, Any]) -> None:
    """Two models with one optimizer each, and one optimizer of both."""
    told = Told()
    fabric = Fabric(**{**in_memory, "wrappers": [told]})
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    fabric.setup(first, SGD(first.parameters(), lr=0.1))
    fabric.setup(second, SGD(second.parameters(), lr=0.1))
    fabric.setup_optimizers(SGD([*first.parameters(), *second.parameters()], lr=0.1))
    own, other, both = (modules for _, modules in told.optimizers)
    assert (own, other) == ([first], [second])
    assert both == [first, second]
    assert [module for module, _ in told.set_up] == [first, second]


def test_it_is_told_what_was_replaced(in_memory: dict[str, Any]) -> None:
    """Each of the user's parameters leads to the one that is trained."""
    told = Told()
    fabric = Fabric(**{**in_memory, "wrappers": [told], "precision": Replacing()})
    model = nn.Linear(2, 1)
    before = list(model.parameters())
    fabric.setup(model, SGD(model.parameters(), lr=0.1))
    ((_, replaced),) = told.set_up
    assert all(replaced[old] is new for old, new in zip(before, model.parameters(), strict=True))


def test_it_is_told_of_steps_that_were_made(in_memory: dict[str, Any]) -> None:
    """And not of those that the precision skipped."""
    told = Told()
    fabric = Fabric(**{**in_memory, "wrappers": [told], "precision": Skipping()})
    model = nn.Linear(2, 1)
    bare = SGD(model.parameters(), lr=0.1)
    wrapped, optimizer = fabric.setup(model, bare)
    for _ in range(3):
        _step(fabric, wrapped, optimizer)
    assert told.steps == [bare, bare]


def test_who_looks_away_costs_nothing(in_memory: dict[str, Any]) -> None:
    """A wrapper that doesn't override the event adds no call to a step."""
    model = nn.Linear(2, 1)

    def made(wrappers: list[Wrapper]) -> Any:
        fabric = Fabric(**{**in_memory, "wrappers": wrappers, "strategy": "alone"})
        optimizer: Any = fabric.setup_optimizers(SGD(model.parameters(), lr=0.1))
        return optimizer._fabric_direct

    class Away(Wrapper):
        pass

    assert made([Away()]).func.__name__ == made([]).func.__name__ != made([Told()]).func.__name__


def test_scripts_reach_them_by_name(in_memory: dict[str, Any]) -> None:
    """In their order; the second of one class has a number."""
    first, second = Told(), Told()
    fabric = Fabric(**{**in_memory, "wrappers": [first, second]})
    assert dict(fabric.wrappers) == {"Told": first, "Told#2": second}
