"""What strategies whose parameters are DTensors share: units, materialising, state, clipping, gradient sync."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, Literal
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from fabric_core.contracts import repeated_blocks, replace_parameters
from fabric_core.errors import MisuseError, OptionError, SetupError
from fabric_plugins.strategies._distributed import DistributedStrategy, send_from_zero

__all__ = ["ModulePolicy", "ShardedStrategy", "check_materialisable", "choose_modules", "materialise", "move_to"]

ModulePolicy = Literal["auto"] | set[Any] | Callable[[nn.Module], bool]
"""Which modules: ``"auto"``, a set of classes (or of their names), or a callable that says yes or no to each."""

_RESET: Final = ("reset_parameters", "_reset_parameters")
"""How a module makes its own values; PyTorch's ``MultiheadAttention`` has the second name."""


class ShardedStrategy(DistributedStrategy):
    """Parameters are DTensors after ``setup_module``: each rank holds its part of each.

    [Note: whole units] A unit is what FSDP2 gathers and frees as one. It leaves some whole after ``forward``, until
    ``backward`` is over, and for good where there is none. As long as a unit is whole, ``parameters()`` shows tensors
    that no optimizer may hold, and ``forward`` doesn't see what an optimizer did to the parts. So units are divided
    again before an optimizer looks at them: in ``setup_optimizer``, and before each step.
    """

    def __init__(self, options: Any = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._mesh: Any = None
        self._units: WeakSet[Any] = WeakSet()
        self._apart: WeakSet[nn.Module] = WeakSet()
        """The modules that are inside ``no_backward_sync``."""
        self._held: WeakSet[nn.Module] = WeakSet()
        """The modules that may have gradients which the ranks don't share yet."""

    def teardown(self) -> None:
        """Let go of the groups that the parameters' mesh is made of, then leave."""
        # DTensor remembers how it divided what, for good, and with it each mesh, which owns its groups and so their
        # threads and connections. There is no public way to make either forget.
        getattr(self._mesh, "_pg_registry", {}).clear()
        self._mesh = None
        super().teardown()

    def init_module(self, empty: bool) -> AbstractContextManager[Any]:
        """Make an empty model on the meta device, so that it is never whole on any rank."""
        return torch.device("meta") if empty else nullcontext()

    def setup_optimizer(self, optimizer: Optimizer, replaced: Mapping[torch.Tensor, torch.Tensor]) -> Optimizer:
        """Put shards in the place of what they were made from, state included."""
        replace_parameters(optimizer, _Replaced(replaced, self._divide()), _divided)
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

    def _check_undivided(self, module: nn.Module) -> None:
        """Refuse what another model shares, and what was divided by hand.

        Raises:
            SetupError: A parameter is divided already.
        """
        from torch.distributed.tensor import DTensor

        self._divide()
        divided = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
        if divided:
            raise SetupError(
                "a part of the model is divided among the ranks already, with another model or by hand",
                where="fabric.setup",
                got=", ".join(divided),
                instead="set up one module that holds everything that shares the part; mark its methods with"
                " mark_forward_method",
            )

    def _know(self, module: nn.Module) -> None:
        """Remember the units of a module that was set up."""
        from torch.distributed.fsdp import FSDPModule

        self._units.update(one for one in module.modules() if isinstance(one, FSDPModule))

    def _divide(self) -> dict[torch.Tensor, torch.Tensor]:
        """Divide what is whole, and give the shards of what was ([Note: whole units])."""
        found: dict[torch.Tensor, torch.Tensor] = {}
        for unit in self._units:
            before = dict(unit.named_parameters())
            unit.reshard()
            after = dict(unit.named_parameters())
            found.update({old: after[name] for name, old in before.items() if after[name] is not old})
        return found

    def backward(self, loss: torch.Tensor, arguments: Mapping[str, Any]) -> None:
        """Run the backward pass, and know of gradients that it leaves apart."""
        super().backward(loss, arguments)
        self._held |= self._apart

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step on shards ([Note: whole units]).

        Raises:
            MisuseError: The gradients of a model are still apart.
            SetupError: The optimizer can't step on shards.
        """
        if closure is None:
            self._ready(optimizer)
            try:
                return super().optimizer_step(optimizer, None)
            except RuntimeError as error:
                if "sharding" not in str(error).lower():
                    raise
                kind = type(optimizer).__name__
                raise SetupError(
                    f"PyTorch's DTensor can't do on divided parameters what {kind} does",
                    where=f"{kind}.step",
                    got=str(error).splitlines()[0],
                    instead="fused=False where the optimizer is fused, or another optimizer; AdamW and SGD always work",
                ) from error
        evaluate = closure

        def evaluated() -> Any:
            loss = evaluate()
            self._ready(optimizer)
            return loss

        return super().optimizer_step(optimizer, evaluated)

    def _ready(self, optimizer: Optimizer) -> None:
        """Divide what is whole, and make sure that no gradients are held back."""
        for unit in self._units:
            unit.reshard()
        for module in list(self._held):
            own = set(module.parameters())
            if any(one.grad is not None for one in own):
                self._held.discard(module)
            elif any(one in own for group in optimizer.param_groups for one in group["params"]):
                raise MisuseError(
                    "every rank still has gradients of its own, and no sum of them to step on",
                    where=f"{type(optimizer).__name__}.step",
                    instead="fabric.backward outside of fabric.no_backward_sync before each step, the last at least",
                )

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Leave gradients whole and apart inside the context, which takes the memory of whole gradients.

        Where the precision scales the loss, each pass shares its gradients: FSDP2 keeps those that are apart where
        nobody else can reach them, so they would stay at the scale of their own loss when the scale changes.
        """
        from torch.distributed.fsdp import FSDPModule

        if not enabled or self._policy.loss_scaling or module in self._apart or not isinstance(module, FSDPModule):
            yield
            return
        self._apart.add(module)
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
            self._apart.discard(module)

    def clip_grad_norm(
        self,
        parameters: Sequence[torch.Tensor],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> torch.Tensor:
        """Clip to the norm of the whole model, whatever meshes its parameters are on."""
        _add_up(parameters)
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
        _add_up(parameters)
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
            index: {name: _divided(name, value, parameters[int(index)]) for name, value in entry.items()}
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


def _divided(name: str, value: Any, parameter: torch.Tensor) -> Any:
    """Divide an optimizer's state as its parameter is.

    Raises:
        SetupError: Nobody can tell how it is divided.
    """
    result = _like(value, parameter)
    if result is value and type(value) in _WHOLE and value.dim() > 0 and _layout(parameter) != parameter.device:
        raise SetupError(
            f"the optimizer's state {name!r} can't be divided among the ranks: it is neither a single number nor of its"
            " parameter's shape",
            where="the state of an optimizer, under a strategy that shards parameters",
            got=f"shape {tuple(value.shape)} for a parameter of shape {tuple(parameter.shape)}",
            instead="an optimizer without such state, or begin with a fresh one",
        )
    return result


_WHOLE: Final = frozenset({torch.Tensor, nn.Parameter})


def _distribute(whole: torch.Tensor, target: Any) -> Any:
    """Cut out this rank's part; without communication, as every rank has the whole."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)


def _layout(tensor: torch.Tensor) -> Any:
    from torch.distributed.tensor import DTensor

    return tensor.device_mesh if isinstance(tensor, DTensor) else tensor.device


def _add_up(parameters: Sequence[torch.Tensor]) -> None:
    """Make gradients that are sums yet to be added up, as sequence parallelism leaves them, into whole ones."""
    from torch.distributed.tensor import DTensor, Replicate

    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor) and any(one.is_partial() for one in grad.placements):
            added = [Replicate() if one.is_partial() else one for one in grad.placements]
            parameter.grad = grad.redistribute(placements=added)


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

    Where a module's ``reset_parameters`` fills more than its own, that is whole for the time. Every rank gets its parts
    of rank 0's values. With the same seed, they are those of a model that is made whole, if each module's constructor
    ends with its ``reset_parameters`` and nothing else draws values.

    Args:
        module: The sharded module.
        device: Where the values are made.
        kept_on: Where the parts stay.

    Raises:
        SetupError: A ``reset_parameters`` leaves something unset.
    """
    made: dict[torch.Tensor, nn.Parameter] = {}
    hollow = {one for one in module.modules() if any(_on_meta(part) for part in one.modules())}
    names_of = {one: name or "the model" for name, one in module.named_modules()}
    for one in _children_first(module, set()):
        reset = _reset_of(one)
        if one not in hollow or reset is None:
            continue
        names = _on_meta(one)
        parameters = {name: parameter for name, parameter in one.named_parameters(recurse=False) if name in names}
        empty = {}
        for name in names:
            old = getattr(one, name)
            whole = _unset(old, device)
            empty[name] = nn.Parameter(whole, old.requires_grad) if name in parameters else whole
            setattr(one, name, empty[name])
        with device, _OnWholes(device) as wholes:
            reset()
        wholes.divide()
        unset = [name for name, tensor in empty.items() if getattr(one, name) is tensor and _is_unset(tensor)]
        if unset:
            raise SetupError(
                f"{reset.__name__} leaves {', '.join(unset)} without values",
                where=f"{names_of[one]} ({type(one).__name__})",
                instead="fill every parameter and buffer there; or fabric.init_module(empty_init=False)",
            )
        send_from_zero([getattr(one, name).detach() for name in names], device)
        for name, parameter in parameters.items():
            if parameter not in made:
                part = getattr(one, name).detach()
                if _layout(parameter) != parameter.device:
                    part = _distribute(part, parameter)
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
    return tensor.numel() > 0 and tensor._version == 0  # noqa: SLF001 - PyTorch documents it in its notes on autograd


class _OnWholes(TorchFunctionMode):
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

    def divide(self) -> None:
        """Give each rank its part of what was filled."""
        send_from_zero(self._wholes.values(), self._device)
        for parameter, whole in self._wholes.items():
            parameter.detach().to_local().copy_(_distribute(whole, parameter).to_local())


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
