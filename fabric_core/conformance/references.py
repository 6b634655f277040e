"""Small right plugins of every kind: what the kit surrounds a plugin with, and what its mutants are made from."""

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fabric_core.contracts import (
    Accelerator,
    Checkpoint,
    CheckpointCapabilities,
    Collectives,
    DeviceSpec,
    Launcher,
    LaunchOrder,
    Logger,
    PluginOptions,
    Precision,
    PrecisionCapabilities,
    PrecisionPolicy,
    ProcessGroup,
    ProcessInfo,
    SingleProcess,
    Strategy,
    StrategyCapabilities,
    World,
    Wrapper,
    WrapperCapabilities,
    parse_device_indices,
)
from fabric_core.errors import CheckpointError, LaunchError, MisuseError

__all__ = [
    "Alone",
    "Averaging",
    "Doubled",
    "Full",
    "Host",
    "Mixed",
    "OneFile",
    "Remembering",
    "Routed",
    "Scaled",
    "Sharding",
    "Surroundings",
    "Tagging",
]


class Host(Accelerator):
    """The CPU, with as many devices as one asks for."""

    @property
    def device_type(self) -> str:
        """The CPU's."""
        return "cpu"

    @property
    def process_group_backend(self) -> str:
        """The CPU's."""
        return "gloo"

    def is_available(self) -> bool:
        """There is always a CPU."""
        return True

    def device_count(self) -> int:
        """One."""
        return 1

    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        """Number the processes."""
        return parse_device_indices(spec, 1, where="devices", unbounded=True)

    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        """The CPU, once for each."""
        return [torch.device("cpu") for _ in indices]

    def supports(self, dtype: torch.dtype) -> bool:
        """The floating-point types that it multiplies."""
        return dtype in {torch.float64, torch.float32, torch.bfloat16, torch.float16}

    def memory_stats(self, device: torch.device) -> Mapping[str, int]:
        """The machine's memory."""
        return {"total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")}


class Alone(Strategy):
    """One process: the contract's defaults."""

    capabilities = StrategyCapabilities(max_world_size=1)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """There are no other processes."""
        return SingleProcess()


class Averaging(Strategy):
    """Whole models, whose gradients are averaged after each backward pass, one by one, in the open.

    Its steps lie in methods of their own, so that a mutant changes one of them.
    """

    capabilities = StrategyCapabilities(distributed=True, no_backward_sync=True, requires_strategy_backward=True)

    group_class: ClassVar[type[ProcessGroup]] = ProcessGroup
    """Makes the collectives; a mutant makes wrong ones."""

    _world: World | None = None
    _modules: tuple[nn.Module, ...] = ()
    _skipping: frozenset[int] = frozenset()

    @property
    def world(self) -> World:
        """This process among the others."""
        if self._world is None:
            raise MisuseError("not connected")
        return self._world

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Make a process group, or use the one that there is."""
        self._world = world
        return self.group_class(world)

    def teardown(self) -> None:
        """Forget the models."""
        self._world, self._modules, self._skipping = None, (), frozenset()

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Give every rank the values of rank 0, and remember whose gradients to average."""
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)
        self._modules = (*self._modules, module)
        return module

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the backward pass, then average."""
        loss.backward(**arguments)
        for one in self._modules:
            if self.averages(one):
                self.average([parameter for parameter in one.parameters() if parameter.requires_grad])

    def averages(self, module: nn.Module) -> bool:
        """Say whether this backward pass averages a module's gradients."""
        return id(module) not in self._skipping

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average gradients; a rank that has none counts as zero, where another one has."""
        there = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        for parameter, any_rank in zip(parameters, there.tolist(), strict=True):
            if any_rank:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= self.world.world_size

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Leave a module out of the averaging."""
        before = self._skipping
        if enabled:
            self._skipping = before | {id(module)}
        try:
            yield
        finally:
            self._skipping = before


class Routed(Averaging):
    """As ``Averaging``, but only for what passes through the module that it returns."""

    capabilities = StrategyCapabilities(
        distributed=True, no_backward_sync=True, requires_strategy_backward=True, intercepts_forward=True
    )

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Watch what passes."""
        super().setup_module(module)
        gate = _Gate(module)
        self._modules = (*self._modules[:-1], gate)
        return gate

    def averages(self, module: nn.Module) -> bool:
        """Average what has passed since the last time."""
        if not isinstance(module, _Gate):
            raise AssertionError("only gates are remembered")  # noqa: TRY004 - a broken invariant
        passed, module.passed = module.passed, False
        module.averaged = passed and super().averages(module)
        return module.averaged

    def gradients_averaged(self, module: nn.Module, complete: bool) -> bool:
        """Say whether the last backward pass averaged a module's gradients."""
        known = any(module is one for one in self._modules)
        return known and isinstance(module, _Gate) and module.averaged


class _Gate(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.passed = False
        self.averaged = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passed = True
        return self.module(*args, **kwargs)


class Sharding(Averaging):
    """Parameters lie in shards, by PyTorch's own ``fully_shard``."""

    capabilities = StrategyCapabilities(
        distributed=True, sharded=True, intercepts_forward=True, loss_scaling=False, no_backward_sync=True
    )

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Shard in place."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)
        fully_shard(module, mesh=init_device_mesh(self.world.device.type, (self.world.world_size,)))
        return module

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the backward pass, which synchronizes by itself; it knows no shards by name."""
        if arguments.get("inputs") is not None:
            raise MisuseError("shards can't be named as inputs of a backward pass")
        loss.backward(**arguments)

    @contextmanager
    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Iterator[None]:
        """Turn the reduction of gradients off."""
        sharded: Any = module
        outermost = enabled and id(module) not in self._skipping
        with super().no_backward_sync(module, enabled):
            if outermost:
                sharded.set_requires_gradient_sync(False)
            try:
                yield
            finally:
                if outermost:
                    sharded.set_requires_gradient_sync(True)

    def clip_grad_norm(
        self, parameters: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        """Give the whole model's norm, whole."""
        norm: Any = nn.utils.clip_grad_norm_(parameters, max_norm, norm_type, error_if_nonfinite)
        whole: torch.Tensor = norm.full_tensor()
        return whole

    def module_state(self, module: nn.Module, full: bool) -> dict[str, Any]:
        """Gather on rank 0, or give the shards."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        if not full:
            return module.state_dict()
        return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=True))

    def load_module_state(self, module: nn.Module, state: Mapping[str, Any], full: bool, strict: bool) -> None:
        """Divide again, or load the shards."""
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

        own = module.state_dict()
        for name, value in state.items():
            if name in own and own[name].shape != value.shape:
                raise RuntimeError(f"{name} has the shape {tuple(value.shape)}, and needs {tuple(own[name].shape)}")
        if not full:
            module.load_state_dict(state, strict=strict)
            return
        missing, unexpected = sorted(set(own) - set(state)), sorted(set(state) - set(own))
        if strict and (missing or unexpected):
            raise RuntimeError(f"missing {missing}, unexpected {unexpected}")
        known = {name: value for name, value in state.items() if name in own}
        set_model_state_dict(module, known, options=StateDictOptions(full_state_dict=True, strict=False))

    def optimizer_state(self, optimizer: Optimizer, full: bool) -> dict[str, Any]:
        """Gather on every rank, or give the shards."""
        state = optimizer.state_dict()
        if full:
            state["state"] = {
                index: {name: _whole(value) for name, value in entry.items()} for index, entry in state["state"].items()
            }
        return state

    def load_optimizer_state(self, optimizer: Optimizer, state: Mapping[str, Any], full: bool) -> None:
        """Divide again, or load the shards."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        loaded = dict(state)
        if full:
            parameters: list[Any] = [one for group in optimizer.param_groups for one in group["params"]]
            loaded["state"] = {
                index: {
                    name: distribute_tensor(value, parameters[index].device_mesh, parameters[index].placements)
                    if isinstance(parameters[index], DTensor)
                    and isinstance(value, torch.Tensor)
                    and value.shape == parameters[index].shape
                    else value
                    for name, value in entry.items()
                }
                for index, entry in state["state"].items()
            }
        optimizer.load_state_dict(loaded)


def _whole(value: Any) -> Any:
    whole = getattr(value, "full_tensor", None)
    return value if whole is None else whole().cpu()


class Full(Precision):
    """Everything in the type that it has."""

    capabilities = PrecisionCapabilities()

    @property
    def policy(self) -> PrecisionPolicy:
        """Nothing is asked for."""
        return PrecisionPolicy()


class Doubled(Precision):
    """Everything in 64 bits; outputs come back in 32."""

    @property
    def policy(self) -> PrecisionPolicy:
        """64 bits inside."""
        return PrecisionPolicy(
            param_dtype=torch.float64,
            compute_dtype=torch.float64,
            input_dtype=torch.float64,
            output_dtype=torch.float32,
        )

    @contextmanager
    def init_context(self) -> Iterator[None]:
        """Make parameters in 64 bits."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


class Mixed(Precision):
    """Parameters in 32 bits, matrix work in bfloat16 through autocast."""

    @property
    def policy(self) -> PrecisionPolicy:
        """Autocast."""
        return PrecisionPolicy(
            compute_dtype=torch.bfloat16, input_dtype=torch.float32, output_dtype=torch.float32, autocast=True
        )

    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        """Autocast."""
        return torch.autocast(device_type, torch.bfloat16)


class ScaledOptions(PluginOptions):
    """The options of ``Scaled``."""

    scale: float = 1024.0
    """The first scale."""


class Scaled(Precision):
    """As ``Full``, with a loss that is scaled, and a scale that halves when a gradient is not finite."""

    Options = ScaledOptions
    options: ScaledOptions

    def __init__(self, options: PluginOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self.scale = self.options.scale
        self.unscaled: set[int] = set()
        self.overflown = False
        self.ranks: Collectives | None = None

    def connect(self, collectives: Collectives) -> None:
        """Keep them, to agree on whether a step overflowed."""
        self.ranks = collectives

    @property
    def policy(self) -> PrecisionPolicy:
        """The loss is scaled."""
        return PrecisionPolicy(loss_scaling=True)

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Scale it."""
        self.update()
        return loss * self.scale

    def update(self) -> None:
        """Halve the scale, once after any number of optimizers that found an infinity."""
        if self.overflown:
            self.scale /= 2
        self.overflown = False

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide, once a step."""
        if id(optimizer) in self.unscaled:
            return
        self.unscaled.add(id(optimizer))
        for gradient in _gradients(optimizer):
            gradient.div_(self.scale)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        """Step where everything is finite; a closure runs before that is known."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.unscale_gradients(optimizer)
        self.unscaled.discard(id(optimizer))
        if not self.agreed(self.finite(optimizer)):
            self.overflown = True
            return None
        returned = step(None)
        return returned if closure is None else result

    def agreed(self, finite: bool) -> bool:
        """Say whether it is so on every rank."""
        if self.ranks is None:
            return finite
        return bool(self.ranks.all_reduce(torch.tensor(float(finite)), None, "min"))

    def finite(self, optimizer: Optimizer) -> bool:
        """Say whether all gradients are finite."""
        return all(bool(gradient.isfinite().all()) for gradient in _gradients(optimizer))

    def state_dict(self) -> dict[str, Any]:
        """The scale."""
        self.update()
        return {"scale": self.scale}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The scale."""
        self.scale = state["scale"]


def _gradients(optimizer: Optimizer) -> list[torch.Tensor]:
    return [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]


class Tagging(Wrapper):
    """Counts a module's runs on the module itself, and makes loaders anew from their parts."""

    capabilities = WrapperCapabilities()

    def wrap_module(self, module: nn.Module) -> nn.Module:
        """Add a hook."""
        module.register_forward_pre_hook(_count)
        return module

    def wrap_dataloader(self, dataloader: Any) -> Any:
        """Make another one that reads the same."""
        return DataLoader(dataloader.dataset, batch_sampler=dataloader.batch_sampler, collate_fn=dataloader.collate_fn)


def _count(module: Any, _inputs: Any) -> None:
    module.__dict__["runs"] = module.__dict__.get("runs", 0) + 1


class Surroundings(Launcher):
    """Recognises the environment that ``torchrun`` and the kit's ranks have; runs a function in this process."""

    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        """Read the variables."""
        if "RANK" not in environment:
            return None
        try:
            return ProcessInfo(
                global_rank=int(environment["RANK"]),
                local_rank=int(environment["LOCAL_RANK"]),
                node_rank=int(environment["GROUP_RANK"]),
                world_size=int(environment["WORLD_SIZE"]),
                local_world_size=int(environment["LOCAL_WORLD_SIZE"]),
                main_address=environment["MASTER_ADDR"],
                main_port=int(environment["MASTER_PORT"]),
                attempt=int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")),
                agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
                owner="the conformance kit",
            )
        except (KeyError, ValueError) as error:
            raise LaunchError("the environment is incomplete", got=repr(error)) from error

    def start(self, order: LaunchOrder) -> Any:
        """Run the function here."""
        if order.function is None or order.processes > 1:
            raise LaunchError("only one process, and only a function")
        return order.function(*order.args)


class OneFile(Checkpoint):
    """A file that ``torch.load`` reads, written aside and renamed."""

    capabilities = CheckpointCapabilities()

    def recognises(self, path: Path) -> bool:
        """A zip archive, which is what ``torch.save`` writes."""
        return zipfile.is_zipfile(path)

    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        """Write aside and rename."""
        aside = path.with_name(f".{path.name}.part")
        try:
            torch.save(dict(tree), aside)
            aside.replace(path)
        except Exception as error:
            raise CheckpointError("the checkpoint can't be written", where=str(path), got=repr(error)) from error
        finally:
            aside.unlink(missing_ok=True)

    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        """Read without running code."""
        try:
            tree: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise CheckpointError("the checkpoint can't be read", where=str(path), got=repr(error)) from error
        return tree


class Remembering(Logger):
    """Keeps what it is told."""

    def __init__(self, options: PluginOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self.lines: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Keep it."""
        self.lines.append((dict(metrics), step))
