"""The strategies of DeepSpeed: ZeRO, by the real engine, which owns the backward pass, clipping and the step."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts import (
    Collectives,
    PluginOptions,
    PrecisionPolicy,
    Preset,
    ProcessGroup,
    Strategy,
    StrategyCapabilities,
    World,
)
from fabric_core.errors import MisuseError, RequestError, SetupError, UnavailableError

_LONGEST_COMPILATION: Final = 900.0
"""Seconds after which who compiles DeepSpeed's communication is taken for killed: on busy cores it takes minutes."""


class DeepSpeedOptions(PluginOptions):
    """The options of the strategy ``deepspeed``."""

    stage: Literal[1, 2, 3] = 2
    """What ZeRO divides over the ranks: optimizer states; gradients too; parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in the memory of the host."""
    config: dict[str, Any] = Field(default_factory=dict)
    """More of DeepSpeed's configuration; what is said here wins."""


class DeepSpeedStrategy(Strategy):
    """DeepSpeed's engine around each model, with the optimizer that is set up with it.

    Saved in one file are whole parameters and optimizer states under the names that PyTorch gives them, so that a
    checkpoint goes from and to any other strategy.
    """

    Options = DeepSpeedOptions
    options: DeepSpeedOptions
    capabilities = StrategyCapabilities(
        distributed=True,
        sharded=True,
        joint_setup=True,
        intercepts_forward=True,
        requires_strategy_backward=True,
        multiple_optimizers=False,
        loss_scaling=False,
        no_backward_sync=True,
    )

    def __init__(self, options: DeepSpeedOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._engines: list[_Engine] = []

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join the other ranks, and let DeepSpeed use the same process group.

        Raises:
            UnavailableError: DeepSpeed would wait for a compilation that was killed.
        """
        self._world, self._policy = world, policy
        deepspeed = _deepspeed(world.device.type)
        if world.device.type == "cpu":
            _wait_for_compilation()
        world.closing.callback(_forget_groups)  # it runs after what ProcessGroup enters there
        self._group = ProcessGroup(world)
        deepspeed.init_distributed(dist_backend=world.backend, dist_init_required=False, verbose=False)
        return self._group

    def teardown(self) -> None:
        """End the engines."""
        while self._engines:
            self._engines.pop().engine.destroy()

    def setup_jointly(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[nn.Module, list[Optimizer]]:
        """Make an engine of a model and its optimizer; a model without one is only run.

        Raises:
            SetupError: The model has something to train, and no optimizer.
        """
        tensors = [one.detach() for one in (*module.parameters(), *module.buffers())]
        self._group.broadcast_tensors(tensors, 0)
        if not optimizers:
            if any(one.requires_grad for one in module.parameters()):
                raise SetupError(
                    "DeepSpeed trains a model together with its optimizer, and none was given",
                    where="fabric.setup",
                    instead="fabric.setup(model, optimizer), or model.requires_grad_(False) for one that is only run",
                )
            return module, []
        (optimizer,) = optimizers
        trained = [list(group["params"]) for group in optimizer.param_groups]
        engine, *_ = _deepspeed(self._world.device.type).initialize(
            model=module, optimizer=optimizer, config=self._config(), dist_init_required=False
        )
        self._engines.append(_Engine(engine, optimizer, trained))
        return engine, [optimizer]

    def _config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.options.stage}
        if self.options.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self._world.device.type != "cpu"}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # it only counts samples with it
            "gradient_accumulation_steps": 1,  # a pass outside of no_backward_sync ends an accumulation
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": self._policy.param_dtype == torch.bfloat16},
            "fp16": {"enabled": self._policy.param_dtype == torch.float16},
        }
        return _merged(config, self.options.config)

    def engine(self, module: nn.Module) -> Any:
        """Give DeepSpeed's engine of a model that was set up, for what only it can do.

        Raises:
            MisuseError: There is none.
        """
        return self._of(module).engine

    def _of(self, module: nn.Module) -> "_Engine":
        bare = getattr(module, "module", module)
        for one in self._engines:
            if module is one.engine or bare in (one.engine, *one.engine.modules()):
                return one
        raise MisuseError(
            "DeepSpeed has no engine of this model",
            where="the strategy deepspeed",
            got=type(module).__name__,
            instead="model, optimizer = fabric.setup(model, optimizer)",
        )

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Let the engine run it, and average what was accumulated, unless inside ``no_backward_sync``.

        Raises:
            MisuseError: Several models are set up, and it isn't said which of them the loss came from; or gradients
                were averaged already, and wait for a step.
        """
        if module is None:
            raise MisuseError(
                "several models are set up, and each has an engine of its own",
                where="fabric.backward",
                instead="fabric.backward(loss, model=model)",
            )
        given = dict(arguments)
        retain = bool(given.pop("retain_graph", False))
        weight = given.pop("gradient", None)
        if any(value for value in given.values()):
            raise RequestError(
                "DeepSpeed's backward pass does not take these arguments",
                where="fabric.backward",
                got=", ".join(sorted(given)),
                instead="retain_graph=, gradient=",
            )
        one = self._of(module)
        if one.averaged:
            raise MisuseError(
                "DeepSpeed averages gradients once for each step, and did so for this step",
                where="fabric.backward",
                instead="with fabric.no_backward_sync(model): around every backward pass but the last before a step",
            )
        one.averaged = not one.skipping
        one.engine.set_gradient_accumulation_boundary(one.averaged)
        one.engine.backward(loss if weight is None else (loss * weight).sum(), retain_graph=retain)

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Let the engine accumulate inside the context."""
        one = self._of(module)
        before, one.skipping = one.skipping, one.skipping or enabled
        try:
            yield
        finally:
            one.skipping = before

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Let the engine clip, step, and clear the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        one = next(one for one in self._engines if one.optimizer is optimizer)
        if one.averaged:
            one.engine.step()
        one.averaged, one.engine.optimizer.clip_grad = False, one.clip
        return loss

    def clip_grad_norm(
        self, parameters: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        """Let the engine clip in its next step; give the norm.

        Raises:
            RequestError: It is another norm than the one that DeepSpeed has.
        """
        if norm_type != 2:  # noqa: PLR2004 - the Euclidean norm
            raise RequestError(
                "DeepSpeed clips by the Euclidean norm", where="fabric.clip_gradients(norm_type=)", got=norm_type,
                instead="norm_type=2",
            )  # fmt: skip
        one = self._holding(parameters)
        gradients = [gradient.float() for gradient in one.gradients()]
        norm = nn.utils.get_total_norm(gradients, 2.0, error_if_nonfinite) if gradients else torch.zeros(())
        one.engine.optimizer.clip_grad = max_norm
        return norm

    def clip_grad_value(self, parameters: Sequence[torch.Tensor], clip_value: float) -> None:
        """Clip every element of the gradients, which the engine holds in parts."""
        from deepspeed.utils import safe_get_full_grad, safe_set_full_grad

        for parameter in self._holding(parameters).parameters():
            gradient = safe_get_full_grad(parameter)
            if gradient is not None:
                safe_set_full_grad(parameter, gradient.clamp(-clip_value, clip_value))

    def _holding(self, parameters: Sequence[torch.Tensor]) -> "_Engine":
        if len(self._engines) == 1:
            return self._engines[0]
        wanted = {id(one) for one in parameters}
        for one in self._engines:
            held = {id(each) for group in one.optimizer.param_groups for each in group["params"]}
            if wanted & (held | {id(each) for each in one.parameters()}):
                return one
        raise MisuseError(
            "several models are set up, and DeepSpeed hides which of them the optimizer trains",
            where="fabric.clip_gradients",
            instead='DeepSpeedStrategy(config={"gradient_clipping": 1.0})',
        )

    # State

    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        """Give whole tensors, on every rank: each rank's own parts have no names outside of DeepSpeed."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters())):
            state = module.state_dict()
            return {
                name: value.detach().clone().cpu() if isinstance(value, torch.Tensor) else value
                for name, value in state.items()
            }

    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        """Load whole tensors, into the parameters and into what the engine keeps of them."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0):
            module.load_state_dict(state, strict=strict)
        for name, parameter in module.named_parameters():
            if name in state and parameter.requires_grad:
                set_whole(parameter, state[name])

    def optimizer_state(self, optimizer: Optimizer, full: bool) -> dict[str, Any]:
        """Give whole states, in PyTorch's form, on every rank."""
        one = next(one for one in self._engines if one.optimizer is optimizer)
        return one.optimizer_state()

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any], full: bool) -> None:
        """Load whole states, in PyTorch's form."""
        one = next(one for one in self._engines if one.optimizer is optimizer)
        one.load_optimizer_state(state)


class _Engine:
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

    def parameters(self) -> Iterator[nn.Parameter]:
        """Give the model's own parameters, in the order of the optimizer's state."""
        return (one for group in self.trained for one in group)

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


def _deepspeed(device_type: str) -> Any:
    """Import DeepSpeed, which chooses its hardware by itself, and correct its choice."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if device_type == "cpu" and get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
    return deepspeed


def _wait_for_compilation() -> None:
    """Wait while another process compiles DeepSpeed's communication, but not for one that was killed.

    PyTorch itself waits until the lock is gone, without an end and without a word, and a killed process leaves it.

    Raises:
        UnavailableError: The lock is older than any compilation.
    """
    from torch.utils.cpp_extension import get_default_build_root

    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    folders = [Path(given)] if given else Path(get_default_build_root()).glob(f"{version}*")
    for lock in [folder / "deepspeed_shm_comm" / "lock" for folder in folders]:
        with suppress(FileNotFoundError):  # as long as it is there
            while (age := time.time() - lock.stat().st_mtime) < _LONGEST_COMPILATION:
                time.sleep(0.1)
            raise UnavailableError(
                "DeepSpeed's communication can't be compiled: an earlier compilation was killed, and left its lock",
                where=str(lock),
                got=f"a lock from {age:.0f} seconds ago",
                instead=f"rm {lock}, unless something compiles it right now",
            )


def _forget_groups() -> None:
    """Let DeepSpeed forget the groups that it keeps for the process, once they are gone: a new Fabric makes new ones.

    It does so itself only where it is asked to end PyTorch's default group, which others may use.
    """
    from deepspeed.utils import groups

    if not dist.is_initialized():
        groups._release_process_group_references(group=None)  # noqa: SLF001


def _merged(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    both = {**ours, **theirs}
    return {
        name: _merged(ours[name], value)
        if isinstance(value, Mapping) and isinstance(ours.get(name), Mapping)
        else value
        for name, value in both.items()
    }


def _copied(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value.detach().clone().cpu() if isinstance(value, torch.Tensor) else value
        for name, value in entry.items()
    }


STAGE_1: Final = Preset.of(DeepSpeedStrategy, stage=1)
"""The alias ``deepspeed_stage_1``: optimizer states are divided."""

STAGE_2: Final = Preset.of(DeepSpeedStrategy, stage=2)
"""The alias ``deepspeed_stage_2``: gradients too."""

STAGE_3: Final = Preset.of(DeepSpeedStrategy, stage=3)
"""The alias ``deepspeed_stage_3``: parameters too."""
