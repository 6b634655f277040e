"""What strategies whose parameters are DTensors share: units, materialising, state, clipping, gradient sync."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Literal
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts import repeated_blocks, replace_parameters
from fabric_core.errors import OptionError, SetupError
from fabric_plugins.strategies._distributed import DistributedStrategy, send_from_zero

__all__ = ["ModulePolicy", "ShardedStrategy", "check_materialisable", "choose_modules", "materialise", "move_to"]

ModulePolicy = Literal["auto"] | set[Any] | Callable[[nn.Module], bool]
"""Which modules: ``"auto"``, a set of classes (or of their names), or a callable that says yes or no to each."""

_RESET: Final = ("reset_parameters", "_reset_parameters")
"""How a module makes its own values; PyTorch's ``MultiheadAttention`` has the second name."""


class ShardedStrategy(DistributedStrategy):
    """Parameters are DTensors after ``setup_module``: each rank holds its part of each.

    [Note: which modules are roots] A root is the module that ``setup_module`` returned. FSDP2 keeps a root's
    parameters whole after ``forward`` until ``backward`` is over, so in between ``parameters()`` shows tensors that no
    optimizer may hold. ``setup_optimizer`` finds them out by resharding.
    """

    def __init__(self, options: Any = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._roots: WeakSet[nn.Module] = WeakSet()
        self._apart: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()

    def init_module(self, empty: bool) -> AbstractContextManager[Any]:
        """Make an empty model on the meta device, so that it is never whole on any rank."""
        return torch.device("meta") if empty else nullcontext()

    def setup_optimizer(self, optimizer: Optimizer, replaced: Mapping[torch.Tensor, torch.Tensor]) -> Optimizer:
        """Put shards in the place of what they were made from, state included."""
        matched = _Replaced(replaced, self._whole())
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        state = {parameter: optimizer.state[parameter] for parameter in held if parameter in optimizer.state}
        replace_parameters(optimizer, matched)
        for old in held:
            new = matched.get(old, old)
            if new is not old and old in state:
                optimizer.state[new] = {name: _like(value, new) for name, value in state[old].items()}
        for group in optimizer.param_groups:
            at_once = [name for name in ("fused", "foreach") if group.get(name)]
            if at_once and len({_layout(parameter) for parameter in group["params"]}) > 1:
                raise SetupError(
                    f"PyTorch's {at_once[0]} {type(optimizer).__name__} takes no parameters of several layouts at once,"
                    " and after sharding some of these are whole, or on another mesh",
                    where="fabric.setup",
                    got=f"{type(optimizer).__name__}({at_once[0]}=True)",
                    instead=f"{type(optimizer).__name__}({at_once[0]}=False)",
                )
        return optimizer

    def _whole(self) -> dict[torch.Tensor, torch.Tensor]:
        """Find parameters that are whole at the moment, with their shards ([Note: which modules are roots])."""
        from torch.distributed.fsdp import FSDPModule

        found: dict[torch.Tensor, torch.Tensor] = {}
        for root in self._roots:
            before = dict(root.named_parameters())
            for module in root.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
            after = dict(root.named_parameters())
            found.update({old: after[name] for name, old in before.items() if after[name] is not old})
        return found

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        """Leave gradients whole and apart inside the context, which takes the memory of whole gradients."""
        return self._unsynchronised(module, enabled=enabled)

    @contextmanager
    def _unsynchronised(self, module: nn.Module, *, enabled: bool) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        before = self._apart.get(module, False)
        if before or not enabled or not isinstance(module, FSDPModule):
            yield
            return
        self._apart[module] = True
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
            self._apart[module] = False

    def clip_grad_norm(
        self,
        parameters: Sequence[torch.Tensor],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> torch.Tensor:
        """Clip to the norm of the whole model, whatever meshes its parameters are on."""
        groups: dict[Any, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                groups.setdefault(_layout(parameter.grad), []).append(parameter)
        norms = [_norm([_grad(one) for one in group], norm_type) for group in groups.values()]
        if not norms:
            return torch.zeros((), device=self.world.device)
        # The p-norm of p-norms is the p-norm; only p = 0 counts, and counts add up.
        stacked = torch.stack([norm.to(self.world.device) for norm in norms])
        total = stacked.sum() if norm_type == 0 else torch.linalg.vector_norm(stacked, norm_type)
        if error_if_nonfinite and not torch.isfinite(total):
            raise RuntimeError(
                f"the total norm of order {norm_type} of the gradients is {total.item()}, so they can't be clipped;"
                " to clip all the same, pass error_if_nonfinite=False"
            )
        for group in groups.values():
            nn.utils.clip_grads_with_norm_(group, max_norm, total)
        return total

    def clip_grad_value(self, parameters: Sequence[torch.Tensor], clip_value: float) -> None:
        """Clip every element, on each rank its own."""
        locals_ = [_local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        for grad in locals_:
            grad.clamp_(-clip_value, clip_value)

    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        """Give whole tensors on rank 0, or every rank's own parts as DTensors."""
        state: dict[str, Any] = module.state_dict()
        return self._gathered(state) if full else state

    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        """Take the own part of each tensor."""
        own = module.state_dict()
        module.load_state_dict(
            {name: _like(value, own[name]) if name in own else value for name, value in state.items()},
            strict=strict,
        )

    def optimizer_state(self, optimizer: Optimizer, full: bool) -> dict[str, Any]:
        """Give whole tensors on rank 0, or every rank's own parts as DTensors."""
        state = optimizer.state_dict()
        if not full:
            return state
        # Gathering is collective, and the order in which states were made may differ between ranks.
        state["state"] = {index: state["state"][index] for index in sorted(state["state"])}
        return self._gathered(state)

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any], full: bool) -> None:
        """Take the own part of each tensor."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        entries = {
            index: {name: _like(value, parameters[int(index)]) for name, value in entry.items()}
            if int(index) < len(parameters)
            else entry
            for index, entry in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": entries})

    def _gathered(self, state: Mapping[Any, Any]) -> dict[Any, Any]:
        """Gather every DTensor of a nesting of dicts; rank 0 gets the tensors on the CPU, the others nothing."""
        from torch.distributed.tensor import DTensor

        result = {}
        for name, value in state.items():
            kept = value
            if isinstance(value, Mapping):
                kept = self._gathered(value)
            elif isinstance(value, DTensor):
                on_device: DTensor = value.detach().to(self.world.device)  # type: ignore[assignment] # stays a DTensor
                kept = on_device.full_tensor()
            if self.world.is_global_zero:
                result[name] = kept.detach().cpu() if isinstance(kept, torch.Tensor) else kept
        return result


class _Replaced(Mapping[torch.Tensor, torch.Tensor]):
    """Several maps of replaced parameters as one; followed until nothing replaces what was found."""

    def __init__(self, *maps: Mapping[torch.Tensor, torch.Tensor]) -> None:
        self._maps = maps

    def __getitem__(self, old: torch.Tensor) -> torch.Tensor:
        for one in self._maps:
            if old in one:
                new = one[old]
                return self.get(new, new)
        raise KeyError(old)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (old for one in self._maps for old in one)

    def __len__(self) -> int:
        return sum(len(one) for one in self._maps)


def _like(value: Any, target: Any) -> Any:
    """Distribute a whole tensor as a parameter of the same shape is; leave anything else."""
    from torch.distributed.tensor import DTensor

    if not isinstance(target, DTensor) or not isinstance(value, torch.Tensor) or isinstance(value, DTensor):
        return value
    if value.shape != target.shape:
        return value
    local = value.detach().to(target.to_local().device)
    return _distribute(local, target)


def _distribute(whole: torch.Tensor, target: Any) -> Any:
    """Cut out this rank's part; without communication, as every rank has the whole."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def _layout(tensor: torch.Tensor) -> Any:
    from torch.distributed.tensor import DTensor

    return tensor.device_mesh if isinstance(tensor, DTensor) else tensor.device


def _norm(grads: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """Give the norm of gradients of one layout."""
    from torch.distributed.tensor import DTensor, Partial

    first = grads[0]
    if not isinstance(first, DTensor):
        return nn.utils.get_total_norm(grads, norm_type)
    if norm_type != math.inf:
        norm: DTensor = nn.utils.get_total_norm(grads, norm_type)  # type: ignore[assignment] # of DTensors is one
        return norm.full_tensor()
    # PyTorch has no largest element of an empty part, which a rank has of a parameter with fewer rows than ranks.
    parts = [part for part in map(_local, grads) if part.numel()]
    largest = nn.utils.get_total_norm(parts, norm_type) if parts else first.to_local().new_zeros(())
    # Backends may lose a NaN in a maximum; that the norm isn't finite must reach every rank.
    largest = largest.nan_to_num(nan=math.inf)
    mesh = first.device_mesh
    return DTensor.from_local(largest, mesh, [Partial("max")] * mesh.ndim).full_tensor()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _grad(parameter: torch.Tensor) -> torch.Tensor:
    if parameter.grad is None:
        raise AssertionError("only parameters with a gradient come here")
    return parameter.grad


def choose_modules(module: nn.Module, policy: ModulePolicy | None, *, option: str) -> list[nn.Module]:
    """Find the modules that a policy names, the innermost first.

    A module that shares a parameter with something outside of it is left out, since it can't be a unit of its own.

    Args:
        module: Where to look; it is never found itself.
        policy: Which modules; ``None`` is none.
        option: The option that the policy is the value of, for messages.

    Raises:
        OptionError: The policy names a class of which there is no module.
    """
    if policy is None:
        return []
    below = [one for name, one in module.named_modules() if name]
    if policy == "auto":
        chosen = repeated_blocks(module)
    elif callable(policy):
        chosen = [one for one in below if policy(one)]
    else:
        chosen = [one for one in below if type(one) in policy or type(one).__name__ in policy]
        there = {type(one) for one in chosen} | {type(one).__name__ for one in chosen}
        absent = [getattr(one, "__name__", str(one)) for one in policy if one not in there]
        if absent:
            raise OptionError(
                f"the model has no {', '.join(sorted(absent))}",
                where=option,
                got=", ".join(sorted({type(one).__name__ for one in below})),
                instead="classes of which the model has modules, or their names",
            )
    users: dict[nn.Parameter, int] = {}
    for one in module.modules():
        for parameter in one.parameters(recurse=False):
            users[parameter] = users.get(parameter, 0) + 1
    return [one for one in reversed(chosen) if _stands_alone(one, users)]


def _stands_alone(module: nn.Module, users: Mapping[nn.Parameter, int]) -> bool:
    inside: dict[nn.Parameter, int] = {}
    for one in module.modules():
        for parameter in one.parameters(recurse=False):
            inside[parameter] = inside.get(parameter, 0) + 1
    return bool(inside) and all(users[parameter] == count for parameter, count in inside.items())


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
    apply: Any = module._apply  # noqa: SLF001 - `to` does this too, and refuses meta tensors
    apply(lambda one: one if one.is_meta else one.to(device))


def materialise(module: nn.Module, device: torch.device, *, kept_on: torch.device) -> None:
    """Make the values of what is on the meta device, module by module: never more than one module's is whole.

    Every rank gets its parts of rank 0's values. With the same seed, they are those of a model that is made whole.

    Args:
        module: The sharded module.
        device: Where the values are made.
        kept_on: Where the parts stay.
    """
    made: dict[torch.Tensor, nn.Parameter] = {}
    for one in _children_first(module, set()):
        names = _on_meta(one)
        parameters = {name: parameter for name, parameter in one.named_parameters(recurse=False) if name in names}
        if not names:
            continue
        if all(parameter in made for parameter in parameters.values()) and len(parameters) == len(names):
            for name, parameter in parameters.items():
                setattr(one, name, made[parameter])
            continue
        for name in names:
            old = getattr(one, name)
            whole = torch.empty(old.shape, dtype=old.dtype, device=device)
            setattr(one, name, nn.Parameter(whole, old.requires_grad) if name in parameters else whole)
        reset = _reset_of(one)
        if reset is None:
            raise AssertionError("check_materialisable comes before")
        reset()
        send_from_zero([getattr(one, name).detach() for name in names], device)
        for name, parameter in parameters.items():
            if parameter not in made:
                part = getattr(one, name).detach()
                if _layout(parameter) != parameter.device:
                    part = _distribute(part, parameter)
                made[parameter] = nn.Parameter(part.to(kept_on), parameter.requires_grad)
            setattr(one, name, made[parameter])


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
    for name in _RESET:
        reset = getattr(module, name, None)
        if callable(reset):
            return reset  # type: ignore[no-any-return]
    return None
