"""What a plugin declares of itself: data for the plan, checked by the conformance kit in both directions."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AcceleratorCapabilities",
    "CheckpointCapabilities",
    "LauncherCapabilities",
    "PrecisionCapabilities",
    "StrategyCapabilities",
    "WrapperCapabilities",
]


class _Capabilities(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class AcceleratorCapabilities(_Capabilities):
    """What an accelerator declares."""

    start_methods: frozenset[str] = frozenset({"spawn", "forkserver", "fork"})
    """The ways of starting a process that leave the device usable in it once the parent has used the device."""


class StrategyCapabilities(_Capabilities):
    """What a strategy declares."""

    device_types: frozenset[str] | None = None
    """The device types that it runs on; ``None`` is every type."""
    param_dtypes: frozenset[str] | None = None
    """The types of the parameters that it trains, such as ``"float32"``; ``None`` is every type."""
    min_world_size: int = 1
    """The smallest number of processes."""
    max_world_size: int | None = None
    """The largest number of processes; ``None`` is no limit."""
    distributed: bool = False
    """It has a process group: several processes train together."""
    sharded: bool = False
    """After setup a rank keeps shards: of the parameters, or of the copies that its optimizer steps, and its state."""
    intercepts_forward: bool = False
    """What runs the model must pass through the module that ``setup_module`` returns, all methods of it."""
    applies_mixed_precision: bool = False
    """It carries out the precision's input, compute, reduce and output types itself, so nobody else casts inputs or
    autocasts; where the policy leaves inputs as they are (``input_dtype=None``), autocast runs around it."""
    handles_device_placement: bool = False
    """It moves the parameters to the device itself, as it shards them; they may come on the meta device."""
    requires_strategy_backward: bool = False
    """Gradients are right only through its ``backward``: a raw one on an output of a model is an error."""
    synchronous: bool = True
    """It averages gradients before every step, so that a step on others is an error; local SGD and the like do not:
    then ranks part between steps, and meet after some of them, whose count is in ``state_dict``."""
    loss_scaling: bool = True
    """It works with a precision that scales the loss."""
    no_backward_sync: bool = False
    """``no_backward_sync`` skips gradient synchronization; without it, accumulation synchronizes every time."""
    multiple_models: bool = True
    """Several models can be set up."""
    multiple_optimizers: bool = True
    """One model can have several optimizers."""
    joint_setup: bool = False
    """A model and its optimizers must be set up in one call, so that a model to train has one from the start."""

    def refusal_of(self, dtype: Any) -> str | None:
        """Say which types it declares to train, where this is none of them; else ``None``."""
        if self.param_dtypes is None or str(dtype).removeprefix("torch.") in self.param_dtypes:
            return None
        return f"declares to train {', '.join(sorted(self.param_dtypes))} alone"


class PrecisionCapabilities(_Capabilities):
    """What a precision declares, apart from its policy."""

    device_types: frozenset[str] | None = None
    """The device types that it runs on; ``None`` is every type whose accelerator supports the policy's types."""


class WrapperCapabilities(_Capabilities):
    """What a wrapper declares."""

    stage: str = Field(default="before_strategy", pattern="^(before|after)_strategy$")
    """Whether the module is transformed before the strategy wraps or shards it, or after."""
    before: frozenset[str] = frozenset()
    """The names of wrappers that must come later."""
    after: frozenset[str] = frozenset()
    """The names of wrappers that must come earlier."""
    supports_sharded_parameters: bool = True
    """It works with a strategy that shards."""


class LauncherCapabilities(_Capabilities):
    """What a launcher declares."""

    multi_node: bool = False
    """It starts, or joins, processes on several nodes."""


class CheckpointCapabilities(_Capabilities):
    """What a checkpoint format declares."""

    sharded: bool = False
    """Every rank writes and reads its own part; otherwise rank 0 writes the full state."""
    suffixes: tuple[str, ...] = ()
    """The endings of paths, such as ``".safetensors"``, that choose this format for ``fabric.save``."""
    plain_values: bool = True
    """It holds numbers, text and states of optimizers too; otherwise the tensors of models alone."""
    remote: bool = False
    """Paths may be URLs of file systems that ``fsspec`` knows, such as ``"s3://bucket/name"``."""
