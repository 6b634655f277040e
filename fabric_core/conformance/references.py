"""Small right plugins of every kind: what the kit surrounds a plugin with, and what its mutants are made from."""

import io
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fabric_core.conformance.reference_strategies import Alone, Averaging, Routed, Sharding
from fabric_core.contracts import (
    Accelerator,
    Checkpoint,
    CheckpointCapabilities,
    Collectives,
    DeviceSpec,
    Launcher,
    LauncherCapabilities,
    LaunchOrder,
    Logger,
    PluginOptions,
    Precision,
    PrecisionCapabilities,
    PrecisionPolicy,
    ProcessInfo,
    Wrapper,
    WrapperCapabilities,
    parse_device_indices,
)
from fabric_core.errors import CheckpointError, LaunchError

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
        self.at: WeakKeyDictionary[Optimizer, float] = WeakKeyDictionary()
        self.infinite: WeakSet[Optimizer] = WeakSet()
        self.overflown = False
        self.ranks: Collectives | None = None

    def connect(self, collectives: Collectives) -> None:
        """Keep them, to agree on whether a step overflowed."""
        self.ranks = collectives

    @property
    def policy(self) -> PrecisionPolicy:
        """The loss is scaled."""
        return PrecisionPolicy(loss_scaling=True)

    def setup_optimizer(self, optimizer: Optimizer) -> None:
        """Know at which scale its gradients are."""
        self.at[optimizer] = self.scale

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Scale it, and rescale the gradients that wait to it."""
        self.update()
        for optimizer in self.at:
            self.rescale(optimizer, self.scale)
            if not _gradients(optimizer):
                self.infinite.discard(optimizer)
        return loss * self.scale

    def rescale(self, optimizer: Optimizer, scale: float) -> None:
        """Rescale the gradients of an optimizer."""
        before, self.at[optimizer] = self.at.get(optimizer, self.scale), scale
        if before != scale:
            for gradient in _gradients(optimizer):
                gradient.mul_(scale / before)

    def update(self) -> None:
        """Halve the scale, once after any number of optimizers that found an infinity."""
        if self.overflown:
            self.scale /= 2
        self.overflown = False

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Rescale them to their true size, and remember an infinity: clipping by value may hide it."""
        self.rescale(optimizer, 1.0)
        if not self.finite(optimizer):
            self.infinite.add(optimizer)

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
        finite = self.finite(optimizer) and optimizer not in self.infinite
        self.infinite.discard(optimizer)
        if not self.agreed(finite):
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

    capabilities = LauncherCapabilities(multi_node=True)

    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        """Read the variables."""
        if "RANK" not in environment:
            return None
        try:
            found = ProcessInfo(
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
        nodes = found.world_size // max(1, found.local_world_size)
        places = (found.global_rank, found.world_size), (found.local_rank, found.local_world_size)
        for rank, count in (*places, (found.node_rank, nodes), (found.main_port - 1, 65_535)):
            if not 0 <= rank < count:
                raise LaunchError("the environment contradicts itself", got=repr(found))
        return found

    def start(self, order: LaunchOrder) -> Any:
        """Run the function here."""
        if order.function is None or order.processes > 1 or order.nodes > 1 or order.start_method is not None:
            raise LaunchError("only one process, this one, and only a function")
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
        for name, value in tree.items():
            if not _comes_back(value):
                raise CheckpointError(
                    "the entry can't be read again without code", where=f"{path}, {name!r}", got=type(value).__name__
                )
        try:
            torch.save(dict(tree), aside)
            aside.replace(path)
        except Exception as error:
            raise CheckpointError("the checkpoint can't be written", where=str(path), got=repr(error)) from error
        finally:
            with suppress(OSError):
                aside.unlink()

    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        """Read without running code."""
        return _loaded(path, weights_only=True)

    def read_trusted(self, path: Path) -> dict[str, Any]:
        """Read objects too."""
        return _loaded(path, weights_only=False)


def _comes_back(value: Any) -> bool:
    memory = io.BytesIO()
    try:
        torch.save(value, memory)
        memory.seek(0)
        torch.load(memory, weights_only=True)
    except Exception:  # noqa: BLE001 - whatever an object's own code raises
        return False
    return True


def _loaded(path: Path, *, weights_only: bool) -> dict[str, Any]:
    """Compare checksums, which PyTorch doesn't, and read."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        tree = torch.load(path, map_location="cpu", weights_only=weights_only)
    except Exception as error:
        raise CheckpointError("the checkpoint can't be read", where=str(path), got=repr(error)) from error
    if damaged is not None or not isinstance(tree, dict):
        raise CheckpointError("the checkpoint is damaged", where=str(path), got=damaged or type(tree).__name__)
    return tree


class Remembering(Logger):
    """Keeps what it is told."""

    def __init__(self, options: PluginOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self.lines: list[tuple[dict[str, float], int | None]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Keep it."""
        self.lines.append((dict(metrics), step))
