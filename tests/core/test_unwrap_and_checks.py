"""What is wrapped can be told and undone; what can't be set up is refused."""

import collections
import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from fabric_core import Fabric, Wrapper, is_wrapped, unwrap
from fabric_core.errors import SetupError


class Pair(NamedTuple):
    model: Any
    rest: Any


@dataclasses.dataclass(frozen=True)
class Box:
    optimizer: Any
    note: str = "n"


def load(data: Any) -> DataLoader[Any]:
    """Give a loader of any data."""
    return DataLoader(data)


def parts(in_memory: dict[str, Any]) -> tuple[Any, tuple[Any, Any, Any]]:
    """Give wrapped model, optimizer and loader, and the originals."""
    fabric = Fabric(**in_memory)
    net = nn.Linear(1, 1)
    optimizer, loader = SGD(net.parameters(), lr=1.0), load([1, 2])
    return (*fabric.setup(net, optimizer), fabric.setup_dataloaders(loader)), (net, optimizer, loader)


def test_wrapped_things_are_told_from_bare_ones(in_memory: dict[str, Any]) -> None:
    """Models, also compiled ones, optimizers and loaders; nothing else."""
    wrapped, bare = parts(in_memory)
    assert all(is_wrapped(one) for one in wrapped)
    assert is_wrapped(torch.compile(wrapped[0], backend="eager"))
    assert not any(is_wrapped(one) for one in (*bare, torch.compile(bare[0], backend="eager"), None, [wrapped]))


def test_unwrap_gives_the_users_own_objects(in_memory: dict[str, Any]) -> None:
    """Each wrapped thing becomes the very object that was set up."""
    wrapped, bare = parts(in_memory)
    for one, original in zip(wrapped, bare, strict=True):
        assert unwrap(one) is original
    assert unwrap(torch.compile(wrapped[0], backend="eager")) is bare[0]
    compiled = torch.compile(bare[0], backend="eager")
    assert unwrap(compiled) is compiled


def test_unwrap_goes_into_containers(in_memory: dict[str, Any]) -> None:
    """Dicts, lists, tuples, named tuples, dataclasses and their kin; kinds are kept."""
    (model, optimizer, loader), (net, sgd, original) = parts(in_memory)
    nested = {
        "pair": Pair(model, [loader, 3]),
        "box": Box(optimizer),
        "default": collections.defaultdict(list, a=[model]),
        "ordered": collections.OrderedDict(b=(optimizer, "text")),
    }
    result = unwrap(nested)
    assert result == {
        "pair": Pair(net, [original, 3]),
        "box": Box(sgd),
        "default": {"a": [net]},
        "ordered": {"b": (sgd, "text")},
    }
    assert [type(one) for one in result.values()] == [type(one) for one in nested.values()]
    assert result["default"]["new"] == []


def test_unwrap_leaves_alone_what_holds_nothing_wrapped() -> None:
    """The very same object comes back."""
    for value in ({"a": [1, (2, "x")]}, nn.Linear(1, 1), "text", None, Box(3)):
        assert unwrap(value) is value


def test_setting_up_twice_is_refused(in_memory: dict[str, Any]) -> None:
    """Wrapped, raw, compiled, or as a part of another model: what was set up is not set up again."""
    fabric: Any = Fabric(**in_memory)
    net = nn.Linear(1, 1)
    optimizer = SGD(net.parameters(), lr=1.0)
    model, stepper = fabric.setup(net, optimizer)
    for again in (
        model,
        net,
        torch.compile(model, backend="eager"),
        nn.Sequential(model),
        nn.Sequential(nn.Sequential(model)),
    ):
        with pytest.raises(SetupError, match="set up before"):
            fabric.setup(again)
    for again in (stepper, optimizer):
        with pytest.raises(SetupError, match="set up before"):
            fabric.setup_optimizers(again)
    loader = fabric.setup_dataloaders(load([1]))
    with pytest.raises(SetupError, match="set up before"):
        fabric.setup_dataloaders(loader)


def test_what_is_no_model_or_optimizer_is_named(in_memory: dict[str, Any]) -> None:
    """The error says what was given."""
    fabric: Any = Fabric(**in_memory)
    with pytest.raises(SetupError, match=r"no model(.|\n)*function"):
        fabric.setup(lambda x: x)
    with pytest.raises(SetupError, match=r"no optimizer(.|\n)*list"):
        fabric.setup(nn.Linear(1, 1), [])


def test_a_wrong_optimizer_leaves_the_model_free(in_memory: dict[str, Any]) -> None:
    """The optimizers are looked at first, so that the call can be corrected and repeated."""
    fabric: Any = Fabric(**in_memory)
    net = nn.Linear(1, 1)
    with pytest.raises(SetupError):
        fabric.setup(net, "sgd")
    assert is_wrapped(fabric.setup(net))


def test_an_optimizer_that_would_train_nothing_is_refused(in_memory: dict[str, Any]) -> None:
    """One of a copy's parameters alone is refused, and the call can be corrected; one of an earlier model is none."""
    fabric = Fabric(**in_memory)
    net, other = nn.Linear(1, 1), nn.Linear(1, 1)
    with pytest.raises(SetupError, match=r"would train nothing(.|\n)*SGD of 2 other(.|\n)*setup_optimizers"):
        fabric.setup(net, SGD(copy.deepcopy(net).parameters(), lr=1.0))
    mixed = SGD([*net.parameters(), nn.Parameter(torch.ones(1))], lr=1.0)
    model, _ = fabric.setup(net, mixed)
    fabric.setup(other, SGD(model.parameters(), lr=1.0))


def test_parameters_on_several_devices_are_named(in_memory: dict[str, Any]) -> None:
    """The error shows one parameter of each device; left where they are, they are no error."""
    fabric = Fabric(**in_memory)
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1, device="meta"))
    with pytest.raises(SetupError, match=r"0\.weight on cpu, 1\.weight on meta(.|\n)*move_to_device=False"):
        fabric.setup(net)
    assert fabric.setup(net, move_to_device=False).device == torch.device("cpu")


def test_parameters_without_memory_are_named(in_memory: dict[str, Any]) -> None:
    """A model on the meta device needs memory first."""
    with pytest.raises(SetupError, match=r"weight on meta(.|\n)*to_empty"):
        Fabric(**in_memory).setup(nn.Linear(1, 1, device="meta"))


def test_a_wrapper_must_change_the_model_in_place(in_memory: dict[str, Any]) -> None:
    """Before the strategy, another object would leave the user with a model that isn't trained."""

    class Replacing(Wrapper):
        def wrap_module(self, module: nn.Module) -> nn.Module:
            return nn.Sequential(module)

    with pytest.raises(SetupError, match=r"in place(.|\n)*Replacing"):
        Fabric(**in_memory, wrappers=[Replacing()]).setup(nn.Linear(1, 1))
