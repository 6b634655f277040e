"""What a strategy may replace in a model, and what must not get lost as it does."""

from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.errors import SetupError

from .conftest import Alone


class Replacing(Alone):
    """Puts new parameters in the place of all; each place has one of its own, or what was shared stays so."""

    tied = True

    def setup_module(self, module: nn.Module) -> nn.Module:
        made: dict[int, nn.Parameter] = {}
        for part in module.modules():
            for name, old in list(part.named_parameters(recurse=False)):
                if not self.tied or id(old) not in made:
                    made[id(old)] = nn.Parameter(old.detach().clone())
                setattr(part, name, made[id(old)])
        return module


class Untying(Replacing):
    """Gives each place one of its own."""

    tied = False


def _net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[1].weight = net[0].weight
    return net


def _set_up(in_memory: dict[str, Any], strategy: Alone, net: nn.Module) -> Any:
    return Fabric(**{**in_memory, "strategy": strategy}).setup(net)


def test_what_is_shared_and_stays_so_is_right(in_memory: dict[str, Any]) -> None:
    """A strategy replaces a shared parameter by one."""
    net = _net()
    _set_up(in_memory, Replacing(), net)
    assert net[0].weight is net[1].weight


def test_what_is_shared_must_not_come_apart(in_memory: dict[str, Any]) -> None:
    """The error names both places; a model that shares nothing is right."""
    with pytest.raises(SetupError, match=r"came apart(.|\n)*0\.weight and 1\.weight"):
        _set_up(in_memory, Untying(), _net())
    _set_up(in_memory, Untying(), nn.Linear(1, 1))


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_must_not_get_lost(in_memory: dict[str, Any], register: str) -> None:
    """Hooks on a parameter that is replaced are refused; where it stays, or they were taken off, they are right."""
    net = nn.Linear(1, 1)
    handle = getattr(net.weight, register)(lambda _: None)
    with pytest.raises(SetupError, match=r"hooks(.|\n)*weight(.|\n)*after fabric\.setup"):
        _set_up(in_memory, Replacing(), net)
    other = nn.Linear(1, 1)
    seen: list[torch.Tensor] = []
    getattr(other.weight, register)(seen.append)
    model = _set_up(in_memory, Alone(), other)
    model(torch.ones(1, 1)).sum().backward()
    assert len(seen) == 1
    handle.remove()
    _set_up(in_memory, Replacing(), nn.Linear(1, 1))
