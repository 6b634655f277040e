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
from fabric_deepspeed_engine import Engine, set_whole
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
        param_dtypes=frozenset({"float32", "bfloat16", "float16"}),  # its own copies of them are in 32 bits
    )

    def __init__(self, options: DeepSpeedOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self._engines: list[Engine] = []

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join the other ranks, and let DeepSpeed use the same process group.

        Raises:
            UnavailableError: DeepSpeed would wait for a compilation that was killed.
        """
        self._world, self._policy = world, policy
        deepspeed = _deepspeed(world.device.type)
        if world.device.type == "cpu":
            _wait_for_compilation()
        world.closing.enter_context(_local_rank(world))
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
        self._engines.append(Engine(engine, optimizer, trained))
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
            "gradient_clipping": 0.0,  # by itself it would clip to a norm of 1
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

    def _of(self, module: nn.Module) -> Engine:
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
        one.averaged, one.waiting = not one.skipping, one.skipping
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
        """Let the engine clip, step, and clear the gradients.

        Raises:
            MisuseError: The last backward pass was inside ``no_backward_sync``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        one = next(one for one in self._engines if one.optimizer is optimizer)
        if one.waiting:
            raise MisuseError(
                "gradients were accumulated, and not averaged, so that DeepSpeed would not step",
                where="optimizer.step",
                instead="the last backward pass before a step outside of fabric.no_backward_sync(model)",
            )
        if one.averaged:
            one.engine.step()
        one.averaged, one.engine.optimizer.clip_grad = False, one.clip
        return loss

    def gradients_cleared(self, parameters: Sequence[torch.Tensor]) -> None:
        """Let the engines of these parameters forget what they have accumulated.

        Raises:
            MisuseError: Of several models under stage 3 one has gradients, and it isn't said whose are cleared.
        """
        wanted = {id(one) for one in parameters}
        # Stage 3 leaves its optimizers without parameters between steps.
        if not wanted and len(self._engines) > 1 and any(one.averaged or one.waiting for one in self._engines):
            raise MisuseError(
                "several models are set up, and DeepSpeed hides which of them the optimizer trains",
                where="optimizer.zero_grad",
                instead="model.zero_grad()",
            )
        for one in self._engines:
            if not wanted or wanted & one.held():
                one.clear()

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
        """Refuse: the engine steps on gradients of its own, whatever is written into the parameters'.

        Raises:
            RequestError: Always.
        """
        raise RequestError(
            "DeepSpeed clips by the Euclidean norm", where="fabric.clip_gradients(clip_val=)", got=clip_value,
            instead="max_norm=",
        )  # fmt: skip

    def _holding(self, parameters: Sequence[torch.Tensor]) -> Engine:
        if len(self._engines) == 1:
            return self._engines[0]
        wanted = {id(one) for one in parameters}
        for one in self._engines:
            if wanted & one.held():
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


def _deepspeed(device_type: str) -> Any:
    """Import DeepSpeed, which chooses its hardware by itself, and correct its choice."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator

    if device_type == "cpu" and get_accelerator().device_name() != "cpu":
        from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

        set_accelerator(CPU_Accelerator())
    return deepspeed


@contextmanager
def _local_rank(world: World) -> Iterator[None]:
    """Let DeepSpeed read its local rank, in forward passes too, from the variable that not all launchers set."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(world.local_rank)
    try:
        yield
    finally:
        del os.environ["LOCAL_RANK"]
        if before is not None:
            os.environ["LOCAL_RANK"] = before


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


STAGE_1: Final = Preset.of(DeepSpeedStrategy, stage=1)
"""The alias ``deepspeed_stage_1``: optimizer states are divided."""

STAGE_2: Final = Preset.of(DeepSpeedStrategy, stage=2)
"""The alias ``deepspeed_stage_2``: gradients too."""

STAGE_3: Final = Preset.of(DeepSpeedStrategy, stage=3)
"""The alias ``deepspeed_stage_3``: parameters too."""
