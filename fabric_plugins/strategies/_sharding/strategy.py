"""What strategies whose parameters are DTensors share: state, clipping, gradient synchronization."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts import replace_parameters
from fabric_core.errors import MisuseError, SetupError
from fabric_plugins._torch import clear_groups, clear_unsynchronized, unsynchronized
from fabric_plugins.strategies._distributed import DistributedStrategy
from fabric_plugins.strategies._sharding.tensors import (
    divided,
    grad_of,
    layout,
    like,
    local_part,
    norm_of,
    reduce_partial_gradients,
)

__all__ = ["ShardedStrategy"]


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
        self._no_sync: WeakSet[nn.Module] = WeakSet()
        """The modules that are inside ``no_backward_sync``."""

    def teardown(self) -> None:
        """Let go of the groups that the parameters' mesh is made of, then leave."""
        if self._mesh is not None:
            clear_groups(self._mesh)
        self._mesh = None
        super().teardown()

    def init_module(self, empty: bool) -> AbstractContextManager[Any]:
        """Make an empty model on the meta device, so that it is never whole on any rank."""
        return torch.device("meta") if empty else nullcontext()

    def setup_optimizer(self, optimizer: Optimizer, replaced: Mapping[torch.Tensor, torch.Tensor]) -> Optimizer:
        """Put shards in the place of what they were made from, state included."""
        replace_parameters(optimizer, _Replaced(replaced, self._reshard()), divided)
        for group in optimizer.param_groups:
            at_once = [name for name in ("fused", "foreach") if group.get(name)]
            if at_once and len({layout(parameter) for parameter in group["params"]}) > 1:
                raise SetupError(
                    f"PyTorch's {at_once[0]} {type(optimizer).__name__} takes no parameters of several layouts at once,"
                    " and after sharding some of these are whole, or on another mesh",
                    where="fabric.setup",
                    got=f"{type(optimizer).__name__}({at_once[0]}=True)",
                    instead=f"{type(optimizer).__name__}({at_once[0]}=False)",
                )
        return optimizer

    def _check_undivided(self, module: nn.Module) -> None:
        """Refuse what another model shares, and what is divided already.

        Raises:
            SetupError: A parameter is divided already.
        """
        from torch.distributed.tensor import DTensor

        self._reshard()
        divided = [name for name, parameter in module.named_parameters() if isinstance(parameter, DTensor)]
        if divided:
            raise SetupError(
                "a part of the model is divided among the ranks already, with another model or by your own code",
                where="fabric.setup",
                got=", ".join(divided),
                instead="set up one module that holds everything that shares the part; mark its methods with"
                " mark_forward_method",
            )

    def _track_units(self, module: nn.Module) -> None:
        """Remember the units of a module that was set up."""
        from torch.distributed.fsdp import FSDPModule

        self._units.update(one for one in module.modules() if isinstance(one, FSDPModule))

    def _reshard(self) -> dict[torch.Tensor, torch.Tensor]:
        """Divide what is whole, and give the shards of what was ([Note: whole units])."""
        found: dict[torch.Tensor, torch.Tensor] = {}
        for unit in self._units:
            before = dict(unit.named_parameters())
            unit.reshard()
            after = dict(unit.named_parameters())
            found.update({old: after[name] for name, old in before.items() if after[name] is not old})
        return found

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the backward pass.

        Raises:
            MisuseError: Some parameters alone were asked for.
        """
        if arguments.get("inputs") is not None:
            raise MisuseError(
                "sharded parameters can't be named as inputs of a backward pass: what forward ran on were whole ones",
                where="fabric.backward(inputs=)",
                instead="requires_grad_(False) on the other parameters before the forward pass",
            )
        super().backward(loss, module, arguments)

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step on shards ([Note: whole units]).

        Raises:
            MisuseError: Gradients were not reduced over the ranks.
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
        left = {id(one) for unit in self._units for one in unsynchronized(unit)}
        if left and any(id(one) in left for group in optimizer.param_groups for one in group["params"]):
            raise MisuseError(
                "the gradients are not synchronized",
                where=f"{type(optimizer).__name__}.step",
                instead="run the last forward and fabric.backward before each step outside fabric.no_backward_sync,"
                " through the model that fabric.setup returned; clear gradients by its zero_grad or the optimizer's",
            )

    def gradients_cleared(self, parameters: Sequence[torch.Tensor]) -> None:
        """Clear what FSDP2 has kept of gradients that were not synchronized."""
        held = {id(one) for one in parameters}
        for unit in self._units:
            clear_unsynchronized(unit, held)

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Skip gradient synchronization inside the context, which takes the memory of whole gradients.

        Where the precision scales the loss, each pass synchronizes: FSDP2 keeps unsynchronized gradients where nobody
        else can reach them, so they would stay at the scale of their own loss when the scale changes.
        """
        from torch.distributed.fsdp import FSDPModule

        if not enabled or self._policy.loss_scaling or module in self._no_sync or not isinstance(module, FSDPModule):
            yield
            return
        self._no_sync.add(module)
        module.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            module.set_requires_gradient_sync(True)
            self._no_sync.discard(module)

    def clip_grad_norm(
        self,
        parameters: Sequence[torch.Tensor],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
    ) -> torch.Tensor:
        """Clip to the norm of the whole model, whatever meshes its parameters are on."""
        reduce_partial_gradients(parameters)
        groups: dict[Any, list[torch.Tensor]] = {}
        for parameter in parameters:
            if parameter.grad is not None:
                groups.setdefault(layout(parameter.grad), []).append(parameter)
        norms = [norm_of([grad_of(one) for one in group], norm_type) for group in groups.values()]
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
        reduce_partial_gradients(parameters)
        locals_ = [local_part(parameter.grad) for parameter in parameters if parameter.grad is not None]
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
            {name: like(value, own[name]) if name in own else value for name, value in state.items()},
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
            index: {name: divided(name, value, parameters[int(index)]) for name, value in entry.items()}
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
