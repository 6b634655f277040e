"""Each option of ``fsdp`` does what it says."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import fsdp
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy, size_based_auto_wrap_policy, transformer_auto_wrap_policy
from torch.distributed.tensor import DTensor

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import OptionError
from fabric_plugins.strategies import FSDPStrategy
from fabric_plugins.strategies._sharding import choose_modules


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.runs = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        y: torch.Tensor = torch.tanh(self.inner(x))
        return y


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Sequential(Block(), Block()), nn.Linear(4, 2))


def _trained(strategy: str) -> tuple[list[int], list[bool], list[bool]]:
    """Train a step; give how often each block ran, and which parameters were divided after forward and at the end."""
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        model = _model()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loss = wrapped(torch.ones(2, 4)).sum()
        between = _divided(model)
        fabric.backward(loss)
        optimizer.step()
        return [one.runs for one in model.modules() if isinstance(one, Block)], between, _divided(model)


def _divided(model: nn.Module) -> list[bool]:
    """Say of the weights of both blocks and of the rest whether they are divided."""
    return [isinstance(one, DTensor) for name, one in model.named_parameters() if name.endswith("weight")]


def test_blocks_are_computed_again_where_asked(two_ranks: RankPool) -> None:
    """With activation checkpointing each block runs twice in a step, and otherwise once."""
    assert two_ranks.run(_trained, "fsdp:activation_checkpointing_policy=auto")[0][0] == [2, 2]
    assert two_ranks.run(_trained, "fsdp")[0][0] == [1, 1]


@pytest.mark.parametrize(
    ("option", "between"),
    [("null", [True, True, False]), ("true", [True, True, True]), ("false", [False, False, False])],
)
def test_what_is_freed_after_forward(option: str, between: list[bool], two_ranks: RankPool) -> None:
    """Blocks, everything, or nothing; after the step all is divided."""
    got = two_ranks.run(_trained, f"fsdp:reshard_after_forward={option}")
    assert [(seen, end) for _, seen, end in got] == [(between, [True] * 3)] * 2


def _given(strategy: str, precision: str) -> list[dict[str, Any]]:
    """Give what ``fully_shard`` was told: on a CPU nobody can see from outside that something stays there."""
    told = []
    real = fsdp.fully_shard

    def spy(module: nn.Module, **options: Any) -> Any:
        policy, mesh = options["mp_policy"], options["mesh"]
        told.append(
            {
                "offload": type(options["offload_policy"]).__name__,
                "types": (policy.param_dtype, policy.reduce_dtype, policy.output_dtype),
                "mesh": (mesh.mesh_dim_names, tuple(mesh.shape)),
            }
        )
        return real(module, **options)

    fsdp.fully_shard = spy  # type: ignore[assignment] # for this call
    try:
        with Fabric(accelerator="cpu", strategy=strategy, devices=2, precision=precision) as fabric:
            fabric.launch()
            fabric.setup(_model())
    finally:
        fsdp.fully_shard = real
    return told


def test_what_each_unit_is_told(two_ranks: RankPool) -> None:
    """Whether it is offloaded, its number types, and its mesh; only the root converts outputs."""
    half, single = torch.bfloat16, torch.float32
    *blocks, root = two_ranks.run(_given, "fsdp_cpu_offload:replicate=2", "bf16-mixed")[0]
    common = {"offload": "CPUOffloadPolicy", "mesh": (("replicate", "shard"), (2, 1))}
    assert blocks == [{**common, "types": (half, single, None)}] * 2
    assert root == {**common, "types": (half, single, single)}
    *_, plain = two_ranks.run(_given, "fsdp", "32-true")[0]
    assert plain["offload"] == "OffloadPolicy"
    assert plain["mesh"] == (("shard",), (2,))


def _loaded(strict: bool) -> str:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        model = _model()
        fabric.setup(model)
        state = {name: value for name, value in _model().state_dict().items() if name != "1.bias"}
        try:
            fabric.strategy.load_module_state(model, state, full=True, strict=strict)
        except RuntimeError as error:
            return str(error)
        return "loaded"


def test_names_that_are_missing_are_an_error_only_where_strict(two_ranks: RankPool) -> None:
    """As with ``load_state_dict``."""
    assert all("Missing key" in said for said in two_ranks.run(_loaded, True))
    assert two_ranks.run(_loaded, False) == ["loaded", "loaded"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"sharding_strategy": "FULL_SHARD", "limit_all_gathers": True}, {}),
        ({"sharding_strategy": ShardingStrategy.SHARD_GRAD_OP}, {"reshard_after_forward": False}),
        ({"sharding_strategy": "HYBRID_SHARD", "use_orig_params": True}, {"replicate": "nodes"}),
        ({"sharding_strategy": "HYBRID_SHARD", "device_mesh": (2, 4)}, {"replicate": 2, "shard": 4}),
        ({"device_mesh": (1, 2), "sync_module_states": True, "forward_prefetch": True}, {"shard": 2}),
    ],
)
def test_the_names_of_fsdp1_mean_the_same(given: dict[str, Any], meant: dict[str, Any]) -> None:
    """Programs for Lightning Fabric say it in the words of PyTorch's first FSDP."""
    assert FSDPStrategy(**given).options == FSDPStrategy(**meant).options


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sharding_strategy": "NO_SHARD"}, "FULL_SHARD, SHARD_GRAD_OP, HYBRID_SHARD"),
        ({"limit_all_gathers": False}, "limit_all_gathers"),
    ],
)
def test_what_fsdp2_cannot_do_is_refused(given: dict[str, Any], said: str) -> None:
    """What has no meaning here is an error that names it."""
    with pytest.raises(OptionError, match=said):
        FSDPStrategy(**given)


@pytest.mark.parametrize(
    "policy",
    [
        ModuleWrapPolicy({nn.Linear}),
        partial(transformer_auto_wrap_policy, transformer_layer_cls={nn.Linear}),
        partial(size_based_auto_wrap_policy, min_num_params=10),
        lambda module: isinstance(module, nn.Linear),
    ],
)
def test_policies_of_pytorch_name_modules(policy: Any) -> None:
    """Those that FSDP1 takes are asked for each module, as a callable of the user's own is."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4))
    assert choose_modules(model, policy, option="auto_wrap_policy") == [model[0]]


def _copies(strategy: FSDPStrategy) -> tuple[int, ...]:
    with Fabric(accelerator="cpu", strategy=strategy, devices=2) as fabric:
        fabric.launch()
        return tuple(fabric.strategy._mesh.shape)  # type: ignore[attr-defined]


def test_one_copy_for_each_node(two_ranks: RankPool) -> None:
    """On one node there is one."""
    assert two_ranks.run(_copies, FSDPStrategy(sharding_strategy="HYBRID_SHARD")) == [(2,), (2,)]
