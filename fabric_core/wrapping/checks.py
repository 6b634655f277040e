"""What can't be set up, and why."""

from collections.abc import Container, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from fabric_core.contracts import Strategy, Wrapper
from fabric_core.errors import SetupError, SetupTypeError, SetupValueError
from fabric_core.wrapping.module import FabricModule
from fabric_core.wrapping.unwrap import is_wrapped

__all__ = [
    "check_counts",
    "check_given",
    "check_hooks",
    "check_loader",
    "check_model",
    "check_optimizer",
    "check_same",
    "check_shared",
    "check_trains",
    "check_types",
]

_WHERE = "fabric.setup"


def check_model(module: Any, set_up: Container[Any], *, move: bool, placed_later: bool) -> None:
    """Refuse what is no model, or can't be set up.

    Args:
        module: The model, as it was before ``torch.compile``.
        set_up: What was set up before.
        move: The model will be moved to one device.
        placed_later: The strategy moves it, and gives memory to parameters that have none.

    Raises:
        SetupError: It was set up before or has a part that was, is no module, or its parameters are on several devices
            or on none.
    """
    if not isinstance(module, nn.Module):
        raise SetupTypeError(
            "what was given is no model", where=_WHERE, got=type(module).__name__, instead="a torch.nn.Module"
        )
    if is_wrapped(module) or module in set_up:
        raise SetupValueError(
            "the model was set up before", where=_WHERE, got=type(module).__name__, instead="use what setup returned"
        )
    for name, part in module.named_modules():
        for child_name, child in part.named_children():
            if isinstance(child, FabricModule):
                raise SetupError(
                    "a part of the model was set up before",
                    where=_WHERE,
                    got=f"{name}.{child_name}".removeprefix("."),
                    instead="set up either the whole or its parts; fabric_core.unwrap(part) gives the part back",
                )
    if not move:
        return
    places: dict[torch.device, str] = {}
    for name, parameter in module.named_parameters():
        places.setdefault(parameter.device, name)
    shown = ", ".join(f"{name} on {device}" for device, name in places.items())
    if len(places) > 1:
        raise SetupError(
            "the parameters of the model are on several devices",
            where=_WHERE,
            got=shown,
            instead="put them on one device first, or setup(..., move_to_device=False) to leave each where it is",
        )
    if torch.device("meta") in places and not placed_later:
        raise SetupError(
            "the parameters of the model have no memory yet, and this strategy gives them none",
            where=_WHERE,
            got=shown,
            instead="make the model without the meta device, or call model.to_empty(device=...) and load its state",
        )


def check_hooks(names: Sequence[str]) -> None:
    """Refuse that hooks on the gradients of parameters get lost.

    Args:
        names: Parameters with hooks that the strategy replaced.

    Raises:
        SetupError: There are such.
    """
    if names:
        raise SetupError(
            "the strategy replaces parameters that have hooks, which would never be called",
            where=_WHERE,
            got=", ".join(names),
            instead="register hooks after fabric.setup, on the parameters that the model has then",
        )


def check_shared(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> None:
    """Refuse that a parameter which several places share comes apart.

    Args:
        before: The parameters before the strategy had the model, by every name that they have.
        after: Those that it has now.

    Raises:
        SetupError: One did.
    """
    first: dict[int, str] = {}
    for name, parameter in before.items():
        known = first.setdefault(id(parameter), name)
        if after[name] is not after[known]:
            raise SetupError(
                "a parameter that two parts of the model share came apart, so each would train its own",
                where=_WHERE,
                got=f"{known} and {name}",
                instead=f"tie them again where they were divided: model.{name} = model.{known}",
            )


def check_counts(strategy: Strategy, models: int, optimizers: int) -> None:
    """Refuse one more model, or several optimizers of one model, where the strategy declares that it can't have them.

    Args:
        strategy: The strategy.
        models: How many models are set up already.
        optimizers: How many optimizers are given with this one.

    Raises:
        SetupError: It declares that.
    """
    declared, kind = strategy.capabilities, type(strategy).__name__
    if models and not declared.multiple_models:
        raise SetupError(
            f"{kind} declares that it takes one model, and one is set up",
            where=_WHERE,
            instead="one module that holds both, with methods marked by mark_forward_method; or another strategy",
        )
    if optimizers > 1 and not declared.multiple_optimizers:
        raise SetupError(
            f"{kind} declares that a model has one optimizer",
            where=_WHERE,
            got=f"{optimizers} optimizers",
            instead="one optimizer with several parameter groups; or another strategy",
        )


def check_types(strategy: Strategy, module: nn.Module) -> None:
    """Refuse a model with parameters to train of types that the strategy declares not to train.

    Args:
        strategy: The strategy.
        module: The model, as the precision made it.

    Raises:
        SetupError: It has such.
    """
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and (refusal := strategy.capabilities.refusal_of(parameter.dtype)) is not None:
            raise SetupError(
                f"{type(strategy).__name__} {refusal}",
                where=_WHERE,
                got=f"{name} of the type {parameter.dtype}",
                instead="a precision that keeps parameters in one of them, model.float(), or another strategy",
            )


def check_optimizer(optimizer: Any, set_up: Container[Any]) -> None:
    """Refuse what is no optimizer, or was set up before.

    Raises:
        SetupError: It is.
    """
    if not isinstance(optimizer, Optimizer):
        raise SetupTypeError(
            "what was given is no optimizer",
            where=_WHERE,
            got=type(optimizer).__name__,
            instead="a torch.optim.Optimizer",
        )
    if is_wrapped(optimizer) or optimizer in set_up:
        raise SetupValueError(
            "the optimizer was set up before",
            where=_WHERE,
            got=type(optimizer).__name__,
            instead="use what setup returned",
        )


def check_given(given: Sized, what: str) -> None:
    """Refuse a call that sets nothing up.

    Raises:
        SetupValueError: It does.
    """
    if not given:
        raise SetupValueError(f"no {what} was given", where=f"fabric.setup_{what}s", instead=f"at least one {what}")


def check_loader(loader: Any) -> None:
    """Refuse what gives no batches, or was set up before; any object that gives batches is a loader.

    Raises:
        SetupError: It is.
    """
    where = "fabric.setup_dataloaders"
    if is_wrapped(loader):
        raise SetupValueError(
            "the loader was set up before", where=where, instead="use what setup_dataloaders returned"
        )
    wrong = str | bytes | Mapping | torch.Tensor | nn.Module | Dataset | Optimizer  # type: ignore[type-arg]
    if isinstance(loader, type | wrong) or not isinstance(loader, Iterable):
        raise SetupTypeError(
            "what was given is no data loader",
            where=where,
            got=loader.__name__ if isinstance(loader, type) else type(loader).__name__,
            instead="a torch.utils.data.DataLoader, such as DataLoader(dataset, batch_size=...)",
        )


def check_trains(optimizer: Optimizer, models: Iterable[Any], replaced: Container[torch.Tensor]) -> None:
    """Refuse an optimizer that would train none of the models.

    Args:
        optimizer: The optimizer.
        models: The model that it is given with, and what was set up before.
        replaced: Parameters that models had before they were set up.

    Raises:
        SetupError: It would.
    """
    known = {id(one) for model in models if isinstance(model, nn.Module) for one in model.parameters()}
    held = [one for group in optimizer.param_groups for one in group["params"]]
    if not any(id(one) in known or one in replaced for one in held):
        raise SetupError(
            "the optimizer holds no parameter of the model, nor of one that was set up before: it would train nothing",
            where=_WHERE,
            got=f"{type(optimizer).__name__} of {len(held)} other parameters",
            instead="make it from model.parameters(); one for parameters outside any model goes through"
            " fabric.setup_optimizers",
        )


def check_same(result: nn.Module, module: nn.Module, wrapper: Wrapper) -> None:
    """Refuse a wrapper that, before the strategy, returns another module.

    Raises:
        SetupError: It does.
    """
    if result is not module:
        raise SetupError(
            "a wrapper before the strategy must change the model in place, so that the user's references stay true",
            where=repr(wrapper),
            got=type(result).__name__,
            instead="the same module, or the stage after_strategy",
        )
