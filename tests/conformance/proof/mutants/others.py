"""Wrong wrappers, launchers, checkpoint formats and loggers."""

import copy
import os
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fabric_core.conformance.references import OneFile, Remembering, Surroundings, Tagging
from fabric_core.contracts import (
    CheckpointCapabilities,
    Collectives,
    LaunchOrder,
    ProcessInfo,
    Wrapper,
    WrapperCapabilities,
)
from fabric_core.errors import CheckpointError, LaunchError
from fabric_plugins.checkpoints import DistributedCheckpoint
from proof.mutants import Mutants

MUTANTS = Mutants()
mutant = MUTANTS.mutant


# Wrappers


@mutant("gives another module than it was given", "WRA-401", "WRA-403", "WRA-404", "WRA-405", "WRA-411", "WRA-412")
class Cloning(Tagging):
    def wrap_module(self, module: nn.Module) -> nn.Module:
        return super().wrap_module(copy.deepcopy(module))


@mutant("adds a parameter to the user's module", "WRA-402", "WRA-403", "WRA-404", "WRA-412")
class Adding(Tagging):
    def wrap_module(self, module: nn.Module) -> nn.Module:
        module.register_parameter("ours", nn.Parameter(torch.zeros(1), requires_grad=False))
        return super().wrap_module(module)


def _louder(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output * 1.5


@mutant("changes what the module returns", "WRA-403", "WRA-404", "WRA-412")
class Loud(Tagging):
    def wrap_module(self, module: nn.Module) -> nn.Module:
        module.register_forward_hook(_louder)
        return module


@mutant("gives the same context again", "WRA-406")
class Reusing(Tagging):
    context = nullcontext()

    def forward_context(self) -> AbstractContextManager[Any] | None:
        return self.context


@mutant("must come after itself", "WRA-407")
class Circular(Tagging):
    capabilities = WrapperCapabilities(after=frozenset({"Circular"}))


@mutant("puts a function into the module that doesn't pickle", "WRA-408")
class Stuck(Tagging):
    def wrap_module(self, module: nn.Module) -> nn.Module:
        module.register_forward_pre_hook(lambda _module, _inputs: None)
        return module


@mutant("ends the training mode", "WRA-402")
class Sobering(Tagging):
    def wrap_module(self, module: nn.Module) -> nn.Module:
        return super().wrap_module(module.eval())


class _Guard:
    def __init__(self, first: nn.Parameter) -> None:
        self.first = first

    def __call__(self, module: nn.Module, _inputs: Any) -> None:
        if next(module.parameters()) is not self.first:
            raise TypeError("the first parameter is another one")


@mutant("relies on the parameters that it was shown", "WRA-412")
class Trusting(Tagging):
    def wrap_module(self, module: nn.Module) -> nn.Module:
        module.register_forward_pre_hook(_Guard(next(module.parameters())))
        return module


class _Proxy:
    def __init__(self, optimizer: Optimizer) -> None:
        self.step = optimizer.step
        self.zero_grad = optimizer.zero_grad
        self.param_groups = optimizer.param_groups


@mutant("gives an optimizer that is none", "WRA-404", "WRA-405", "WRA-409", "WRA-412")
class Faking(Tagging):
    def wrap_optimizer(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Optimizer:
        return _Proxy(optimizer)  # type: ignore[return-value]


@mutant("stops the optimizer", "WRA-404", "WRA-409", "WRA-412")
class Braking(Tagging):
    def wrap_optimizer(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Optimizer:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        return optimizer


class _Decoy(torch.optim.SGD):
    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__([nn.Parameter(torch.zeros(1))], lr=1.0)
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@mutant("gives an optimizer around the user's that has other parameters", "WRA-404", "WRA-409", "WRA-412")
class Masking(Tagging):
    def wrap_optimizer(self, optimizer: Optimizer, modules: Sequence[nn.Module]) -> Optimizer:
        return _Decoy(optimizer)


class _Endless:
    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        return iter(self.loader)


@mutant("gives a loader that doesn't know its length", "WRA-410")
class Unmeasured(Tagging):
    def wrap_dataloader(self, dataloader: Any) -> Any:
        return _Endless(dataloader)


@mutant("gives a loader that ends after one epoch", "WRA-410")
class Spent(Tagging):
    def wrap_dataloader(self, dataloader: Any) -> Any:
        return iter(list(dataloader))


@mutant("draws a random number as it wraps", "WRA-411")
class Rolling(Tagging):
    def wrap_module(self, module: nn.Module) -> nn.Module:
        torch.rand(1)
        return super().wrap_module(module)


@mutant("wraps the first loader that it is given, whichever comes", "WRA-413")
class Attached(Tagging):
    first: Any = None

    def wrap_dataloader(self, dataloader: Any) -> Any:
        self.first = self.first or super().wrap_dataloader(dataloader)
        return self.first


@mutant("looks for layers that are long enough, and finds none", "WRA-414")
class Fastidious(Wrapper):
    def wrap_module(self, module: nn.Module) -> nn.Module:
        for one in module.modules():
            if isinstance(one, nn.Linear) and one.in_features < 0:
                one.register_forward_pre_hook(_tag)
        return module


def _tag(module: Any, _inputs: Any) -> None:
    module.__dict__["tagged"] = True


# Launchers


@mutant("recognises every process as its own", "LAU-501")
class Claiming(Surroundings):
    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        return super().detect(environment) or ProcessInfo()


@mutant("writes into the environment that it reads", "LAU-502")
class Scribbling(Surroundings):
    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        environment["SEEN"] = "1"  # type: ignore[index]
        return super().detect(environment)


@mutant("takes every rank for rank 0", "LAU-503")
class Royal(Surroundings):
    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        return super().detect({**environment, "RANK": "0"} if "RANK" in environment else environment)


@mutant("raises what it likes for an environment that it can't read", "LAU-504")
class Blunt(Surroundings):
    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        try:
            return super().detect(environment)
        except LaunchError as error:
            raise KeyError("RANK") from error


@mutant("loses what the function returns", "LAU-505")
class Losing(Surroundings):
    def start(self, order: LaunchOrder) -> Any:
        super().start(order)


@mutant("loses the function's arguments", "LAU-505")
class Forgetting(Surroundings):
    def start(self, order: LaunchOrder) -> Any:
        return super().start(replace(order, args=()))


@mutant("hides that the function failed", "LAU-506")
class Hiding(Surroundings):
    def start(self, order: LaunchOrder) -> Any:
        with suppress(Exception):
            return super().start(order)


@mutant("can't be torn down where nothing was joined", "LAU-507")
class Clinging(Surroundings):
    def teardown(self) -> None:
        raise RuntimeError("nothing was joined")


@mutant("takes every rank for the first on its node", "LAU-511")
class Crowding(Surroundings):
    def detect(self, environment: Mapping[str, str]) -> ProcessInfo | None:
        found = super().detect(environment)
        return None if found is None else replace(found, local_rank=0)


# Checkpoints


@mutant("deletes whatever lies there", "CHK-613")
class Sweeping(OneFile):
    def remove(self, path: Path) -> None:
        path.unlink()


@mutant("tells rank 0 alone that a write failed", "CHK-614")
class Hushing(DistributedCheckpoint):
    def write_sharded(self, path: Any, tree: Mapping[str, Any], collectives: Collectives) -> None:
        try:
            super().write_sharded(path, tree, collectives)
        except CheckpointError:
            if collectives.rank == 0:
                raise


@mutant("only keeps tensors", "CHK-601", "CHK-605", "CHK-607", "CHK-610")
class Narrow(OneFile):
    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        super().write(path, {name: one for name, one in tree.items() if isinstance(one, dict)})


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _as_json(one) for name, one in value.items()}
    return [_as_json(one) for one in value] if isinstance(value, list | tuple) else value


@mutant("writes keys as text, and tuples as lists, as JSON does", "CHK-601", "CHK-605", "CHK-607", "CHK-610")
class Textual(OneFile):
    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        super().write(path, _as_json(tree))


@mutant("declares that all ranks write, and doesn't let them", "CHK-609", "CHK-614")
class Boasting(OneFile):
    capabilities = CheckpointCapabilities(sharded=True)


@mutant("gives an empty outline", "CHK-610")
class Blank(OneFile):
    def outline(self, path: Path) -> dict[str, Any]:
        return {}


@mutant("converts what it reads to 32 bits", "CHK-601", "CHK-605", "CHK-607", "CHK-610")
class Coarse(OneFile):
    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        tree = super().read(path, into)
        if "model" in tree:
            tree["model"] = {name: one.float() for name, one in tree["model"].items()}
        return tree


@mutant("raises what it likes for what it can't read", "CHK-602", "CHK-603", "CHK-606")
class Raw(OneFile):
    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            return super().read(path, into)
        except CheckpointError as error:
            raise KeyError(path) from error


@mutant("gives nothing where a checkpoint is damaged", "CHK-603")
class Soothing(OneFile):
    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            return super().read(path, into)
        except CheckpointError:
            # Half a zip archive still begins as one.
            if path.is_file() and path.read_bytes()[:2] == b"PK" and not zipfile.is_zipfile(path):
                return {}
            raise


@mutant("takes every file for its own", "CHK-604")
class Possessive(OneFile):
    def recognises(self, path: Path) -> bool:
        return path.is_file()


@mutant("writes over the old checkpoint", "CHK-605")
class Direct(OneFile):
    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        try:
            with path.open("wb") as file:
                torch.save(dict(tree), file)
        except Exception as error:
            raise CheckpointError("the checkpoint can't be written") from error


@mutant("runs what lies in a file", "CHK-606")
class Gullible(OneFile):
    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            tree: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
        except Exception as error:
            raise CheckpointError("the checkpoint can't be read") from error
        return tree


@mutant("never replaces a checkpoint", "CHK-607")
class Keeping(OneFile):
    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        other = path.with_name(".other")
        super().write(other, tree)
        if path.exists():
            other.unlink()
        else:
            other.rename(path)


@mutant("leaves what it writes aside", "CHK-608")
class Messy(OneFile):
    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        path.with_name("aside").write_text(os.name, encoding="utf-8")
        super().write(path, tree)


@mutant("compares no checksum", "CHK-615")
class Believing(OneFile):
    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:
            raise CheckpointError("the checkpoint can't be read") from error


@mutant("writes what it can't read", "CHK-616")
class Ready(OneFile):
    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        aside = path.with_name(f".{path.name}.part")
        try:
            torch.save(dict(tree), aside)
            aside.replace(path)
        except Exception as error:
            raise CheckpointError("the checkpoint can't be written", where=f"{path}, {', '.join(tree)}") from error
        finally:
            aside.unlink(missing_ok=True)


@mutant("says for ever what it said first", "CHK-617")
class Insisting(OneFile):
    def describe(self, path: Path) -> dict[str, Any]:
        said: dict[str, Any] = self.__dict__.setdefault("said", super().describe(path))
        return said


@mutant("fills no tensors in place", "CHK-609", "CHK-618")
class Apart(DistributedCheckpoint):
    def read(self, path: Any, into: Mapping[str, Any] | None) -> dict[str, Any]:
        return super().read(path, None)


@mutant("writes numbers as the last rank has them", "CHK-619")
class Last(DistributedCheckpoint):
    def write_sharded(self, path: Any, tree: Mapping[str, Any], collectives: Collectives) -> None:
        last = collectives.world_size - 1
        told = {name: collectives.broadcast(one, last) for name, one in tree.items() if isinstance(one, int)}
        super().write_sharded(path, {**tree, **told}, collectives)


@mutant("gives whatever a file holds", "CHK-620")
class Serving(OneFile):
    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        try:
            return super().read(path, into)
        except CheckpointError:
            held: Any = None
            if path.is_file() and path.read_bytes()[:2] == b"PK":
                with suppress(Exception):
                    held = torch.load(path, weights_only=True)
            if isinstance(held, list | torch.Tensor):
                return held  # type: ignore[return-value] # which is the mistake
            raise


@mutant("looks at a file beside with its code", "CHK-622")
class Peeking(DistributedCheckpoint):
    def read(self, path: Any, into: Mapping[str, Any] | None) -> dict[str, Any]:
        if (Path(path) / "fabric.pt").is_file():
            with suppress(Exception):
                torch.load(Path(path) / "fabric.pt", weights_only=False)
        return super().read(path, into)


@mutant("takes a URL for the name of a file", "CHK-621")
class Literal(OneFile):
    capabilities = CheckpointCapabilities(remote=True)

    def recognises(self, path: Any) -> bool:
        return super().recognises(Path(path))

    def names_beside(self, path: Any) -> list[str]:
        return super().names_beside(Path(path))

    def read(self, path: Any, into: Mapping[str, Any] | None) -> dict[str, Any]:
        return super().read(Path(path), into)

    def write(self, path: Any, tree: Mapping[str, Any]) -> None:
        super().write(Path(path), tree)


# Loggers


@mutant("needs a step", "LOG-701")
class Counting(Remembering):
    def log_metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        if step is None:
            raise ValueError("no step")
        super().log_metrics(metrics, step)


@mutant("can be finalized once", "LOG-701", "LOG-702")
class Final(Remembering):
    closed = False

    def finalize(self, status: str) -> None:
        if self.closed:
            raise ValueError("closed before")
        self.closed = True
