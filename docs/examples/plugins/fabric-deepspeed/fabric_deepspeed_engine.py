"""An engine of DeepSpeed: its gradients, and its states whole, as PyTorch has them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer


class Engine:
    """An engine, and what was given to it.

    Args:
        engine: DeepSpeed's engine.
        optimizer: The user's optimizer, whose parameters are DeepSpeed's flat parts by now.
        trained: The model's own parameters in each of the optimizer's groups.
    """

    def __init__(self, engine: Any, optimizer: Optimizer, trained: Sequence[Sequence[nn.Parameter]]) -> None:
        self.engine = engine
        self.optimizer = optimizer
        self.trained = trained
        self.clip = float(engine.gradient_clipping())
        self.skipping = False
        self.averaged = False
        self.waiting = False

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the model's own parameters, in the order of the optimizer's state."""
        return (one for group in self.trained for one in group)

    def held(self) -> set[int]:
        """Give the identities of the model's own parameters, and of the parts that the optimizer has by now."""
        parts = (each for group in self.optimizer.param_groups for each in group["params"])
        return {id(one) for one in (*parts, *self.parameters())}

    def clear(self) -> None:
        """Forget gradients, and those of passes that were accumulated, which DeepSpeed's own ``zero_grad`` keeps."""
        zero = self.engine.optimizer
        zero.zero_grad()
        if _stage(self.engine) != 3:  # noqa: PLR2004
            from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID

            zero.micro_step_id = INITIAL_MICRO_STEP_ID
            zero.all_grad_tensors.clear()
            zero.averaged_gradients.clear()
        self.averaged, self.waiting, zero.clip_grad = False, False, self.clip

    def gradients(self) -> Iterator[torch.Tensor]:
        """Give whole averaged gradients."""
        from deepspeed.utils import safe_get_full_grad

        return (gradient for one in self.parameters() if (gradient := safe_get_full_grad(one)) is not None)

    def _flat(self) -> Mapping[str, Any]:
        """Give the state of one of DeepSpeed's flat parts: all have the same names in it, and count the same steps."""
        return next(iter(self.optimizer.state.values()), {})

    def optimizer_state(self) -> dict[str, Any]:
        """Assemble whole states from the parts of all ranks."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = self._flat()
        whole = [name for name, value in flat.items() if isinstance(value, torch.Tensor) and value.dim() > 0]
        single = {name: value for name, value in flat.items() if name not in whole}
        state, groups, index = {}, [], 0
        for own, parameters in zip(self.optimizer.param_groups, self.trained, strict=True):
            rest = {name: value for name, value in own.items() if name != "params"}
            groups.append({**rest, "params": list(range(index, index + len(parameters)))})
            for parameter in parameters:
                if flat:
                    parts = {name: safe_get_full_optimizer_state(parameter, name) for name in whole}
                    state[index] = {**_copied(single), **_copied(parts)}
                index += 1
        return {"state": state, "param_groups": groups}

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Divide whole states over the ranks."""
        for own, saved in zip(self.optimizer.param_groups, state["param_groups"], strict=True):
            own.update({name: value for name, value in saved.items() if name != "params"})
        if not state["state"]:
            return
        self._make_room(next(iter(state["state"].values())))
        for index, parameter in enumerate(self.parameters()):
            for name, value in state["state"].get(index, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    set_whole(parameter, value, name)

    def _make_room(self, entry: Mapping[str, Any]) -> None:
        """Give a fresh optimizer the entries that it makes at its first step, which DeepSpeed writes into."""
        zero = self.engine.optimizer
        parts = zero.fp32_partitioned_groups_flat if _stage(self.engine) == 3 else zero.single_partition_of_fp32_groups  # noqa: PLR2004
        for part in parts:
            own = self.optimizer.state[part]
            for name, value in entry.items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    own.setdefault(name, torch.zeros_like(part))
                else:
                    own[name] = value.clone() if isinstance(value, torch.Tensor) else value
        if _stage(self.engine) != 3:  # noqa: PLR2004
            zero._lazy_init_hp_params_optimizer_state()  # noqa: SLF001 - it does so itself, after a step


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
