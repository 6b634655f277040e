"""A real precision of a third party, torchao's float8, works under every built-in strategy by its name alone."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).parents[2] / "docs" / "examples" / "plugins" / "fabric-float8"

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from fabric_core import Fabric
from fabric_plugins.strategies import ModelParallelStrategy

CHOSEN = sys.argv[1:]
DEVICES = 1 if CHOSEN == ["single_device"] else 2

def build():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 3))
    return model, torch.randn(4, 32, 16)

def spread(model, mesh):
    from torchao.float8.float8_tensor_parallel import Float8ColwiseParallel
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import parallelize_module
    parallelize_module(model, mesh["tensor_parallel"], {"0": Float8ColwiseParallel(output_layouts=Replicate())})

def train(model, called, make, batches, shard, count, backward):
    optimizer = make(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for batch in batches:
        optimizer.zero_grad()
        backward(called(batch[shard::count]).square().mean())
        optimizer.step()
    return [(one.full_tensor() if hasattr(one, "full_tensor") else one).detach() for one in model.parameters()]

def by_fabric(fabric):
    model, batches = build()
    called = fabric.setup(model)
    kinds = [type(layer).__name__ for layer in model]
    assert kinds == ["Float8Linear", "Tanh", "Float8Linear", "Linear"], kinds
    shard, count = fabric.strategy.data_shard()
    return train(model, called, fabric.setup_optimizers, batches, shard, count, fabric.backward)

def by_hand(strategy, rank):
    from torchao.float8 import convert_to_float8_training
    model, batches = build()
    convert_to_float8_training(model, module_filter_fn=lambda layer, _: layer.out_features % 16 == 0)
    called, shard, count = model, rank, DEVICES
    if strategy == "ddp":
        called = nn.parallel.DistributedDataParallel(model)
    elif strategy == "fsdp":
        from torch.distributed.fsdp import fully_shard
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    elif strategy == "model_parallel":
        spread(model, init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor_parallel")))
        shard, count = 0, 1
    return train(model, called, lambda optimizer: optimizer, batches, shard, count, torch.Tensor.backward)

for strategy in CHOSEN:
    chosen = strategy
    if strategy == "model_parallel":
        chosen = ModelParallelStrategy(parallelize_fn=spread, tensor_parallel_size=2)
    with Fabric(accelerator="cpu", devices=DEVICES, strategy=chosen, precision="float8") as fabric:
        fabric.launch()
        ours, reference = by_fabric(fabric), by_hand(strategy, fabric.global_rank)
        assert all(torch.equal(one, other) for one, other in zip(ours, reference, strict=True)), strategy
        fabric.print("equal under", strategy, "by", fabric.plan.precision.distribution)
"""


@pytest.fixture(scope="module")
def environment(make_environment: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give an environment with the wheel of the documentation's example."""
    if importlib.util.find_spec("torchao") is None:
        pytest.skip("torchao is not installed")
    folder = tmp_path_factory.mktemp("float8")
    shutil.copytree(PROJECT, folder / "source")  # a build writes beside the source
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    subprocess.run([*command, *options, str(folder / "source")], check=True, timeout=100)
    environment = make_environment("float8")
    environment.install(list(folder.glob("*.whl")))
    (environment.folder / "train.py").write_text(SCRIPT)
    return environment


@pytest.mark.slow
@pytest.mark.parametrize("strategies", [["single_device"], ["ddp", "fsdp", "model_parallel"]])
def test_float8_trains_as_torchao_by_hand(environment: Any, strategies: list[str]) -> None:
    """Parameters equal those of torchao and PyTorch in plain PyTorch, bit for bit, on one process and on two."""
    done = environment.run("train.py", *strategies)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("equal")]
    assert lines == [f"equal under {strategy} by fabric-float8 1.0" for strategy in strategies]
