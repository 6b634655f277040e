"""Right plugins of unlike construction, which the kit must not accuse: each is a way that somebody might go."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from fabric_core.conformance.references import (
    Averaging,
    Full,
    Host,
    OneFile,
    Remembering,
    Scaled,
    Tagging,
)
from fabric_core.contracts import (
    Checkpoint,
    Collectives,
    DeviceSpec,
    PluginOptions,
    Precision,
    PrecisionPolicy,
    ProcessGroup,
    Strategy,
    StrategyCapabilities,
    World,
    Wrapper,
    parse_device_indices,
)
from fabric_core.errors import CheckpointError

# Strategies


class _Together(Strategy):
    """Joins the other ranks, and starts every rank with rank 0's values."""

    capabilities = StrategyCapabilities(distributed=True, requires_strategy_backward=True)

    world_size = 1

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join."""
        self.modules: list[nn.Module] = []
        self.world_size = world.world_size
        return ProcessGroup(world)

    def teardown(self) -> None:
        """Forget the models."""
        self.modules = []

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Send rank 0's values."""
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)
        self.modules = [*self.modules, module]
        return module

    def gather(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Give the parameters that some rank has a gradient of, each with one, zero where it has none."""
        there = torch.tensor([one.grad is not None for one in parameters], dtype=torch.int32)
        if len(there):
            dist.all_reduce(there, dist.ReduceOp.MAX)
        used = [one for one, any_rank in zip(parameters, there.tolist(), strict=True) if any_rank]
        for one in used:
            if one.grad is None:
                one.grad = torch.zeros_like(one)
        return used


class FlatBuckets(_Together):
    """Averages after each pass, all gradients of one type at once in one flat tensor."""

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the pass, then average."""
        loss.backward(**arguments)
        every = [one for module in self.modules for one in module.parameters() if one.requires_grad]
        used = self.gather(every)
        for dtype in {one.dtype for one in used}:
            same = [one.grad for one in used if one.dtype == dtype and one.grad is not None]
            flat = torch.cat([one.reshape(-1) for one in same]) / self.world_size
            dist.all_reduce(flat)
            for one, part in zip(same, flat.split([one.numel() for one in same]), strict=True):
                one.copy_(part.view(one.shape))


class AtTheStep(_Together):
    """Averages when gradients are first looked at: at a clipping, or at the step."""

    capabilities = StrategyCapabilities(distributed=True, no_backward_sync=True, requires_strategy_backward=True)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join."""
        self.fresh: set[int] = set()
        return super().connect(world, policy)

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Bring what was averaged back to one rank's share, so that more can be gathered; then run the pass."""
        for module_ in self.modules:
            for one in module_.parameters():
                if one.grad is not None and id(one) in self.fresh and dist.get_rank() != 0:
                    one.grad = None
                elif one.grad is not None and id(one) in self.fresh:
                    one.grad = one.grad * self.world_size
        self.fresh.clear()
        loss.backward(**arguments)

    def average(self, parameters: Sequence[torch.Tensor]) -> None:
        """Average what was not averaged yet."""
        late = [one for one in parameters if one.requires_grad and id(one) not in self.fresh]
        for one in self.gather(late):
            if one.grad is not None:
                one.grad = one.grad / self.world_size
                dist.all_reduce(one.grad)
            self.fresh.add(id(one))

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Average, and step; a closure's gradients are averaged each time that it ran."""
        held = [one for group in optimizer.param_groups for one in group["params"]]

        def evaluate() -> Any:
            assert closure is not None
            result = closure()
            self.average(held)
            return result

        if closure is None:
            self.average(held)
        try:
            return super().optimizer_step(optimizer, None if closure is None else evaluate)
        finally:
            self.fresh -= {id(one) for one in held}

    def clip_grad_norm(
        self, parameters: Sequence[torch.Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool
    ) -> torch.Tensor:
        """Average, and clip."""
        self.average(parameters)
        return super().clip_grad_norm(parameters, max_norm, norm_type, error_if_nonfinite)

    def clip_grad_value(self, parameters: Sequence[torch.Tensor], clip_value: float) -> None:
        """Average, and clip."""
        self.average(parameters)
        super().clip_grad_value(parameters, clip_value)


class ParameterServer(_Together):
    """Rank 0 sums what all ranks send it, and sends the mean back."""

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the pass, then send and receive."""
        loss.backward(**arguments)
        for one in self.gather([one for module in self.modules for one in module.parameters() if one.requires_grad]):
            gradient = one.grad
            assert gradient is not None
            sent = (gradient / self.world_size).contiguous()
            dist.reduce(sent, 0)
            dist.broadcast(sent, 0)
            gradient.copy_(sent)


class GatheredMean(_Together):
    """Gathers every rank's gradients, and each rank computes the mean in the order of the ranks."""

    def backward(self, loss: torch.Tensor, module: nn.Module | None, arguments: Mapping[str, Any]) -> None:
        """Run the pass, then gather."""
        loss.backward(**arguments)
        for one in self.gather([one for module in self.modules for one in module.parameters() if one.requires_grad]):
            gradient = one.grad
            assert gradient is not None
            every = [torch.empty_like(gradient, memory_format=torch.contiguous_format) for _ in range(self.world_size)]
            dist.all_gather(every, gradient.contiguous())
            gradient.copy_(torch.stack([part / self.world_size for part in every]).sum(0))


class Parting(_Together):
    """Lets each rank step on its own gradients, and averages parameters after every third step of an optimizer."""

    capabilities = StrategyCapabilities(distributed=True, synchronous=False)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join."""
        self.steps: dict[Optimizer, int] = {}
        self.restored: list[int] = []
        return super().connect(world, policy)

    def setup_optimizer(self, optimizer: Optimizer, replaced: Mapping[torch.Tensor, torch.Tensor]) -> Optimizer:
        """Count its steps."""
        self.steps.setdefault(optimizer, self.restored.pop(0) if self.restored else 0)
        return optimizer

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step, and average where it is time."""
        result = super().optimizer_step(optimizer, closure)
        self.steps[optimizer] += 1
        if self.steps[optimizer] % 3 == 0:
            self.meet([one.detach() for group in optimizer.param_groups for one in group["params"]])
        return result

    def meet(self, tensors: Sequence[torch.Tensor]) -> None:
        """Average in place."""
        for one in tensors:
            mean = (one / self.world_size).contiguous()
            dist.all_reduce(mean)
            one.copy_(mean)

    def state_dict(self) -> dict[str, Any]:
        """Give the counters."""
        return {"steps": list(self.steps.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Count on; what is set up later, from then on."""
        self.restored = list(state["steps"])
        for optimizer in self.steps:
            if self.restored:
                self.steps[optimizer] = self.restored.pop(0)


class Swapping(Parting):
    """Gossip: pairs of ranks send each other their parameters after every step, and each goes to the middle."""

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None) -> Any:
        """Step, and meet."""
        result = Strategy.optimizer_step(self, optimizer, closure)
        if self.world_size > 1:
            self.meet([one.detach() for group in optimizer.param_groups for one in group["params"]])
        return result

    def meet(self, tensors: Sequence[torch.Tensor]) -> None:
        """Send and receive."""
        other = dist.get_rank() ^ 1
        for one in tensors:
            mine = one.contiguous()
            theirs = torch.empty_like(mine)
            sent = dist.isend(mine, other)
            dist.recv(theirs, other)
            if sent is not None:
                sent.wait()
            one.copy_((mine + theirs) / 2)


class OwnGroup(Averaging):
    """Trains on a process group of its own, beside the default one."""

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Make a second group over the same ranks."""
        made = super().connect(world, policy)
        self._made = made
        return made.fork()

    def teardown(self) -> None:
        """Close the first group too."""
        super().teardown()
        made = self.__dict__.pop("_made", None)
        if made is not None:
            made.close()


class Announcing(Averaging):
    """Skips gradient synchronization in a context that is an object of its own."""

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> Any:
        """Give the context."""
        return super().no_backward_sync(module, True) if enabled else nullcontext()


class Precise(Averaging):
    """Averages in 64 bits whatever the gradients' type."""

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average wide copies."""
        used = [one for one in parameters if one.requires_grad]
        there = torch.tensor([one.grad is not None for one in used], dtype=torch.int32)
        dist.all_reduce(there, dist.ReduceOp.MAX)
        for one, any_rank in zip(used, there.tolist(), strict=True):
            if not any_rank:
                continue
            if one.grad is None:
                one.grad = torch.zeros_like(one)
            wide = one.grad.to(torch.complex128 if one.is_complex() else torch.float64).contiguous()
            wide /= self.world.world_size
            dist.all_reduce(wide)
            one.grad.copy_(wide)


class Refusing(Averaging):
    """Takes no complex parameters, and says so on every rank."""

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Look at the types."""
        if any(one.is_complex() for one in module.parameters()):
            raise ValueError("complex parameters are not supported")
        return super().setup_module(module)


class OfSingles(Averaging):
    """Trains parameters of 32 bits alone, as an engine that keeps its own copies of them does."""

    capabilities = Averaging.capabilities.model_copy(update={"param_dtypes": frozenset({"float32"})})

    def setup_module(self, module: nn.Module) -> nn.Module:
        """Look at the types."""
        if any(one.dtype != torch.float32 for one in module.parameters() if one.requires_grad):
            raise AssertionError("it was declared")
        return super().setup_module(module)


# Precisions


class StaticScale(Precision):
    """Scales the loss by one number for ever, and skips steps that are not finite on some rank."""

    def __init__(self, options: PluginOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        self.collectives: Collectives | None = None
        self.done: list[Optimizer] = []
        self.bad: list[Optimizer] = []

    @property
    def policy(self) -> PrecisionPolicy:
        """The loss is scaled."""
        return PrecisionPolicy(loss_scaling=True)

    def connect(self, collectives: Collectives) -> None:
        """Keep them, to agree on a step."""
        self.collectives = collectives

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Scale, and what was unscaled and waits too."""
        self.bad = [one for one in self.bad if _gradients(one)]
        while self.done:
            for gradient in _gradients(self.done.pop()):
                gradient.mul_(512.0)
        return loss * 512.0

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide, once a step."""
        if not any(one is optimizer for one in self.done):
            self.done.append(optimizer)
            for gradient in _gradients(optimizer):
                gradient.div_(512.0)
                if not bool(gradient.isfinite().all()):
                    self.bad.append(optimizer)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        """Step where everything is finite on all ranks."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        self.unscale_gradients(optimizer)
        bad = torch.tensor(float(any(one is optimizer for one in self.bad)))
        self.bad = [one for one in self.bad if one is not optimizer]
        if self.collectives is not None:
            bad = self.collectives.all_reduce(bad, None, "max")
        if bad.item():
            return None
        returned = step(None)
        return returned if closure is None else result


def _gradients(optimizer: Optimizer) -> list[torch.Tensor]:
    return [one.grad for group in optimizer.param_groups for one in group["params"] if one.grad is not None]


class ByPolicyAlone(Precision):
    """Says what it wants in the policy, and overrides nothing."""

    @property
    def policy(self) -> PrecisionPolicy:
        """64 bits everywhere."""
        return PrecisionPolicy(
            param_dtype=torch.float64,
            compute_dtype=torch.float64,
            input_dtype=torch.float64,
            output_dtype=torch.float32,
        )


class Halved(Precision):
    """bfloat16 throughout, and what comes out stays so."""

    @property
    def policy(self) -> PrecisionPolicy:
        """bfloat16 everywhere."""
        return PrecisionPolicy(param_dtype=torch.bfloat16, compute_dtype=torch.bfloat16, input_dtype=torch.bfloat16)


class Tripling(Scaled):
    """Triples its scale after four steps without an overflow, and takes a third after one."""

    def update(self) -> None:
        """Count the steps that were taken."""
        if self.overflown:
            self.scale /= 3
        self.overflown = False


# Checkpoints


def _flat(tree: Any, found: list[torch.Tensor]) -> Any:
    """Write a tree as JSON's types, tensors as their numbers in a list; types are told by tags."""
    if isinstance(tree, torch.Tensor):
        found.append(tree)
        return {"tensor": len(found) - 1}
    if isinstance(tree, Mapping):
        return {"dict": [[_flat(key, found), _flat(value, found)] for key, value in tree.items()]}
    if type(tree) in {list, tuple}:
        return {type(tree).__name__: [_flat(one, found) for one in tree]}
    if isinstance(tree, float):
        return {"float": tree.hex()}
    if tree is None or isinstance(tree, bool | int | str):
        return {"plain": tree}
    raise TypeError(f"a {type(tree).__name__} can't be written")


def _tree(flat: Any, tensors: Sequence[torch.Tensor]) -> Any:
    ((tag, value),) = flat.items()
    if tag == "tensor":
        return tensors[value]
    if tag == "dict":
        return {_tree(key, tensors): _tree(one, tensors) for key, one in value}
    if tag in {"list", "tuple"}:
        made = [_tree(one, tensors) for one in value]
        return made if tag == "list" else tuple(made)
    return float.fromhex(value) if tag == "float" else value


def _bytes(tensor: torch.Tensor) -> bytes:
    whole = tensor.detach().cpu().contiguous().reshape(-1)
    return whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b""


def _tensor(data: bytes, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    kind: torch.dtype = getattr(torch, dtype)
    if not data:
        return torch.empty(tuple(shape), dtype=kind)
    return torch.frombuffer(bytearray(data), dtype=kind).reshape(tuple(shape))


class _Aside(Checkpoint):
    """Writes aside and renames; what goes wrong is a CheckpointError."""

    def encode(self, tree: Mapping[str, Any]) -> bytes:
        """Give the file's bytes."""
        raise NotImplementedError

    def decode(self, data: bytes) -> dict[str, Any]:
        """Read the file's bytes."""
        raise NotImplementedError

    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        """Write."""
        aside = path.with_name(f".{path.name}.part")
        for name, value in tree.items():
            try:
                self.encode({name: value})
            except Exception as error:
                raise CheckpointError(f"the entry {name!r} can't be written", where=str(path)) from error
        try:
            aside.write_bytes(self.encode(tree))
            aside.replace(path)
        except Exception as error:
            raise CheckpointError("it can't be written", where=str(path), got=repr(error)) from error
        finally:
            with suppress(OSError):
                aside.unlink()

    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        """Read."""
        try:
            return self.decode(path.read_bytes())
        except Exception as error:
            raise CheckpointError("it can't be read", where=str(path), got=repr(error)) from error


class Npz(_Aside):
    """A zip of arrays of bytes, as ``numpy.savez`` writes, with the tree as text beside them."""

    def recognises(self, path: Path) -> bool:
        """Look for the tree."""
        return zipfile.is_zipfile(path) and "tree.npy" in zipfile.ZipFile(path).namelist()

    def encode(self, tree: Mapping[str, Any]) -> bytes:
        """Write arrays."""
        tensors: list[torch.Tensor] = []
        flat = _flat(tree, tensors)
        kinds = [[str(one.dtype).removeprefix("torch."), list(one.shape)] for one in tensors]
        arrays = {f"t{index}": np.frombuffer(_bytes(one), np.uint8) for index, one in enumerate(tensors)}
        arrays["tree"] = np.frombuffer(json.dumps([flat, kinds]).encode(), np.uint8)
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]
        return file.getvalue()

    def decode(self, data: bytes) -> dict[str, Any]:
        """Read arrays, which hold no objects."""
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            flat, kinds = json.loads(arrays["tree"].tobytes())
            tensors = [_tensor(arrays[f"t{index}"].tobytes(), *kind) for index, kind in enumerate(kinds)]
        tree: dict[str, Any] = _tree(flat, tensors)
        return tree


class LikeSafetensors(_Aside):
    """A header with lengths and a checksum, then the tensors' bytes one after the other, and a count of all of them."""

    _MAGIC = b"LIKE-ST1"

    def recognises(self, path: Path) -> bool:
        """Look at the first bytes."""
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(8) == self._MAGIC

    def encode(self, tree: Mapping[str, Any]) -> bytes:
        """Write header and body."""
        tensors: list[torch.Tensor] = []
        flat = _flat(tree, tensors)
        parts = [_bytes(one) for one in tensors]
        kinds = [
            [str(one.dtype).removeprefix("torch."), list(one.shape), len(part)]
            for one, part in zip(tensors, parts, strict=True)
        ]
        head = json.dumps([flat, kinds]).encode()
        body = head + b"".join(parts)
        return self._MAGIC + struct.pack("<QQQ", len(head), sum(map(len, parts)), zlib.crc32(body)) + body

    def decode(self, data: bytes) -> dict[str, Any]:
        """Read header and body, whose lengths and checksum must be as it says."""
        size, total, checksum = struct.unpack("<QQQ", data[8:32])
        if data[:8] != self._MAGIC or len(data) != 32 + size + total or zlib.crc32(data[32:]) != checksum:
            raise ValueError("it was cut off, or bytes have changed")
        flat, kinds = json.loads(data[32 : 32 + size])
        tensors, at = [], 32 + size
        for dtype, shape, length in kinds:
            tensors.append(_tensor(data[at : at + length], dtype, shape))
            at += length
        tree: dict[str, Any] = _tree(flat, tensors)
        return tree


# Wrappers, loggers, accelerators


class Quiet(Wrapper):
    """Runs forward in a context of its own, and changes nothing."""

    def forward_context(self) -> Any:
        """Give a context that does nothing."""
        return _nothing()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class Lines(Remembering):
    """Counts steps itself, and forgets everything at the end."""

    def finalize(self, status: str) -> None:
        """Forget."""
        self.lines.clear()


class ManyHosts(Host):
    """The CPU, as eight devices."""

    def device_count(self) -> int:
        """Eight."""
        return 8

    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        """Of eight."""
        return parse_device_indices(spec, 8, where="devices")


class Compressed(OneFile):
    """As ``OneFile``; reads lazily what is written."""

    def outline(self, path: Path) -> dict[str, Any]:
        """Say what it holds, without reading the tensors."""
        try:
            tree: dict[str, Any] = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:
            raise CheckpointError("it can't be read", where=str(path), got=repr(error)) from error
        if not isinstance(tree, dict):
            raise CheckpointError("it holds no state tree", where=str(path), got=type(tree).__name__)
        return tree


class Plain(Full):
    """Asks for nothing, by contexts that do nothing."""

    def forward_context(self, device_type: str) -> Any:
        """Give a context that does nothing."""
        return _nothing()

    def init_context(self) -> Any:
        """Give a context that does nothing."""
        return _nothing()


class Hooking(Tagging):
    """Adds a forward hook beside the other."""

    def wrap_module(self, module: nn.Module) -> nn.Module:
        """Add a hook that leaves the output."""
        module.register_forward_hook(_leave)
        return super().wrap_module(module)


def _leave(_module: Any, _inputs: Any, output: Any) -> Any:
    return output
