"""Values for models that were made on the meta device, sharded before they are ever whole."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fabric_core.contracts import Collectives
from fabric_core.errors import SetupError
from fabric_plugins._torch import apply_to_tensors, initializers, tree_map_only, was_written
from fabric_plugins.strategies._sharding.tensors import distribute, layout

__all__ = ["check_materialisable", "materialise", "move_to"]


def check_materialisable(module: nn.Module) -> None:
    """Make sure that every module with parameters or buffers on the meta device can make their values.

    Raises:
        SetupError: One can't; names it.
    """
    for name, one in module.named_modules():
        if _on_meta(one) and _reset_of(one) is None:
            raise SetupError(
                f"{name or 'the model'} ({type(one).__name__}) has {', '.join(_on_meta(one))} on the meta device,"
                " and no reset_parameters to make the values",
                where="fabric.setup, of a model made in fabric.init_module(empty_init=True)",
                instead=f"def reset_parameters(self) in {type(one).__name__}, which fills its own parameters and"
                " buffers; or fabric.init_module(empty_init=False)",
            )


def move_to(module: nn.Module, device: torch.device) -> None:
    """Move what has values; what is on the meta device gets its values on the device."""
    apply_to_tensors(module, lambda one: one if one.is_meta else one.to(device))


def materialise(module: nn.Module, device: torch.device, *, kept_on: torch.device, group: Collectives) -> None:
    """Make the values of what is on the meta device, module by module: never more than one module's is whole.

    Where a module's ``reset_parameters`` fills more than its own, that is whole for the time. Every rank gets its parts
    of rank 0's values. With the same seed, they are those of a model that is made whole, if each module's constructor
    ends with its ``reset_parameters`` and nothing else draws values.

    Args:
        module: The sharded module.
        device: Where the values are made.
        kept_on: Where the parts stay.
        group: The ranks that the module is sharded over.

    Raises:
        SetupError: A ``reset_parameters`` leaves something unset.
    """
    made: dict[torch.Tensor, nn.Parameter] = {}
    meta_modules = {one for one in module.modules() if any(_on_meta(part) for part in one.modules())}
    names_of = {one: name or "the model" for name, one in module.named_modules()}
    for one in _children_first(module, set()):
        reset = _reset_of(one)
        if one not in meta_modules or reset is None:
            continue
        names = _on_meta(one)
        parameters = {name: parameter for name, parameter in one.named_parameters(recurse=False) if name in names}
        empty = {}
        for name in names:
            old = getattr(one, name)
            whole = _unset(old, device)
            empty[name] = nn.Parameter(whole, old.requires_grad) if name in parameters else whole
            setattr(one, name, empty[name])
        with device, _FullTensorInit(device) as wholes:
            reset()
        wholes.divide(group)
        unset = [name for name, tensor in empty.items() if getattr(one, name) is tensor and _is_unset(tensor)]
        if unset:
            raise SetupError(
                f"{reset.__name__} leaves {', '.join(unset)} without values",
                where=f"{names_of[one]} ({type(one).__name__})",
                instead="fill every parameter and buffer there; or fabric.init_module(empty_init=False)",
            )
        group.broadcast_tensors([getattr(one, name).detach() for name in names], 0)
        for name, parameter in parameters.items():
            if parameter not in made:
                part = getattr(one, name).detach()
                if layout(parameter) != parameter.device:
                    part = distribute(part, parameter)
                made[parameter] = nn.Parameter(part.to(kept_on), parameter.requires_grad)
            setattr(one, name, made[parameter])


def _unset(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Make room that shows whether it was filled."""
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.full(tensor.shape, math.nan, dtype=tensor.dtype, device=device)
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)


def _is_unset(tensor: torch.Tensor) -> bool:
    """Say whether room was not filled, or in part; there is no integer that nobody would write."""
    if tensor.is_floating_point() or tensor.is_complex():
        return bool(tensor.detach().isnan().any())
    return tensor.numel() > 0 and not was_written(tensor)


class _FullTensorInit(TorchFunctionMode):
    """Lets a module's ``reset_parameters`` fill parameters of its children, which are divided by then.

    What it does to one, it does to the whole of it, which is kept until it is over; then every rank takes its part of
    rank 0's. Of their parts alone, ranks would draw numbers that don't make up the whole.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._wholes: dict[Any, torch.Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        from torch.distributed.tensor import DTensor

        named = dict(kwargs or {})
        if func.__name__ in {"__get__", "dim", "numel", "size"}:
            result = func(*args, **named)
            if not isinstance(result, DTensor):
                return result
        args, named = tree_map_only(DTensor, self._whole, (args, named))
        return func(*args, **named)

    def _whole(self, parameter: Any) -> torch.Tensor:
        if parameter not in self._wholes:
            self._wholes[parameter] = parameter.detach().to(self._device).full_tensor().clone()
        return self._wholes[parameter]

    def divide(self, group: Collectives) -> None:
        """Give each rank its part of what was filled."""
        group.broadcast_tensors([*self._wholes.values()], 0)
        for parameter, whole in self._wholes.items():
            parameter.detach().to_local().copy_(distribute(whole, parameter).to_local())


def _children_first(module: nn.Module, seen: set[nn.Module]) -> Iterable[nn.Module]:
    """Walk in the order in which modules are constructed, and so draw their random values."""
    if module in seen:
        return
    seen.add(module)
    for child in module.children():
        yield from _children_first(child, seen)
    yield module


def _on_meta(module: nn.Module) -> list[str]:
    return [
        name
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if tensor.device.type == "meta"
    ]


def _reset_of(module: nn.Module) -> Callable[[], Any] | None:
    return next(iter(initializers(module)), None)
