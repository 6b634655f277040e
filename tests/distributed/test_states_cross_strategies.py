"""What one strategy and number of ranks saved, another loads, and goes on training as if nothing had happened."""

from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_plugins.strategies import FSDPStrategy, ModelParallelStrategy
from tests.distributed.test_strategies_train_as_one_process import Recipe, Transformer, _loss, spread

SHARDED = "state_dict_type=sharded"
STRATEGIES: dict[str, tuple[Any, int]] = {
    "single": ("single_device", 1),
    "ddp": ("ddp", 2),
    "fsdp, full": ("fsdp", 2),
    "fsdp, sharded": (f"fsdp:{SHARDED}", 2),
    "fsdp, offloaded": (f"fsdp_cpu_offload:{SHARDED}", 2),
    "hsdp, sharded": (FSDPStrategy(replicate=2, state_dict_type="sharded"), 4),
    "tensor x data, full": (ModelParallelStrategy(parallelize_fn=spread, tensor_parallel_size=2), 4),
    "tensor x data, sharded": (
        ModelParallelStrategy(parallelize_fn=spread, tensor_parallel_size=2, state_dict_type="sharded"),
        4,
    ),
}
CUT = 3


def part(strategy: Any, devices: int, path: Path, seed: int, *, load: bool) -> dict[str, Any]:
    """Train the first steps and save, or load and train the following ones."""
    recipe = Recipe(fused=False)
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices) as fabric:
        fabric.launch()
        torch.manual_seed(seed)
        with fabric.init_module(empty_init=load):
            model = Transformer()
        wrapped, stepper = fabric.setup(model, recipe.make_optimizer(model))
        state: dict[str, Any] = {"model": wrapped, "optimizer": stepper, "step": 0}
        if load:
            assert fabric.load(path, state) == {"beyond": {"a.b": 1}}
            assert state["step"] == CUT
        batches = list(recipe.batches())[CUT : 2 * CUT] if load else list(recipe.batches())[:CUT]
        index, count = fabric.strategy.data_shard()
        for (tokens,) in batches:
            own = tokens[index::count]
            fabric.backward(_loss(wrapped(own), own))
            stepper.step()
            stepper.zero_grad()
        if not load:
            fabric.save(path, {**state, "step": CUT, "beyond": {"a.b": 1}})
        full = fabric.strategy.module_state(model, full=True)
        return {name: value.numpy() for name, value in full.items()}


def _run(name: str, pools: dict[int, RankPool], path: Path, seed: int, *, load: bool) -> dict[str, Any]:
    strategy, devices = STRATEGIES[name]
    if devices == 1:
        return part(strategy, devices, path, seed, load=load)
    result: dict[str, Any] = pools[devices].run(_part, strategy, devices, path, seed, load)[0]
    return result


def _part(strategy: Any, devices: int, path: Path, seed: int, load: bool) -> dict[str, Any]:
    return part(strategy, devices, path, seed, load=load)


def _plainly() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    model, recipe = Transformer(), Recipe(fused=False)
    optimizer = recipe.make_optimizer(model)
    for (tokens,) in list(recipe.batches())[: 2 * CUT]:
        torch.autograd.backward(_loss(model(tokens), tokens))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


@pytest.mark.parametrize(
    ("saver", "loader"),
    [
        ("single", "fsdp, sharded"),
        ("ddp", "tensor x data, sharded"),
        ("fsdp, full", "ddp"),
        ("fsdp, sharded", "single"),
        ("fsdp, sharded", "hsdp, sharded"),
        ("fsdp, offloaded", "fsdp, offloaded"),
        ("hsdp, sharded", "fsdp, full"),
        ("tensor x data, full", "fsdp, sharded"),
        ("tensor x data, sharded", "ddp"),
    ],
)
def test_saved_and_loaded(saver: str, loader: str, two_ranks: RankPool, four_ranks: RankPool, tmp_path: Path) -> None:
    """Three steps, a checkpoint, and three steps under another strategy are six steps of plain PyTorch, to 5e-5."""
    pools, path = {2: two_ranks, 4: four_ranks}, tmp_path / "checkpoint"
    _run(saver, pools, path, 7, load=False)
    assert path.is_dir() == ("sharded" in saver or "offloaded" in saver)
    assert [one.name for one in tmp_path.iterdir()] == ["checkpoint"], "nothing aside is left"
    state = _run(loader, pools, path, 8, load=True)
    for name, value in _plainly().items():
        torch.testing.assert_close(torch.from_numpy(state[name]), value, rtol=0, atol=5e-5, msg=name)
