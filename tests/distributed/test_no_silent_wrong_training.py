"""No training goes wrong in silence: what goes round Fabric raises, or ends where plain PyTorch does on all data."""

import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.conformance.references import Averaging, Routed
from fabric_plugins.precisions import Float16MixedPrecision
from fabric_plugins.strategies import DDPStrategy, ModelParallelStrategy


def _scripts() -> ModuleType:
    """Import the scripts that lie beside this file, on a rank too."""
    name = "_ways_round"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def _by_columns(net: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the layers over the ranks of a tensor-parallel group; what has others stays whole."""
    plan: Any = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("body", "head") if hasattr(net, name)}
    parallelize_module(net, mesh["tensor_parallel"], plan)


STRATEGIES: dict[str, Any] = {
    "ddp": DDPStrategy,
    "ddp-unused": lambda: DDPStrategy(find_unused_parameters=True),
    "ddp-no-views": lambda: DDPStrategy(find_unused_parameters=True, gradient_as_bucket_view=False),
    "fsdp": lambda: "fsdp",
    "data-parallel": lambda: ModelParallelStrategy(parallelize_fn=_by_columns, data_parallel_size=2),
    "tensor-parallel": lambda: ModelParallelStrategy(parallelize_fn=_by_columns, tensor_parallel_size=2),
    "third-party": Averaging,
    "third-party-routed": Routed,
}
PRECISIONS: dict[str, Any] = {
    "32-true": lambda: "32-true",
    "bf16-mixed": lambda: "bf16-mixed",
    "16-mixed": lambda: Float16MixedPrecision(init_scale=64.0),
}
FULL = [(strategy, "32-true") for strategy in STRATEGIES] + [
    ("ddp", "bf16-mixed"),
    ("ddp", "16-mixed"),
    ("ddp-unused", "16-mixed"),
    ("fsdp", "16-mixed"),
    ("tensor-parallel", "16-mixed"),
    ("third-party", "16-mixed"),
]


SHARDED = frozenset({"fsdp", "data-parallel", "tensor-parallel"})
UNSUPPORTED: dict[str, frozenset[str]] = {
    # PyTorch's FSDP2 makes no copies, and frees parameters that a second derivative needs; a raw `zero_grad` doesn't
    # reach what it keeps.
    "fsdp": frozenset({"a_copy", "cleared_by_the_raw_optimizer", "gradient_penalty", "gradient_penalty_alone"}),
    # It knows no copies.
    "third-party": frozenset({"a_copy"}),
    # It averages what has passed since the last backward pass, whose ever that was.
    "third-party-routed": frozenset({"a_copy", "an_adversarial_pair"}),
}
UNSUPPORTED["data-parallel"] = (UNSUPPORTED["fsdp"] | {"penalty_in_the_loss"}) - {"gradient_penalty"}
UNSUPPORTED["tensor-parallel"] = frozenset({"penalty_in_the_loss", "gradient_penalty_alone"})

UNSEEN: dict[str, frozenset[str]] = {
    # PyTorch's DTensor takes gradients that it redistributes for constants: docs/explanation/where-the-guards-end.md
    "data-parallel": frozenset({"gradient_penalty"}),
    "tensor-parallel": frozenset({"gradient_penalty"}),
}


def _unsupported(strategy: str, precision: str) -> frozenset[str]:
    """Name right programs that can't be, and must raise."""
    by_hand = strategy in SHARDED and precision == "16-mixed"
    return UNSUPPORTED.get(strategy, frozenset()) | ({"gradients_made_by_hand"} if by_hand else set())


def _outcomes(strategy: str, precision: str, names: list[str]) -> dict[str, Any]:
    """Run scripts one after the other; gives for each the error's text, or what was trained."""
    scripts = _scripts()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in names:
        with Fabric(
            accelerator="cpu", strategy=STRATEGIES[strategy](), devices=2, precision=PRECISIONS[precision]()
        ) as fabric:
            fabric.launch()
            run = scripts.Run(fabric)
            try:
                {**scripts.WAYS, **scripts.RIGHT}[name](run)
                found[name] = [one.tolist() for one in run.parameters()]
            except Exception as error:  # noqa: BLE001 - whatever it is, it is no silence
                found[name] = f"{type(error).__name__}: {error}"
        torch._dynamo.reset()
    return found


def _plain(name: str) -> list[torch.Tensor]:
    scripts = _scripts()
    run = scripts.Run(None)
    {**scripts.WAYS, **scripts.RIGHT}[name](run)
    torch._dynamo.reset()
    trained: list[torch.Tensor] = run.parameters()
    return trained


def _wrong(got: list[Any], expected: list[torch.Tensor], precision: str) -> str | None:
    """Say how ranks that raised nothing differ from each other, or from plain PyTorch."""
    tolerance = 2e-6 if precision == "32-true" else 4e-3
    for rank, one in enumerate(got):
        for mine, theirs in zip(one, expected, strict=True):
            furthest = (torch.tensor(mine) - theirs).abs().max().item()
            if furthest > tolerance:
                return f"rank {rank} is {furthest:.1e} away from plain PyTorch"
    return None if all(one == got[0] for one in got) else "the ranks differ"


@pytest.mark.parametrize(("strategy", "precision"), FULL)
def test_a_way_round_raises_or_trains_as_plain_pytorch(strategy: str, precision: str, two_ranks: RankPool) -> None:
    """Whatever a script does, no rank ends elsewhere in silence."""
    names = [*_scripts().WAYS, *sorted(_unsupported(strategy, precision))]
    ranks = two_ranks.run(_outcomes, strategy, precision, names)
    wrong = {}
    for name in names:
        got = [one[name] for one in ranks]
        if not any(isinstance(one, str) for one in got):
            found = _wrong(got, _plain(name), precision)
            if found is not None:
                wrong[name] = found
    assert wrong == {}


@pytest.mark.parametrize(("strategy", "precision"), FULL)
def test_a_right_program_is_no_misuse(strategy: str, precision: str, two_ranks: RankPool) -> None:
    """None raises, and each ends where plain PyTorch does."""
    left_out = _unsupported(strategy, precision) | UNSEEN.get(strategy, frozenset())
    names = [name for name in _scripts().RIGHT if name not in left_out]
    ranks = two_ranks.run(_outcomes, strategy, precision, names)
    wrong = {}
    for name in names:
        got = [one[name] for one in ranks]
        raised = [one for one in got if isinstance(one, str)]
        found = raised[0] if raised else _wrong(got, _plain(name), precision)
        if found is not None:
            wrong[name] = found
    assert wrong == {}
