"""Every private or undocumented part of PyTorch that the core uses, with the reason, and what would replace it."""

import sys
from collections.abc import Callable
from typing import Any, Final, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules import module as module_hooks
from torch.utils import _python_dispatch, _pytree

__all__ = [
    "DispatchMode",
    "after_backward",
    "apply_to_tensors",
    "backends_of",
    "backward_state",
    "compile_like",
    "compiler",
    "fake_mode",
    "global_hooks",
    "has_hooks",
    "in_backward",
    "loading_hooks",
    "original_of",
    "print_options",
    "process_groups",
    "run_backward",
    "set_backward_state",
    "tree_flatten",
    "tree_is_leaf",
    "tree_map_only",
    "tree_unflatten",
]

_STATE: Final = "fabric_core.backward"


def process_groups() -> list[Any]:
    """List the process groups of this process; PyTorch names them nowhere else. A public list would replace it."""
    return list(dist.distributed_c10d._world.pg_map)  # noqa: SLF001


def backends_of(group: Any) -> list[Any]:
    """List the backends of a process group, which own its threads; a public accessor would replace it."""
    return [group._get_backend(device) for device in group._device_types]  # noqa: SLF001


def after_backward(function: Callable[[], None]) -> None:
    """Call a function once the backward pass that runs now, and all that was to follow it, is over.

    It is called in a hook of the pass. A strategy's own callbacks, such as DDP's, may be queued after it and before the
    end; so this one queues itself once more, behind them. A public ``queue_callback`` would replace it.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback  # noqa: SLF001
    queue(lambda: queue(function))


def in_backward() -> bool:
    """Say whether this thread computes a backward pass, as in a hook; a public question would replace it."""
    return torch._C._current_graph_task_id() != -1  # noqa: SLF001


def has_hooks(parameter: torch.Tensor) -> bool:
    """Say whether hooks are registered on a parameter's gradient; a public list of them would replace it."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)  # noqa: SLF001


def backward_state() -> Any:
    """Give what this thread, or the one whose backward pass an engine's thread computes, has set; else ``None``.

    Python's own thread-local values and contexts do not reach the engine's threads. Contexts that do would replace it.
    """
    tls = torch._C  # noqa: SLF001
    return tls._get_obj_in_tls(_STATE) if tls._is_key_in_tls(_STATE) else None  # noqa: SLF001


def set_backward_state(state: Any) -> None:
    """Set a value for this thread, and for the engine's threads while they compute its backward passes.

    Contexts that reach them would replace it.
    """
    torch._C._stash_obj_in_tls(_STATE, state)  # noqa: SLF001


def run_backward(
    tensors: Any,
    grad_tensors: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
    gradient: Any = None,
) -> None:
    """As ``torch.autograd.backward`` and ``torch.Tensor.backward``, with the function modes of the caller left on.

    These hand themselves to the modes, each of which is off while it is asked, and so during the pass. A backward pass
    that runs in its caller's modes would replace it.
    """
    given = (tensors,) if isinstance(tensors, torch.Tensor) else tuple(tensors)
    grads = grad_tensors if gradient is None else gradient
    grads = torch.autograd._tensor_or_tensors_to_tuple(grads, len(given))  # noqa: SLF001
    grads = torch.autograd._make_grads(given, grads, is_grads_batched=False)  # noqa: SLF001
    leaves = () if inputs is None else (inputs,) if isinstance(inputs, torch.Tensor) else tuple(inputs)
    retain_graph = create_graph if retain_graph is None else retain_graph
    torch.autograd.graph._engine_run_backward(  # noqa: SLF001
        given, grads, retain_graph, create_graph, leaves, allow_unreachable=True, accumulate_grad=True
    )


def fake_mode() -> Any:
    """Give the context in which tensors have shapes and types alone; a public name for it would replace it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def apply_to_tensors(module: nn.Module, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Replace the tensors of a module in place; a ``Module.to`` that keeps complex tensors would replace it."""
    module._apply(function)  # type: ignore[no-untyped-call] # noqa: SLF001


def loading_hooks(module: nn.Module) -> list[Any]:
    """List what a module loads its state with: methods and hooks; a public list of hooks would replace it."""
    kind = type(module)
    hooks = module._load_state_dict_pre_hooks.values()  # noqa: SLF001
    return [
        kind.load_state_dict,
        kind._load_from_state_dict,  # noqa: SLF001
        *(getattr(hook, "hook", hook) for hook in hooks),
    ]


def compiler() -> str:
    """Name the module that optimizers import when they first step, for a second; a public name would replace it."""
    return "torch._dynamo"


def original_of(module: Any) -> Any:
    """Give the module inside a compiled one, and anything else as it is; a public way to tell them would replace it."""
    dynamo = sys.modules.get(compiler())  # where the compiler is not even imported, nothing is compiled
    compiled = dynamo is not None and isinstance(module, dynamo.OptimizedModule)
    return module._orig_mod if compiled else module  # noqa: SLF001


def compile_like(compiled: Any, module: nn.Module) -> nn.Module:
    """Compile a module with the arguments that another was compiled with; a public list of these would replace it."""
    return cast("nn.Module", compiled.dynamo_ctx(module))


def print_options() -> dict[str, Any]:
    """Give how tensors are printed, as ``torch.set_printoptions`` left it; a public getter would replace it."""
    return vars(torch._tensor_str.PRINT_OPTS).copy()  # noqa: SLF001


def global_hooks() -> list[int]:
    """Count the hooks on all modules, by kind; PyTorch only adds them. A public count would replace it."""
    return [
        len(hooks)
        for name, hooks in vars(module_hooks).items()
        if name.startswith("_global_") and name.endswith("hooks")
    ]


class DispatchMode(_python_dispatch.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The base of modes that see every operator; a name of it without an underscore would replace it."""


def tree_map_only(kind: Any, function: Callable[[Any], Any], tree: Any) -> Any:
    """Map the leaves of one type; a public ``pytree`` would replace it."""
    return _pytree.tree_map_only(kind, function, tree)


def tree_is_leaf(tree: Any) -> bool:
    """Say whether a value is no registered container; a public ``pytree`` would replace it."""
    return _pytree.tree_is_leaf(tree)


def tree_flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[Any], Any]:
    """Give the leaves and the structure of a nesting; a public ``pytree`` would replace it."""
    return _pytree.tree_flatten(tree, is_leaf=is_leaf)


def tree_unflatten(leaves: list[Any], structure: Any) -> Any:
    """Give the nesting of a structure with these leaves; a public ``pytree`` would replace it."""
    return _pytree.tree_unflatten(leaves, structure)
