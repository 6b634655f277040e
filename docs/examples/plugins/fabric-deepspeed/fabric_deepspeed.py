"""The strategies of DeepSpeed: ZeRO, by the real engine, which owns the backward pass, clipping and the step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal

import torch
from fabric_deepspeed_engine import Engine, set_whole
from fabric_deepspeed_process import forget_groups, imported, local_rank, process_unchanged, wait_for_compilation
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
from fabric_core.errors import MisuseError, RequestError, SetupError


class DeepSpeedOptions(PluginOptions):
    """The options of the strategy ``deepspeed``."""

    stage: Literal[1, 2, 3] = 2
    """What ZeRO divides over the ranks: optimizer states; gradients too; parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in the memory of the host."""
    zero_unused: bool = False
    """Let a parameter that no rank used since the last step have a gradient of zero, by which decay and momentum move
    it, as plain DeepSpeed does; otherwise it is an error."""
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
        world.closing.enter_context(local_rank(world))
        world.closing.callback(forget_groups)  # it runs after what ProcessGroup enters there
        with process_unchanged():
            deepspeed = imported(world.device.type)
            if world.device.type == "cpu":
                wait_for_compilation()
            self._group = ProcessGroup(world)
            forget_groups()
            deepspeed.init_distributed(dist_backend=world.backend, dist_init_required=False, verbose=False)
        return self._group

    def teardown(self) -> None:
        """End the engines."""
        while self._engines:
            self._engines.pop().close()

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
        with process_unchanged():
            engine, *_ = imported(self._world.device.type).initialize(
                model=module, optimizer=optimizer, config=self._config(), dist_init_required=False
            )
        self._engines.append(Engine(engine, optimizer, trained, zero_unused=self.options.zero_unused))
        return engine, [optimizer]

    def _config(self) -> dict[str, Any]:
        zero: dict[str, Any] = {"stage": self.options.stage}
        if self.options.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": self._world.device.type != "cpu"}
        config: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # it only counts samples with it
            "gradient_accumulation_steps": 1,  # a clipping or a step ends an accumulation
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": 0.0,  # by itself it would clip to a norm of 1
            "bf16": {"enabled": self._policy.param_dtype == torch.bfloat16},
            "fp16": {"enabled": self._policy.param_dtype == torch.float16},
        }
        config = _merged(config, self.options.config)
        if self.options.stage == 1 and config["zero_optimization"].get("overlap_comm"):
            raise RequestError(
                "under stage 1 gradients travel as the step begins, when no backward pass is left to overlap with",
                where='DeepSpeedStrategy(config={"zero_optimization": {"overlap_comm": ...}})',
                got=True,
                instead="stage=2, or without overlap_comm",
            )
        return config

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
        """Let the engine of the model run it; gradients are averaged by a clipping or by the step.

        Raises:
            MisuseError: The loss came from several models that are trained, or from none.
            RequestError: DeepSpeed can't carry out an argument.
        """
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
        one = self._behind(loss, module)
        one.backward(loss if weight is None else (loss * weight).sum(), retain_graph=retain)

    def _behind(self, loss: torch.Tensor, module: nn.Module | None) -> Engine:
        """Give the engine of the model that a loss came from: each runs backward passes of its own model alone."""
        if module is not None and len(self._engines) == 1:
            return self._of(module)
        leaves = _leaves(loss)
        reached = [one for one in self._engines if any(id(each) in leaves for each in one.parameters())]
        if len(reached) == 1:
            return reached[0]
        raise MisuseError(
            "each model has an engine of DeepSpeed, and a backward pass is one engine's",
            where="fabric.backward",
            got=f"a loss that depends on the parameters of {len(reached)} of {len(self._engines)} models",
            instead="a loss for each model, with other.requires_grad_(False) for one that it passes through",
        )

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Let the engine average, step, and clear the gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        next(one for one in self._engines if one.optimizer is optimizer).step()
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
        """Average, and clip what the engine steps on."""
        one = self._holding(parameters)
        return one.clip_norm(max_norm, norm_type, error_if_nonfinite=error_if_nonfinite)

    def clip_grad_value(self, parameters: Sequence[torch.Tensor], clip_value: float) -> None:
        """Average, and clip what the engine steps on."""
        self._holding(parameters).clip_value(clip_value)

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


def _leaves(loss: torch.Tensor) -> set[int]:
    """Give the identities of the tensors that a backward pass would give gradients to."""
    found, seen, ahead = set(), set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        ahead += [one for one, _ in node.next_functions]
    return found


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
