"""Tensor parallelism: the user's own plan over a mesh, with the rest of the ranks reading other data."""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import ImportString, PositiveInt
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fabric_core.contracts import Collectives, PrecisionPolicy, StrategyCapabilities, World
from fabric_core.errors import OptionError, SetupError
from fabric_plugins._torch import original_of
from fabric_plugins.strategies._distributed import DistributedOptions
from fabric_plugins.strategies._sharding import (
    ShardedStrategy,
    check_materialisable,
    choose_modules,
    materialise,
    move_to,
)

__all__ = ["ModelParallelOptions", "ModelParallelStrategy"]

_DATA, _TENSOR = "data_parallel", "tensor_parallel"


class ModelParallelOptions(DistributedOptions):
    """The options of the strategy ``model_parallel``."""

    parallelize_fn: ImportString[Callable[[Any, DeviceMesh], Any]]
    """Spreads a module, given it and the mesh: ``parallelize_module(module, mesh["tensor_parallel"], plan)``. It may
    shard blocks, or all, over ``mesh["data_parallel"]`` too; the strategy does it where the function didn't. It may
    return another module with the same parameters, such as a compiled one. Text says where it lies:
    ``"module:function"``."""
    data_parallel_size: PositiveInt | Literal["auto"] = "auto"
    """How many groups read different data; ``"auto"`` is what the other size leaves, and else the number of nodes."""
    tensor_parallel_size: PositiveInt | Literal["auto"] = "auto"
    """How many ranks compute one layer together; ``"auto"`` is what the other size leaves."""
    state_dict_type: Literal["full", "sharded"] = "full"
    """How ``fabric.save`` writes: one file with whole tensors, or a directory to which all ranks write their parts."""


class ModelParallelStrategy(ShardedStrategy):
    """A mesh of ``data_parallel`` x ``tensor_parallel`` ranks, and a user's function that spreads a module over it.

    Over ``data_parallel`` the model is sharded by FSDP2. Ranks of one ``tensor_parallel`` group read the same data.
    """

    Options = ModelParallelOptions
    options: ModelParallelOptions
    capabilities = StrategyCapabilities(
        distributed=True,
        sharded=True,
        intercepts_forward=True,
        handles_device_placement=True,
        no_backward_sync=True,
    )

    @property
    def saves_sharded(self) -> bool:
        """As the option says."""
        return self.options.state_dict_type == "sharded"

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join, and lay out the mesh."""
        data, tensor = self._sizes(world)
        group = super().connect(world, policy)
        from torch.distributed.device_mesh import init_device_mesh

        self._mesh = init_device_mesh(world.device.type, (data, tensor), mesh_dim_names=(_DATA, _TENSOR))
        return group

    def _sizes(self, world: World) -> tuple[int, int]:
        data, tensor = self.options.data_parallel_size, self.options.tensor_parallel_size
        if data == "auto":
            data = world.world_size // (world.local_world_size if tensor == "auto" else tensor)
        if tensor == "auto":
            tensor = world.world_size // data
        if data * tensor != world.world_size:
            raise OptionError(
                f"{data} x {tensor} is not the number of processes, which is {world.world_size}",
                where="options of the strategy ModelParallelStrategy",
                got=f"data_parallel_size={self.options.data_parallel_size},"
                f" tensor_parallel_size={self.options.tensor_parallel_size}",
                instead="sizes whose product is the number of processes",
            )
        return data, tensor

    def data_shard(self) -> tuple[int, int]:
        """Every tensor-parallel group reads its own part."""
        self.world  # noqa: B018 - raises before launch
        return self._mesh.get_local_rank(_DATA), self._mesh[_DATA].size()

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Let the user's function spread the module, then shard it over the data-parallel ranks."""
        from torch.distributed.fsdp import FSDPModule, fully_shard

        user = module.get_submodule("module")
        self._check_undivided(user)
        check_materialisable(user)
        self._start_as_rank_zero(user)
        move_to(user, self.world.device)
        result = self.options.parallelize_fn(user, self._mesh)
        if result is not None and result is not user:
            _check_result(result, user)
            module.module = result
            user = original_of(result)
        data = self._mesh[_DATA]
        if data.size() > 1:
            if not any(isinstance(one, FSDPModule) for one in user.modules()):
                for block in choose_modules(user, "auto", option="auto_wrap_policy"):
                    fully_shard(block, mesh=data)
            fully_shard(module, mesh=data)
            if isinstance(user, FSDPModule):
                module.register_forward_pre_hook(_gather)
        materialise(user, self.world.device, kept_on=self.world.device, group=self._group)
        self._track_units(module)
        return module


def _gather(route: Any, args: tuple[Any, ...]) -> None:
    """Gather what the user's function sharded as the root, which PyTorch does before ``forward`` alone.

    It stays whole until the backward pass, as the parameters of any root do.
    """
    if args[0] != "forward":
        original_of(route.module).unshard()


def _check_result(result: Any, user: nn.Module) -> None:
    """Refuse what can't stand for the user's module.

    Raises:
        SetupError: It is no module, or its parameters have other names, so that no optimizer would know them.
    """
    if not isinstance(result, nn.Module):
        fault = f"returned a {type(result).__name__}, which is no module"
    elif names := _names(original_of(result)) ^ _names(user):
        fault = f"returned a module that has other parameters: {', '.join(sorted(names))}"
    else:
        return
    raise SetupError(
        f"parallelize_fn {fault}",
        where="options of the strategy ModelParallelStrategy",
        instead="the module that it is given, or another one with parameters of the same names",
    )


def _names(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_parameters()}
