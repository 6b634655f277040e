"""An engine of DeepSpeed: its gradients, and its states whole, as PyTorch has them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from fabric_deepspeed_process import forget_stage_3
from torch import nn
from torch.optim import Optimizer

from fabric_core.errors import MisuseError


class Engine:
    """An engine, and what was given to it.

    Args:
        engine: DeepSpeed's engine.
        optimizer: The user's optimizer, whose parameters are DeepSpeed's flat parts by now.
        trained: The model's own parameters in each of the optimizer's groups.
        zero_unused: Let a parameter that no rank used step with a gradient of zero.
    """

    def __init__(
        self, engine: Any, optimizer: Optimizer, trained: Sequence[Sequence[nn.Parameter]], *, zero_unused: bool
    ) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.trained = trained
        self.zero_unused = zero_unused
        self.waiting = False
        self.averaged = False
        self._retained = False
        self._before: list[torch.Tensor] = []  # averaged, and perhaps clipped, before further backward passes
        self._used: set[int] = set()
        self._hooks = [
            one.register_hook(partial(self._use, index))  # type: ignore[no-untyped-call]
            for index, one in enumerate(self.parameters())
            if one.requires_grad
        ]

    def _use(self, index: int, _gradient: torch.Tensor) -> None:
        self._used.add(index)

    def close(self) -> None:
        """End the engine."""
        for hook in self._hooks:
            hook.remove()
        if _stage(self.engine) == 3:  # noqa: PLR2004
            forget_stage_3(set(self.engine.modules()))
        self.engine.destroy()

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the model's own parameters, in the order of the optimizer's state."""
        return (one for group in self.trained for one in group)

    def held(self) -> set[int]:
        """Give the identities of the model's own parameters, and of the parts that the optimizer has by now."""
        parts = (each for group in self.optimizer.param_groups for each in group["params"])
        return {id(one) for one in (*parts, *self.parameters())}

    def backward(self, loss: torch.Tensor, *, retain_graph: bool) -> None:
        """Accumulate: DeepSpeed averages what is gathered when it is told that a step comes."""
        if self.averaged:
            self._before = [part.clone() for part in self._parts()]
            self._forget()
        self.engine.optimizer.clear_backward_seen_flag()  # else of two passes after one forward pass, one counts
        self.averaged, self.waiting = False, True
        self.engine.set_gradient_accumulation_boundary(False)
        with self._whole() if self._retained else nullcontext():
            self.engine.backward(loss, retain_graph=retain_graph)
        self._retained = retain_graph

    def _whole(self) -> AbstractContextManager[Any]:
        """Give parameters that are divided whole: stage 3 does so itself in the first pass through a graph alone."""
        import deepspeed

        whole: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(self.engine.module.parameters()))
        return whole

    def average(self) -> None:
        """Average what was accumulated, if anything.

        Raises:
            MisuseError: There is a parameter that no rank used, which DeepSpeed steps with a gradient of zero.
        """
        if not self.waiting:
            return
        self._check_used()
        self.engine.set_gradient_accumulation_boundary(True)
        for master in self._masters() if self.engine.zero_cpu_offload() else ():
            if master.grad is None:  # the optimizer's zero_grad took it, and DeepSpeed writes into it
                master.grad = torch.zeros_like(master)
        if _stage(self.engine) == 1:
            self.engine.allreduce_gradients()
        else:
            self.engine.optimizer.finalize_gradient_accumulation_boundary()
        self.averaged, self.waiting = True, False
        for part, before in zip(self._parts(), self._before, strict=bool(self._before)):
            part.add_(before)
        self._before = []

    def _check_used(self) -> None:
        if self.zero_unused:
            return
        used = [not one.requires_grad or index in self._used for index, one in enumerate(self.parameters())]
        everywhere = torch.tensor(used, dtype=torch.uint8, device=self.engine.device)
        dist.all_reduce(everywhere, op=dist.ReduceOp.MAX)
        if everywhere.all():
            return
        own = dict(zip(map(id, self.parameters()), everywhere.tolist(), strict=True))
        unused = [
            name.removeprefix("module.") for name, one in self.engine.module.named_parameters() if own.get(id(one)) == 0
        ]
        raise MisuseError(
            "no rank used a parameter since the last step, and DeepSpeed steps it with a gradient of zero, by which "
            "decay and momentum move it",
            where="optimizer.step",
            got=", ".join(unused),
            instead="unused.requires_grad_(False) before fabric.setup, or DeepSpeedStrategy(zero_unused=True)",
        )

    def step(self) -> None:
        """Average, and step, where there are gradients."""
        self.average()
        if self.averaged:
            self.engine.step()
        self._used.clear()
        self.averaged = self._retained = False

    def clear(self) -> None:
        """Forget gradients, and those of passes that were accumulated, which DeepSpeed's own ``zero_grad`` keeps."""
        self._forget()
        self._used.clear()
        self._before = []
        self.averaged = self.waiting = self._retained = False

    def _forget(self) -> None:
        zero = self.engine.optimizer
        zero.zero_grad()
        if _stage(self.engine) != 3:  # noqa: PLR2004
            from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

            zero.micro_step_id = INITIAL_MICRO_STEP_ID
            zero.all_grad_tensors.clear()
            zero.averaged_gradients.clear()

    def _parts(self) -> list[torch.Tensor]:
        """Give this rank's parts of the averaged gradients, which the engine steps on; what pads them is zero."""
        if not self.averaged:
            return []
        zero = self.engine.optimizer
        if self.engine.zero_cpu_offload():
            return [one.grad for one in self._masters() if one.grad is not None]
        return [part for parts in zero.averaged_gradients.values() for part in parts or ()]

    def _masters(self) -> Sequence[torch.Tensor]:
        """Give this rank's parts of the parameters in 32 bits, which the optimizer steps."""
        zero = self.engine.optimizer
        masters: Sequence[torch.Tensor] = (
            zero.fp32_partitioned_groups_flat if _stage(self.engine) == 3 else zero.single_partition_of_fp32_groups  # noqa: PLR2004
        )
        return masters

    def _scale(self) -> float:
        """Give the factor by which DeepSpeed scales a loss of 16 bits, and unscales gradients as it steps."""
        return float(self.engine.optimizer.loss_scale)

    def clip_norm(self, max_norm: float, norm_type: float, *, error_if_nonfinite: bool) -> torch.Tensor:
        """Average, and scale the gradients that the engine steps on; give the norm before."""
        self.average()
        parts, largest = self._parts(), norm_type == float("inf")
        norms = torch.stack(
            [torch.zeros((), device=self.engine.device)]
            + [torch.linalg.vector_norm(part.float(), norm_type).to(self.engine.device) for part in parts]
        )
        total = norms.max() if largest else norms.pow(norm_type).sum()
        dist.all_reduce(total, op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM)
        norm = (total if largest else total.pow(1 / norm_type)) / self._scale()
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(f"The total norm of order {norm_type} of the gradients is {norm.item()}, not finite")
        factor = (max_norm / (norm + 1e-6)).clamp(max=1)
        for part in parts:
            part.mul_(factor.to(part.device))
        return norm

    def clip_value(self, value: float) -> None:
        """Average, and clip each element of the gradients that the engine steps on."""
        self.average()
        for part in self._parts():
            part.clamp_(-value * self._scale(), value * self._scale())

    def _flat(self) -> Mapping[str, Any]:
        """Give the state of one of DeepSpeed's flat parts: all have the same names in it, and count the same steps."""
        return next(iter(self.optimizer.state.values()), {})

    def optimizer_state(self) -> dict[str, Any]:
        """Assemble whole states from the parts of all ranks."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = self._flat()
        self._link()
        whole = [name for name, value in flat.items() if isinstance(value, torch.Tensor) and value.dim() > 0]
        single = {name: value for name, value in flat.items() if name not in whole}
        state, groups, index = {}, [], 0
        for own, parameters in zip(self.optimizer.param_groups, self.trained, strict=True):
            rest = {name: value for name, value in own.items() if name != "params"}
            groups.append({**rest, "params": list(range(index, index + len(parameters)))})
            for parameter in parameters:
                if flat and parameter.requires_grad:
                    parts = {name: safe_get_full_optimizer_state(parameter, name) for name in whole}
                    state[index] = {**_copied(single), **_copied(parts)}
                index += 1
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Divide whole states over the ranks."""
        for own, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            own.update({name: value for name, value in saved.items() if name != "params"})
        self._make_room(next(iter(state["state"].values()), {}))
        for index, parameter in enumerate(self.parameters()):
            for name, value in state["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    set_whole(parameter, value, name)

    def _make_room(self, entry: Mapping[str, Any]) -> None:
        """Replace the optimizer's state by entries as it makes them at its first step, which DeepSpeed writes into."""
        self.optimizer.state.clear()
        for part in self._masters() if entry else ():
            self.optimizer.state[part] = {
                name: torch.zeros_like(part) if isinstance(value, torch.Tensor) and value.dim() > 0 else deepcopy(value)
                for name, value in entry.items()
            }
        self._link()

    def _link(self) -> None:
        """Let DeepSpeed find each parameter's part of the optimizer's state.

        It does so itself after the first group of parameters has stepped, and so finds that of no other group.
        """
        zero = self.engine.optimizer
        if _stage(self.engine) != 3:  # noqa: PLR2004
            zero._hp_optimizer_states_linked = False  # noqa: SLF001
            zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001


def _stage(engine: Any) -> int:
    return int(engine.zero_optimization_stage())


def set_whole(parameter: nn.Parameter, value: torch.Tensor, name: str | None = None) -> None:
    """Write a whole tensor into what the engine keeps of a parameter, of which this rank has a part.

    Args:
        parameter: The model's parameter.
        value: The tensor, of the parameter's whole shape.
        name: The entry of the optimizer's state; ``None`` is the parameter in 32 bits.
    """
    from deepspeed import utils

    value = value.to(parameter.device, torch.float32).flatten()
    if not hasattr(parameter, "ds_id"):  # stages 1 and 2, which divide without regard to parameters
        value = value.view(parameter.shape)
        if name is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, name)
        return
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    padded = nn.functional.pad(value, (0, size * dist.get_world_size() - value.numel()))
    part = padded.narrow(0, size * dist.get_rank(), size)
    if name is None:
        utils.safe_set_local_fp32_param(parameter, part)
    else:
        utils.safe_set_local_optimizer_state(parameter, part, name)


def _copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone().cpu() if isinstance(value, torch.Tensor) else value
        for name, value in entry.items()
    }
