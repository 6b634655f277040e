"""Fully sharded data parallelism: every rank holds a part of each parameter, gathered block by block where needed."""

from collections.abc import Mapping
from typing import Any, Final, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import nn
from torch.optim import Optimizer

from fabric_core.contracts import (
    Collectives,
    MemoryEstimate,
    PrecisionPolicy,
    Preset,
    ProcessInfo,
    StrategyCapabilities,
    World,
)
from fabric_core.errors import MisuseError, OptionError
from fabric_plugins._torch import checkpoint_activations
from fabric_plugins.strategies._distributed import DistributedOptions
from fabric_plugins.strategies._sharding import (
    ModulePolicy,
    ShardedStrategy,
    check_materialisable,
    choose_modules,
    divided_memory,
    materialise,
)

__all__ = ["FSDP_CPU_OFFLOAD", "FSDPOptions", "FSDPStrategy"]


class FSDPOptions(DistributedOptions):
    """The options of the strategy ``fsdp``."""

    auto_wrap_policy: ModulePolicy | None = "auto"
    """Which modules are units, gathered and freed as one: ``"auto"`` finds the repeated blocks; a set of classes or of
    their names; a callable that says yes or no to a module; ``None`` makes the whole model one unit."""
    activation_checkpointing_policy: ModulePolicy | None = None
    """Which modules compute their activations again in ``backward`` instead of keeping them; as above."""
    reshard_after_forward: bool | int | None = None
    """Free a unit's parameters between ``forward`` and ``backward``: always, never, or down to parts over so many
    ranks; ``None`` is always, but for what belongs to no block, which ``backward`` needs first."""
    cpu_offload: bool = False
    """Keep parameters, gradients and optimizer state in the CPU's memory."""
    replicate: PositiveInt | Literal["nodes"] = 1
    """How many whole copies of the model there are; each is sharded over the other ranks (HSDP). ``"nodes"`` is one for
    each node."""
    shard: int | None = Field(default=None, ge=1)
    """Over how many ranks a copy is sharded; ``None`` is all that ``replicate`` leaves."""
    state_dict_type: Literal["full", "sharded"] = "full"
    """How ``fabric.save`` writes: one file with whole tensors, or a directory to which all ranks write their parts."""

    @model_validator(mode="before")
    @classmethod
    def _take_names_of_fsdp1(cls, given: Any) -> Any:
        """Say what the arguments of PyTorch's first FSDP, which programs for Lightning Fabric give, mean here."""
        if not isinstance(given, Mapping) or not _FSDP1 & given.keys():
            return given
        options = {name: value for name, value in given.items() if name not in _FSDP1}
        options |= {name: value for name, value in given.items() if name in _ALWAYS and value is not True}
        sharding = given.get("sharding_strategy", "FULL_SHARD")
        name = str(getattr(sharding, "name", sharding)).upper()
        if name not in _SHARDINGS:
            raise ValueError(f"sharding_strategy is one of {', '.join(_SHARDINGS)}, and got {sharding!r}")
        implied: dict[str, Any] = dict(_SHARDINGS[name])
        if given.get("device_mesh") is not None:
            replicate, shard = given["device_mesh"]
            implied |= {"replicate": replicate, "shard": shard}
        return {**implied, **options}


_ALWAYS: Final = frozenset({"forward_prefetch", "limit_all_gathers", "sync_module_states", "use_orig_params"})
"""What FSDP2 always does; anything but true is refused as an option that is not known."""
_FSDP1: Final = _ALWAYS | {"sharding_strategy", "device_mesh"}
_SHARDINGS: Final[Mapping[str, Mapping[str, Any]]] = {
    "FULL_SHARD": {},
    "SHARD_GRAD_OP": {"reshard_after_forward": False},
    "HYBRID_SHARD": {"replicate": "nodes"},
}


class FSDPStrategy(ShardedStrategy):
    """Parameters, gradients and optimizer state are sharded over the ranks, by PyTorch's FSDP2."""

    Options = FSDPOptions
    options: FSDPOptions
    capabilities = StrategyCapabilities(
        distributed=True,
        sharded=True,
        intercepts_forward=True,
        applies_mixed_precision=True,
        handles_device_placement=True,
        no_backward_sync=True,
    )

    @property
    def saves_sharded(self) -> bool:
        """As the option says."""
        return self.options.state_dict_type == "sharded"

    def _sizes(self, info: ProcessInfo) -> tuple[int, int]:
        """Give how many copies there are, and over how many ranks each is sharded.

        Raises:
            OptionError: Their product isn't the number of processes.
        """
        replicate = self.options.replicate
        if replicate == "nodes":
            replicate = info.world_size // info.local_world_size
        shard = self.options.shard or max(1, info.world_size // replicate)
        if replicate * shard != info.world_size:
            raise OptionError(
                f"replicate x shard is {replicate} x {shard}, and there are {info.world_size} processes",
                where="options of the strategy FSDPStrategy",
                got=f"replicate={self.options.replicate}, shard={self.options.shard}",
                instead="sizes whose product is the number of processes; shard=None is what replicate leaves",
            )
        return replicate, shard

    def estimate_memory(
        self, info: ProcessInfo, policy: PrecisionPolicy, module: nn.Module, optimizer: Optimizer
    ) -> MemoryEstimate:
        """Divide everything over the ranks of a copy, and add the units that are whole at one time.

        Raises:
            MisuseError: An option moves memory elsewhere, or saves what the model computes.
        """
        for name in ("cpu_offload", "activation_checkpointing_policy"):
            if getattr(self.options, name):
                raise MisuseError(
                    f"{name} is not a part of the estimate",
                    where="options of the strategy FSDPStrategy",
                    got=f"{name}={getattr(self.options, name)!r}",
                    instead="the estimate without it, which is an upper bound for each device",
                )
        blocks = choose_modules(module, self.options.auto_wrap_policy, option="auto_wrap_policy")
        return divided_memory(
            module,
            optimizer,
            blocks,
            ranks=self._sizes(info)[1],
            kept=self.options.reshard_after_forward,
            policy=policy,
        )

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join, and lay out the mesh."""
        replicate, shard = self._sizes(world)
        group = super().connect(world, policy)
        from torch.distributed.device_mesh import init_device_mesh

        if replicate == 1:
            self._mesh = init_device_mesh(world.device.type, (shard,), mesh_dim_names=("shard",))
        else:
            self._mesh = init_device_mesh(world.device.type, (replicate, shard), mesh_dim_names=("replicate", "shard"))
        return group

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shard the blocks, then the rest."""
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        user = module.get_submodule("module")
        self._check_undivided(user)
        check_materialisable(user)
        self._start_as_rank_zero(user)
        for one in choose_modules(
            user, self.options.activation_checkpointing_policy, option="activation_checkpointing_policy"
        ):
            checkpoint_activations(one)
        offload: OffloadPolicy = OffloadPolicy()
        if self.options.cpu_offload:
            offload = CPUOffloadPolicy(pin_memory=torch.accelerator.is_available())
        shared: dict[str, Any] = {
            "mesh": self._mesh,
            "reshard_after_forward": self.options.reshard_after_forward,
            "offload_policy": offload,
        }
        for block in choose_modules(user, self.options.auto_wrap_policy, option="auto_wrap_policy"):
            # Only the root converts outputs: between blocks they would be converted back at once.
            fully_shard(block, mp_policy=self._mixed(None), **shared)
        fully_shard(module, mp_policy=self._mixed(self._policy.output_dtype), **shared)
        device = self.world.device
        kept_on = torch.device("cpu") if self.options.cpu_offload else device
        materialise(user, device, kept_on=kept_on, group=self._group)
        self._track_units(module)
        return module

    def _mixed(self, output_dtype: torch.dtype | None) -> Any:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        return MixedPrecisionPolicy(
            param_dtype=self._policy.compute_dtype,
            reduce_dtype=self._policy.reduce_dtype,
            output_dtype=output_dtype,
            # Where inputs are to stay as they are, autocast runs around the model, and computes with what it is given.
            cast_forward_inputs=self._policy.input_dtype is not None or not self._policy.autocast,
        )


FSDP_CPU_OFFLOAD = Preset.of(FSDPStrategy, cpu_offload=True)
"""The alias ``fsdp_cpu_offload``."""
