"""No training goes wrong in silence: what goes round Fabric raises, or ends where plain PyTorch does on all data."""

import importlib.util
import os
import random
import sys
import warnings
from collections.abc import Sequence
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
    """Import the scripts that lie beside this file, on a rank too; the second and third add theirs to the first's."""
    for name in ("_ways_round", "_ways_round_hidden", "_right_programs"):
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("programs") / f"{name}.py")
            assert spec is not None
            assert spec.loader is not None
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    return sys.modules["_ways_round"]


def _by_columns(net: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the layers over the ranks of a tensor-parallel group; what has others stays whole."""
    plan: Any = {name: ColwiseParallel(output_layouts=Replicate()) for name in ("body", "head") if hasattr(net, name)}
    parallelize_module(net, mesh["tensor_parallel"], plan)


STRATEGIES: dict[str, Any] = {
    "alone": lambda: "single_device",
    "ddp": DDPStrategy,
    "ddp-unused": lambda: DDPStrategy(find_unused_parameters=True),
    "ddp-static": lambda: DDPStrategy(static_graph=True),
    "ddp-buckets": lambda: DDPStrategy(bucket_cap_mb=0.00005),
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
    ("alone", "16-mixed"),
    ("ddp", "bf16-mixed"),
    ("ddp", "16-mixed"),
    ("ddp-unused", "16-mixed"),
    ("ddp-static", "16-mixed"),
    ("fsdp", "bf16-mixed"),
    ("fsdp", "16-mixed"),
    ("data-parallel", "16-mixed"),
    ("tensor-parallel", "16-mixed"),
    ("third-party", "16-mixed"),
    ("third-party-routed", "16-mixed"),
]
HOW_MANY = pytest.mark.parametrize(
    "count",
    [
        pytest.param(5, id="some"),
        pytest.param(None, id="all", marks=[pytest.mark.silence, pytest.mark.timeout(300)]),
    ],
)
"""How many scripts are drawn, each time others; ``make silence`` runs all."""


SHARDED = frozenset({"fsdp", "data-parallel", "tensor-parallel"})
UNSYNCHRONIZED = frozenset(
    {
        "averaged_by_the_script",
        "averaged_by_the_script_in_one_piece",
        "averaged_by_the_script_into_what_is_there",
        "learning_to_learn",
        "summed_by_the_script",
    }
)
"""Right programs without any backward pass that the strategy averages."""
WHOLE = frozenset({"averaged_by_the_script_after_the_raw_model"}) | UNSYNCHRONIZED - {"learning_to_learn"}
"""Right programs that average whole gradients, of which sharding leaves none."""
UNSUPPORTED: dict[str, frozenset[str]] = {
    # PyTorch's FSDP2 makes no copies, and frees parameters that a second derivative needs; a raw `zero_grad` doesn't
    # reach what it keeps.
    "fsdp": frozenset(
        {
            "a_copy",
            "cleared_by_the_raw_optimizer",
            "gradient_penalty",
            "gradient_penalty_alone",
            "hessian_by_vector",
        }
    )
    | WHOLE,
    # PyTorch makes the first reduction of a static graph in the first pass that comes through an output, and can't be
    # without it there.
    "ddp-static": frozenset(
        {
            "accumulation",
            "autograd_grad",
            "cleared_by_the_model",
            "cleared_by_the_raw_optimizer",
            "cleared_unsynchronized",
            "gradient_penalty",
            "gradient_penalty_alone",
            "hessian_by_vector",
        }
    )
    | UNSYNCHRONIZED,
    # PyTorch's compiler takes no buckets that are smaller than its first one.
    "ddp-buckets": frozenset({"compiled_after_setup", "compiled_before_setup"}),
    # It knows no copies.
    "third-party": frozenset({"a_copy"}),
    # It averages what has passed since the last backward pass, whose ever that was.
    "third-party-routed": frozenset({"a_copy", "an_adversarial_pair"}),
}
# PyTorch's `parallelize_module` takes apart what layers share.
UNSUPPORTED["data-parallel"] = (UNSUPPORTED["fsdp"] | {"penalty_in_the_loss", "tied_weights"}) - {"gradient_penalty"}
UNSUPPORTED["tensor-parallel"] = WHOLE | {
    "gradient_penalty_alone",
    "hessian_by_vector",
    "penalty_in_the_loss",
    "tied_weights",
}

UNSEEN: dict[str, frozenset[str]] = {
    # PyTorch's FSDP2 ends the process by a fault in second derivatives of a function of adapted parameters.
    "fsdp": frozenset({"learning_to_learn"}),
    # PyTorch's DTensor takes gradients that it redistributes for constants: docs/explanation/where-the-guards-end.md
    "data-parallel": frozenset({"gradient_penalty", "learning_to_learn"}),
    "tensor-parallel": frozenset({"gradient_penalty", "learning_to_learn"}),
}


def _unsupported(strategy: str, precision: str) -> frozenset[str]:
    """Name right programs that can't be, and must raise."""
    by_hand = strategy in SHARDED and precision == "16-mixed"
    return UNSUPPORTED.get(strategy, frozenset()) | ({"gradients_made_by_hand"} if by_hand else set())


def _outcomes(strategy: str, precision: str, names: Sequence[str]) -> dict[str, Any]:
    """Run scripts one after the other; gives for each the error's text, or what was trained."""
    scripts = _scripts()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}
    for name in names:
        with Fabric(
            accelerator="cpu",
            strategy=STRATEGIES[strategy](),
            devices=_ranks(strategy),
            precision=PRECISIONS[precision](),
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


def _ranks(strategy: str) -> int:
    return 1 if strategy == "alone" else 2


def _run(strategy: str, precision: str, names: list[str], count: int | None, pool: RankPool) -> dict[str, list[Any]]:
    """Run some of the scripts, or all; gives for each what every rank ended with."""
    draw = random.Random(f"{os.environ['FABRIC_SAMPLE_SEED']} {strategy} {precision}")  # noqa: S311 - of tests
    chosen = names if count is None else draw.sample(names, count)
    print(f"ran {', '.join(chosen)}")  # noqa: T201 - shown where the test fails
    found: dict[str, list[Any]] = {}
    for few in (
        chosen[at : at + 10] for at in range(0, len(chosen), 10)
    ):  # so few that they end in time on a busy machine
        arguments = (strategy, precision, few)
        ranks = pool.run(_outcomes, *arguments) if _ranks(strategy) == 2 else [_outcomes(*arguments)]
        found.update({name: [one[name] for one in ranks] for name in few})
    return found


@HOW_MANY
@pytest.mark.parametrize(("strategy", "precision"), FULL)
def test_a_way_round_raises_or_trains_as_plain_pytorch(
    strategy: str, precision: str, count: int | None, two_ranks: RankPool
) -> None:
    """Whatever a script does, no rank ends elsewhere in silence."""
    unseen = UNSEEN.get(strategy, frozenset())
    names = [name for name in [*_scripts().WAYS, *sorted(_unsupported(strategy, precision))] if name not in unseen]
    wrong = {}
    for name, got in _run(strategy, precision, names, count, two_ranks).items():
        if not any(isinstance(one, str) for one in got):
            found = _wrong(got, _plain(name), precision)
            if found is not None:
                wrong[name] = found
    assert wrong == {}


@HOW_MANY
@pytest.mark.parametrize(("strategy", "precision"), FULL)
def test_a_right_program_is_no_misuse(strategy: str, precision: str, count: int | None, two_ranks: RankPool) -> None:
    """None raises, and each ends where plain PyTorch does."""
    left_out = _unsupported(strategy, precision) | UNSEEN.get(strategy, frozenset())
    names = [name for name in _scripts().RIGHT if name not in left_out]
    wrong = {}
    for name, got in _run(strategy, precision, names, count, two_ranks).items():
        raised = [one for one in got if isinstance(one, str)]
        found = raised[0] if raised else _wrong(got, _plain(name), precision)
        if found is not None:
            wrong[name] = found
    assert wrong == {}
