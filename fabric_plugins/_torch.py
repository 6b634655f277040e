"""Every private or undocumented part of PyTorch that the plugins use, with the reason, and what would replace it."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, Final, cast

import torch
from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils import _pytree

__all__ = [
    "LocalGradScaler",
    "apply_to_tensors",
    "attention_operators",
    "checkpoint_activations",
    "clear_groups",
    "clear_unsynchronized",
    "expect_static_reduction",
    "found_inf",
    "growth_tracker",
    "initializers",
    "iterations_since_change",
    "leave_reducer",
    "loss_scale",
    "original_of",
    "reduction_finished",
    "set_found_inf",
    "storage_info",
    "tree_map_only",
    "unsynchronized",
    "was_written",
]


def reduction_finished(reducer: Any) -> bool:
    """Say whether DDP's reducer averaged what it waited for, if it looks for unused parameters or the graph is static.

    Asked to rebuild its buckets, it makes sure first that its last reduction came to an end. One that looks for unused
    parameters has nothing to rebuild; one of a static graph does so once, as it would in its next forward pass. A
    public way to ask for the end would replace it.
    """
    try:
        reducer._rebuild_buckets()  # noqa: SLF001
    except RuntimeError:
        return False
    return True


def expect_static_reduction(replicated: Any) -> None:
    """Let a copy of a DDP with a static graph set off its first reduction; it has a reducer of its own.

    PyTorch copies that the original's was set off, and so never reduces. It would be replaced by a copy that works.
    """
    replicated._static_graph_delay_allreduce_enqueued = False  # noqa: SLF001


def _parameters(unit: Any) -> Iterator[Any]:
    """List what FSDP2 knows of each parameter of one of its modules; it shows no gradient that is not reduced yet."""
    state = unit._get_fsdp_state()  # noqa: SLF001
    groups = getattr(state, "_fsdp_param_groups", None)
    for group in [state._fsdp_param_group] if groups is None else groups:  # noqa: SLF001 - up to PyTorch 2.11
        if group is not None:
            yield from group.fsdp_params


def _whole(one: Any) -> Any:
    return getattr(one, "_unsharded_param", None)


def unsynchronized(unit: Any) -> list[torch.Tensor]:
    """List the parameters of a unit of FSDP2 that have gradients which were not reduced over the ranks.

    They lie with the gathered parameters, until a backward pass reduces them. A public accessor would replace it.
    """
    return [
        one.sharded_param
        for one in _parameters(unit)
        if one.unsharded_accumulated_grad is not None or getattr(_whole(one), "grad", None) is not None
    ]


def clear_unsynchronized(unit: Any, held: set[int]) -> None:
    """Clear such gradients of the parameters with these identities, gathered or not.

    A public accessor would replace it.
    """
    for one in _parameters(unit):
        whole = _whole(one)
        if id(one.sharded_param) in held or id(whole) in held:
            one.unsharded_accumulated_grad = None
            if whole is not None:
                whole.grad = None


def storage_info() -> Any:
    """Give the class by which the metadata of ``torch.distributed.checkpoint`` says where a record is.

    Only PyTorch's own reader needs it; our checkpoints are read without. It would be replaced by a public class, or
    PyTorch's tools would no longer read our folders.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo


def tree_map_only(kind: Any, function: Callable[[Any], Any], tree: Any) -> Any:
    """Map the leaves of one type in a nesting of containers; a public ``pytree`` would replace it."""
    return _pytree.tree_map_only(kind, function, tree)


def apply_to_tensors(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace the tensors of a module in place; a ``Module.to`` that passes over meta tensors would replace it."""
    module._apply(function)  # type: ignore[no-untyped-call] # noqa: SLF001


def was_written(tensor: torch.Tensor) -> bool:
    """Say whether anything wrote to a new tensor in place; PyTorch's notes on autograd name the counter.

    A public counter would replace it.
    """
    return tensor._version > 0  # noqa: SLF001


def initializers(module: nn.Module) -> list[Callable[[], Any]]:
    """List the methods that make a module's own values; the second name is that of ``nn.MultiheadAttention``.

    ``reset_parameters`` there too would replace it.
    """
    found = (getattr(module, name, None) for name in ("reset_parameters", "_reset_parameters"))
    return [one for one in found if callable(one)]


def clear_groups(mesh: Any) -> None:
    """Make a mesh forget the process groups that it is made of, and so their threads and connections.

    DTensor keeps each mesh for good, with how it divided what. A public end of a mesh would replace it.
    """
    mesh._pg_registry.clear()  # noqa: SLF001


def leave_reducer(replicated: Any) -> None:
    """Take a wrapper of ``DistributedDataParallel`` off its process group; a public end of it would replace it."""
    del replicated.reducer, replicated.logger


def checkpoint_activations(module: nn.Module, **arguments: Any) -> None:
    """Make a module compute its activations again in ``backward``, by hooks: its class and its names stay.

    ``torch.utils.checkpoint`` does it to a call, and PyTorch's wrapper changes names. A public name would replace it.
    """
    from torch.distributed._composable.checkpoint_activation import checkpoint

    checkpoint(module, **arguments)


def original_of(module: Any) -> Any:
    """Give the module inside a compiled one, and anything else as it is; a public way to tell them would replace it."""
    return getattr(module, "_orig_mod", module)


def attention_operators() -> list[Any]:
    """List the operators that compute scaled dot-product attention; public names of them would replace it."""
    aten = torch.ops.aten
    return [
        aten._scaled_dot_product_flash_attention.default,  # noqa: SLF001
        aten._scaled_dot_product_efficient_attention.default,  # noqa: SLF001
        aten._scaled_dot_product_flash_attention_for_cpu.default,  # noqa: SLF001
        aten._scaled_dot_product_cudnn_attention.default,  # noqa: SLF001
    ]


def loss_scale(scaler: GradScaler) -> torch.Tensor | None:
    """Give a scaler's scale as it lies on the device, ``None`` before its first loss.

    ``get_scale`` waits for the device. A public tensor would replace it.
    """
    return scaler._scale  # type: ignore[no-any-return, unused-ignore] # noqa: SLF001


def found_inf(scaler: GradScaler, optimizer: Optimizer) -> list[torch.Tensor]:
    """List what a scaler found in an optimizer's gradients, one for each device; a public list would replace it."""
    return list(scaler._found_inf_per_device(optimizer).values())  # noqa: SLF001


def set_found_inf(scaler: GradScaler, found: torch.Tensor | None) -> None:
    """Make a scaler forget what it found, or know of one thing that others found, for its next ``update``.

    It would be replaced by an ``update`` that takes what was found on all ranks.
    """
    scaler._per_optimizer_states.clear()  # noqa: SLF001
    if found is not None:
        scaler._per_optimizer_states[0]["found_inf_per_device"] = {found.device: found}  # noqa: SLF001


def growth_tracker(scaler: GradScaler) -> torch.Tensor | None:
    """Give a scaler's count of iterations since its scale changed, to be added to; a public setter would replace it."""
    return scaler._growth_tracker  # noqa: SLF001


def iterations_since_change(scaler: GradScaler) -> int:
    """Give that count as a number, for which the host waits for the device; a public getter would replace it."""
    return int(scaler._get_growth_tracker())  # noqa: SLF001


_PLAIN: Final = frozenset({torch.Tensor, type(None)})


def local_gradients(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    """Give this rank's own part of each gradient that there is."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if type(gradient) not in _PLAIN:
                from torch.distributed.tensor import DTensor

                if isinstance(gradient, DTensor):
                    gradient = gradient.to_local()
            yield gradient


class LocalGradScaler(GradScaler):
    """Looks at a rank's own part of each gradient; a scaler that takes gradients on several meshes would replace it."""

    def _unscale_grads_(self, optimizer: Optimizer, *args: Any) -> dict[torch.device, torch.Tensor]:
        if all(type(one.grad) in _PLAIN for group in optimizer.param_groups for one in group["params"]):
            return super()._unscale_grads_(optimizer, *args)
        # PyTorch compares over the mesh of the first gradient alone, and takes no plain gradients beside spread ones.
        carriers = []
        for gradient in local_gradients(optimizer):
            carrier = gradient.detach()
            carrier.grad = gradient
            carriers.append(carrier)
        local = cast("Optimizer", SimpleNamespace(param_groups=[{"params": carriers}]))
        return super()._unscale_grads_(local, *args)
