"""Saved under any strategy in any format, loaded under any other: outputs, optimizer and the next ten steps agree."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_plugins.strategies import ModelParallelStrategy
from tests.distributed.test_strategies_train_as_one_process import Recipe, Transformer, _loss, spread

STRATEGIES: dict[str, tuple[Any, int]] = {
    "single": ("single_device", 1),
    "ddp 2": ("ddp", 2),
    "fsdp 2": ("fsdp", 2),
    "fsdp 4": ("fsdp", 4),
    "tensor parallel 2": (ModelParallelStrategy(parallelize_fn=spread, tensor_parallel_size=2), 2),
}
FORMATS = ["single_file", "distributed", "safetensors"]
CUT, MORE = 2, 10
Pools = dict[int, RankPool]


def _training(fabric: Fabric, seed: int) -> tuple[Any, Any, Callable[[int, int], None]]:
    torch.manual_seed(seed)
    model = Transformer()
    wrapped, stepper = fabric.setup(model, Recipe(fused=False).make_optimizer(model))
    index, count = fabric.strategy.data_shard()

    def train(start: int, end: int) -> None:
        for (tokens,) in list(Recipe().batches())[start:end]:
            own = tokens[index::count]
            fabric.backward(_loss(wrapped(own), own))
            stepper.step()
            stepper.zero_grad()

    return wrapped, stepper, train


def _save(name: str, folder: Path) -> None:
    strategy, devices = STRATEGIES[name]
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices) as fabric:
        fabric.launch()
        model, optimizer, train = _training(fabric, 7)
        train(0, CUT)
        for form in FORMATS:
            state = {"model": model} if form == "safetensors" else {"model": model, "optimizer": optimizer, "step": CUT}
            fabric.save(folder / f"{name}, {form}", state, format=form)


def _numpy(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.numpy().copy()  # training goes on in the same memory
    return {name: _numpy(one) for name, one in tree.items()} if isinstance(tree, dict) else tree


def _load(name: str, folder: Path, saver: str, form: str) -> dict[str, Any]:
    strategy, devices = STRATEGIES[name]
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices) as fabric:
        fabric.launch()
        model, optimizer, train = _training(fabric, 8)
        state: dict[str, Any] = {"model": model}
        if form != "safetensors":
            state |= {"optimizer": optimizer, "step": 0}
        assert fabric.load(folder / f"{saver}, {form}", state) == {}
        result = {"loaded": _numpy(fabric.strategy.module_state(model.module, True)), "output": _output(model)}
        if form == "safetensors":
            return result
        assert state["step"] == CUT
        moments = _numpy(fabric.strategy.optimizer_state(optimizer.optimizer, True).get("state", {}))
        train(CUT, CUT + MORE)
        trained = _numpy(fabric.strategy.module_state(model.module, True))
        return {**result, "moments": moments, "trained": trained}


def _output(model: Any) -> Any:
    (tokens,) = next(iter(Recipe().batches()))
    with torch.no_grad():
        return _numpy(model(tokens))


def _run(function: Any, name: str, pools: Pools, *arguments: Any) -> Any:
    devices = STRATEGIES[name][1]
    return function(name, *arguments) if devices == 1 else pools[devices].run(function, name, *arguments)[0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """Give a folder, and the names of the strategies that have saved to it."""
    return tmp_path_factory.mktemp("saved"), set()


@pytest.fixture(scope="module")
def plainly() -> dict[str, Any]:
    """Train without any of it."""
    torch.manual_seed(7)
    model, recipe = Transformer(), Recipe(fused=False)
    optimizer = recipe.make_optimizer(model)
    result: dict[str, Any] = {}
    for step, (tokens,) in enumerate(list(recipe.batches())[: CUT + MORE]):
        if step == CUT:
            result["loaded"] = {name: one.clone() for name, one in model.state_dict().items()}
            (first,) = next(iter(recipe.batches()))
            result["output"] = model(first).detach()
            result["moments"] = {
                index: {name: one.clone() for name, one in entry.items()}
                for index, entry in optimizer.state_dict()["state"].items()
            }
        torch.autograd.backward(_loss(model(tokens), tokens))
        optimizer.step()
        optimizer.zero_grad()
    return {**result, "trained": model.state_dict()}


def _close(got: Any, expected: Any, tolerance: float, what: str) -> None:
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), what
        for name in expected:
            _close(got[name], expected[name], tolerance, f"{what}, {name}")
    else:
        torch.testing.assert_close(torch.as_tensor(got), expected, rtol=0, atol=tolerance, msg=what)


@pytest.mark.sampled(0.12)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("saver", STRATEGIES)
@pytest.mark.parametrize("loader", STRATEGIES)
def test_any_to_any(
    loader: str, saver: str, form: str, saved: tuple[Path, set[str]], plainly: dict[str, Any],
    two_ranks: RankPool, four_ranks: RankPool,
) -> None:  # fmt: skip
    """Each of five loads what each of five saved in each format, and goes on as plain PyTorch does, to 1e-4."""
    (folder, savers), pools = saved, {2: two_ranks, 4: four_ranks}
    if saver not in savers:
        _run(_save, saver, pools, folder)
        savers.add(saver)
    results = _run(_load, loader, pools, folder, saver, form)
    assert len(results) == (2 if form == "safetensors" else 4)
    for part, tree in results.items():
        _close(tree, plainly[part], 1e-4 if part == "trained" else 1e-5, part)
