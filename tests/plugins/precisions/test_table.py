"""What every precision does under every strategy, against the same training written with PyTorch alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_plugins.strategies import ModelParallelStrategy

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Types(NamedTuple):
    """The number types at every place of a training step."""

    inputs: torch.dtype
    inside: torch.dtype
    outputs: torch.dtype
    parameters: torch.dtype
    gradients: torch.dtype
    reduction: torch.dtype | None
    optimizer_state: torch.dtype


class Result(NamedTuple):
    """The types, and the parameters after some steps."""

    types: Types
    parameters: list[Tensor]


TABLE = {
    #               inputs inside outputs parameters gradients reduction optimizer state
    "32-true": Types(F32, F32, F32, F32, F32, F32, F32),
    "64-true": Types(F64, F64, F32, F64, F64, F64, F64),
    "16-true": Types(F16, F16, F32, F16, F16, F16, F16),
    "bf16-true": Types(BF16, BF16, F32, BF16, BF16, BF16, BF16),
    "16-mixed": Types(F16, F16, F32, F32, F32, F32, F32),
    "bf16-mixed": Types(BF16, BF16, F32, F32, F32, F32, F32),
}


SCALE = 1024.0
"""One that overflows nowhere here, so that every step counts."""


def with_scale(precision: str) -> str:
    """Give the precision with the scale above."""
    return f"{precision}:init_scale={SCALE}" if precision == "16-mixed" else precision


class Net(nn.Module):
    """Two layers that remember the types they see."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.second = nn.Linear(16, 3)
        self.norm = nn.LayerNorm(3)
        self.seen: list[torch.dtype] = []

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Map (batch, 6) to (batch, 3)."""
        hidden = self.first(batch["x"])
        self.seen = [batch["x"].dtype, hidden.dtype]
        result: Tensor = self.norm(self.second(torch.tanh(hidden)))
        return result


def parallelize(model: nn.Module, mesh: DeviceMesh) -> None:
    """Compute the first layer by columns, the second by rows; the norm stays whole, with plain gradients."""
    parallelize_module(model, mesh["tensor_parallel"], {"first": ColwiseParallel(), "second": RowwiseParallel()})


class Reductions(TorchDispatchMode):  # torch's own lacks annotations
    """Notes the types in which gradients travel between ranks."""

    def __init__(self) -> None:
        super().__init__()  # likewise
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note, and call."""
        if func.namespace == "c10d" and "reduce" in func.__name__:
            self.seen |= {one.dtype for one in torch.utils._pytree.tree_leaves(args) if isinstance(one, Tensor)}
        return func(*args, **(kwargs or {}))


def data() -> tuple[Tensor, Tensor]:
    """Make three batches of eight, the same on every rank."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(3, 8, 6, generator=generator), torch.randn(3, 8, 3, generator=generator)


def whole(tensor: Tensor) -> Tensor:
    """Give a whole copy of a tensor that may be sharded."""
    gathered = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return gathered.detach().clone()


def summary(model: Net, output: Tensor, optimizer: torch.optim.Optimizer, reductions: Reductions) -> Types:
    """Read the types off after a backward pass and a step."""
    weight = model.first.weight
    assert weight.grad is not None
    assert len(reductions.seen) <= 1
    inputs, inside = model.seen
    return Types(
        inputs,
        inside,
        output.dtype,
        weight.dtype,
        weight.grad.dtype,
        next(iter(reductions.seen), None),
        optimizer.state[weight]["momentum_buffer"].dtype,
    )


def by_fabric(strategy: str, devices: int, precision: str) -> Result:
    """Train through the façade."""
    chosen: Any = strategy
    if strategy == "model_parallel":
        chosen = ModelParallelStrategy(parallelize_fn=parallelize, tensor_parallel_size=devices)
    with Fabric(accelerator="cpu", strategy=chosen, devices=devices, precision=with_scale(precision)) as fabric:
        fabric.launch()
        return train_by_fabric(fabric)


def train_by_fabric(fabric: Fabric) -> Result:
    """Train in a frame of its own: PyTorch may hang where DDP's wrapper outlives its process group."""
    torch.manual_seed(7)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrapped, stepper = fabric.setup(model, optimizer)
    reductions = Reductions()
    for x, y in zip(*data(), strict=True):
        shard, count = fabric.strategy.data_shard()
        own = slice(shard, None, count)
        stepper.zero_grad()
        output = wrapped({"x": x[own]})
        loss = nn.functional.mse_loss(output, y[own])
        with reductions:
            fabric.backward(loss)
        stepper.step()
    return Result(summary(model, output, optimizer, reductions), [whole(one) for one in model.parameters()])


@contextmanager
def process_group(devices: int) -> Iterator[None]:
    """Join the ranks without the façade."""
    store: dist.Store = dist.HashStore()
    rank = 0
    if devices > 1:
        rank = int(os.environ["RANK"])
        store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=devices)
    try:
        yield
    finally:
        dist.destroy_process_group()


def by_hand(strategy: str, devices: int, precision: str) -> Result:
    """Train with PyTorch alone."""
    with process_group(devices):
        return train_by_hand(strategy, devices, precision)


def train_by_hand(strategy: str, devices: int, precision: str) -> Result:
    """Train in a frame of its own, likewise."""
    compute = {"16": F16, "bf16": BF16, "32": F32, "64": F64}[precision.partition("-")[0]]
    mixed = precision.endswith("mixed")
    torch.manual_seed(7)
    model = Net()
    if not mixed:
        model.to(compute)
    called: nn.Module = model
    autocast: Any = nullcontext()
    if strategy == "fsdp":
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=F32 if mixed else None)
        fully_shard(model, mesh=init_device_mesh("cpu", (devices,)), mp_policy=policy)
    elif strategy == "model_parallel":
        parallelize(model, init_device_mesh("cpu", (1, devices), mesh_dim_names=("data", "tensor_parallel")))
    elif strategy == "ddp":
        called = nn.parallel.DistributedDataParallel(model)
    if mixed and strategy != "fsdp":
        autocast = torch.autocast("cpu", compute)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=precision == "16-mixed")
    reductions = Reductions()
    for x, y in zip(*data(), strict=True):
        own = slice(None) if strategy == "model_parallel" else slice(dist.get_rank(), None, devices)
        optimizer.zero_grad()
        with autocast:
            output = called({"x": x[own].to(compute)}).float()
        loss = nn.functional.mse_loss(output, y[own])
        with reductions:
            scaler.scale(loss).backward()  # likewise
        if strategy == "model_parallel" and scaler.is_enabled():
            # PyTorch's own refuses plain gradients beside spread ones.
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad.div_(scaler.get_scale())
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return Result(summary(model, output, optimizer, reductions), [whole(one) for one in model.parameters()])


@pytest.mark.parametrize("precision", TABLE)
@pytest.mark.parametrize(
    ("strategy", "devices"),
    [("single_device", 1), ("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2), ("model_parallel", 2)],
)
def test_types_and_parameters_are_those_of_plain_pytorch(
    strategy: str, devices: int, precision: str, two_ranks: RankPool
) -> None:
    """Every place has the type that the table says, and parameters equal the hand-written loop's bit for bit."""
    expected = TABLE[precision]
    if strategy != "ddp" and devices == 1:
        expected = expected._replace(reduction=None)
    if devices == 1:
        ours, reference = [by_fabric(strategy, 1, precision)], [by_hand(strategy, 1, precision)]
    else:
        ours = two_ranks.run(by_fabric, strategy, devices, precision)
        reference = two_ranks.run(by_hand, strategy, devices, precision)
    for mine, plain in zip(ours, reference, strict=True):
        if strategy == "model_parallel":  # what travels are activations
            expected = expected._replace(reduction=plain.types.reduction)
        assert mine.types == plain.types == expected
        for own, by_hand_one in zip(mine.parameters, plain.parameters, strict=True):
            assert torch.equal(own, by_hand_one)
