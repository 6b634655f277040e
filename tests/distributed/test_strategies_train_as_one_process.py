"""A small transformer under each strategy trains as plain PyTorch does in one process on the joined batch."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional as F

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_plugins.strategies import ModelParallelStrategy

pytestmark = pytest.mark.sampled(0.35)

STEPS = 20
SCALE = 64.0  # so small that nobody skips a step: who computes more in 16 bits overflows earlier
VOCABULARY, WIDTH, LENGTH, BATCH = 11, 16, 6, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        down: torch.Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + down


class Transformer(nn.Module):
    """Its head shares the embedding's weight; its position embedding has fewer rows than some worlds have ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x) * self.scale)
        return logits


@dataclass(frozen=True)
class Recipe:
    """One way of training."""

    precision: str = "32-true"
    optimizer: str = "adamw"
    accumulate: int = 1
    clip_norm: float | None = None
    clip_value: float | None = None
    before: bool = True
    fused: bool = True

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        if self.optimizer == "adamw":
            # A large epsilon keeps rounding noise in tiny gradients from becoming whole steps.
            return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3, fused=self.fused)
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def batches(self) -> Iterator[list[torch.Tensor]]:
        generator = torch.Generator().manual_seed(3)
        for _ in range(STEPS):
            tokens = torch.randint(VOCABULARY, (BATCH * self.accumulate, LENGTH), generator=generator)
            # A rule to learn, so that there is a curve: the next token is this one plus three.
            yield list(((tokens[:, :1] + 3 * torch.arange(LENGTH)) % VOCABULARY).view(-1, BATCH, LENGTH))


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


def train_plainly(recipe: Recipe) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The oracle: plain PyTorch, one process, whole batches."""
    torch.manual_seed(7)
    model = Transformer()
    optimizer = recipe.make_optimizer(model)
    dtype = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(recipe.precision)
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALE, enabled=recipe.precision == "16-mixed")
    losses = []
    for batches in recipe.batches():
        for tokens in batches:
            with torch.autocast("cpu", dtype) if dtype else contextlib.nullcontext():
                loss = _loss(model(tokens), tokens)
            torch.autograd.backward(scaler.scale(loss / len(batches)))
        scaler.unscale_(optimizer)
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        if recipe.clip_value is not None:
            nn.utils.clip_grad_value_(model.parameters(), recipe.clip_value)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, {name: value.detach().clone() for name, value in model.state_dict().items()}


def train(recipe: Recipe, devices: int, *, empty: bool = False, **chosen: Any) -> tuple[list[float], dict[str, Any]]:
    """The same, under a strategy, each rank on its part of the batch."""
    precision = f"16-mixed:init_scale={SCALE}" if recipe.precision == "16-mixed" else recipe.precision
    with Fabric(accelerator="cpu", devices=devices, precision=precision, **chosen) as fabric:
        fabric.launch()
        torch.manual_seed(7 + fabric.global_rank)  # rank 0's values count
        with fabric.init_module(empty_init=empty):
            model = Transformer()
        torch.manual_seed(7)  # an empty model's values are made later
        if recipe.before:
            wrapped, stepper = fabric.setup(model, recipe.make_optimizer(model))
        else:
            wrapped = fabric.setup(model)
            stepper = fabric.setup_optimizers(recipe.make_optimizer(wrapped))
        index, count = fabric.strategy.data_shard()
        losses = []
        for batches in recipe.batches():
            for number, tokens in enumerate(batches):
                own = tokens[index::count]
                with fabric.no_backward_sync(wrapped, enabled=number + 1 < len(batches)):
                    loss = _loss(wrapped(own), own)
                    fabric.backward(loss / len(batches))
            if recipe.clip_norm is not None:
                fabric.clip_gradients(wrapped, stepper, max_norm=recipe.clip_norm)
            if recipe.clip_value is not None:
                fabric.clip_gradients(wrapped, stepper, clip_val=recipe.clip_value)
            stepper.step()
            stepper.zero_grad()
            losses.append(fabric.all_reduce(loss.detach()).item())
        state = fabric.strategy.module_state(model, full=True)
        return losses, {name: value.numpy() for name, value in state.items()}


def spread(model: Transformer, mesh: DeviceMesh) -> None:
    """Divide the blocks' two-layer networks by columns, then rows; the rest is left whole."""
    for block in model.blocks:
        parallelize_module(block, mesh["tensor_parallel"], {"up": ColwiseParallel(), "down": RowwiseParallel()})


STRATEGIES: dict[str, tuple[Any, int]] = {
    "single_device": ("single_device", 1),
    "ddp": ("ddp", 2),
    "fsdp": ("fsdp", 2),
    "fsdp, one unit": ("fsdp:auto_wrap_policy=null,reshard_after_forward=true", 2),
    "fsdp, offloaded, recomputed": ("fsdp_cpu_offload:activation_checkpointing_policy=auto", 2),
    "hsdp": ("fsdp:replicate=2", 4),
    "tensor": (ModelParallelStrategy(parallelize_fn=spread), 2),
    "data x tensor": (ModelParallelStrategy(parallelize_fn=spread, tensor_parallel_size=2), 4),
}
FULL = [
    Recipe(),
    Recipe(before=False, clip_norm=0.3),
    Recipe(optimizer="sgd", accumulate=2),
    Recipe(optimizer="sgd", accumulate=3, clip_value=0.01, before=False),
]


def _check(
    strategy: str, recipe: Recipe, two: RankPool, four: RankPool, *, atol: float, parameters_atol: float, **more: Any
) -> None:
    name, devices = STRATEGIES[strategy]
    # PyTorch's fused optimizers refuse parameters on several meshes, and plain ones beside DTensors.
    recipe = replace(recipe, fused="tensor" not in strategy)
    losses, state = train_plainly(recipe)
    assert losses[-1] < losses[0] * 0.8, "the oracle learns nothing, so it would tell nothing"
    pool = {2: two, 4: four}.get(devices)
    chosen = {"strategy": name, **more}
    got = [train(recipe, 1, **chosen)] if pool is None else pool.run(_train, asdict(recipe), devices, chosen)
    for rank_losses, _ in got:
        torch.testing.assert_close(rank_losses, losses, rtol=0, atol=atol)
    for key, value in state.items():
        torch.testing.assert_close(torch.from_numpy(got[0][1][key]), value, rtol=0, atol=parameters_atol, msg=key)


def _train(recipe: dict[str, Any], devices: int, chosen: dict[str, Any]) -> Any:
    return train(Recipe(**recipe), devices, **chosen)


@pytest.mark.parametrize("recipe", FULL, ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_float32(strategy: str, recipe: Recipe, two_ranks: RankPool, four_ranks: RankPool) -> None:
    """In 32 bits the 20 losses agree to 1e-5 and the parameters to 5e-5."""
    _check(strategy, recipe, two_ranks, four_ranks, atol=1e-5, parameters_atol=5e-5)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("bf16-mixed", clip_norm=0.3, accumulate=2),
        Recipe("16-mixed", optimizer="sgd", accumulate=2),  # not clipped: so scaled gradients are no true ones
        Recipe("16-mixed", clip_norm=0.3),
    ],
    ids=str,
)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mixed(strategy: str, recipe: Recipe, two_ranks: RankPool, four_ranks: RankPool) -> None:
    """In mixed precision, where sharding computes a little more in 16 bits than autocast does, to 5e-2 and 3e-2."""
    _check(strategy, recipe, two_ranks, four_ranks, atol=5e-2, parameters_atol=3e-2)


@pytest.mark.parametrize("strategy", ["fsdp", "hsdp", "fsdp, offloaded, recomputed", "tensor", "data x tensor"])
def test_made_on_meta(strategy: str, two_ranks: RankPool, four_ranks: RankPool) -> None:
    """A model that was never whole on any rank begins with the same values, and trains alike."""
    _check(strategy, FULL[0], two_ranks, four_ranks, atol=1e-5, parameters_atol=5e-5, empty=True)


OVERFLOWING = 65536.0
"""The scale that ``16-mixed`` begins with, at which the first steps overflow."""


class Scaled(NamedTuple):
    """What a training with loss scaling gave."""

    losses: list[float]
    skipped: list[int]
    state: Any


def _scaled_steps(recipe: Recipe, act: Callable[[torch.Tensor], tuple[float, bool]]) -> Scaled:
    """Train, each step by ``act``, which gives the loss and whether the step was skipped."""
    losses, skipped = [], []
    for step, (tokens,) in enumerate(recipe.batches()):
        loss, was_skipped = act(tokens)
        losses.append(loss)
        if was_skipped:
            skipped.append(step)
    return Scaled(losses, skipped, None)


def _scaled_by_fabric(recipe: Recipe) -> Scaled:
    precision = f"16-mixed:init_scale={OVERFLOWING}"
    with Fabric(accelerator="cpu", devices=2, strategy="fsdp", precision=precision) as fabric:
        fabric.launch()
        torch.manual_seed(7)
        model = Transformer()
        wrapped, optimizer = fabric.setup(model, recipe.make_optimizer(model))

        def act(tokens: torch.Tensor) -> tuple[float, bool]:
            own = tokens[fabric.global_rank :: 2]
            loss = _loss(wrapped(own), own)
            before = fabric.precision.state_dict().get("scale", OVERFLOWING)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return fabric.all_reduce(loss.detach()).item(), fabric.precision.state_dict()["scale"] < before

        done = _scaled_steps(recipe, act)
        state = fabric.strategy.module_state(model, full=True)
        return done._replace(state={name: value.numpy() for name, value in state.items()})


def _scaled_by_hand(recipe: Recipe) -> Scaled:
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(7)
    model: Any = Transformer()
    types: dict[str, Any] = {"param_dtype": torch.float16, "reduce_dtype": torch.float32}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(**types))
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(**types, output_dtype=torch.float32))
    optimizer = recipe.make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=OVERFLOWING)

    def act(tokens: torch.Tensor) -> tuple[float, bool]:
        own = tokens[dist.get_rank() :: 2]
        loss = _loss(model(own), own)
        before = scaler.get_scale()
        torch.autograd.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        return (mean / 2).item(), scaler.get_scale() < before

    done = _scaled_steps(recipe, act)
    state = {name: value.full_tensor().numpy() for name, value in model.state_dict().items()}
    dist.destroy_process_group()
    return done._replace(state=state)


def _scaled_plainly(recipe: Recipe, skipped: list[int]) -> Scaled:
    """Train in one process, without overflow, and leave out the steps that somebody else skipped."""
    torch.manual_seed(7)
    model = Transformer()
    optimizer = recipe.make_optimizer(model)
    steps = iter(range(STEPS))

    def act(tokens: torch.Tensor) -> tuple[float, bool]:
        with torch.autocast("cpu", torch.float16):
            loss = _loss(model(tokens), tokens)
        torch.autograd.backward(loss * SCALE)
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad.div_(SCALE)
        left_out = next(steps) in skipped
        if not left_out:
            optimizer.step()
        optimizer.zero_grad()
        return loss.item(), left_out

    return _scaled_steps(recipe, act)


@pytest.mark.parametrize("recipe", [Recipe(optimizer="sgd"), Recipe(fused=False)], ids=str)
def test_overflows_under_fsdp(recipe: Recipe, two_ranks: RankPool) -> None:
    """Where the first steps overflow, the same are skipped, and all else is bit for bit, as with FSDP2 and GradScaler.

    That the losses differ from one process' comes from the skipped steps: without them, they agree as they do above.
    """
    got, hand = two_ranks.run(_scaled_by_fabric, recipe)[0], two_ranks.run(_scaled_by_hand, recipe)[0]
    assert got.skipped
    assert (got.losses, got.skipped) == (hand.losses, hand.skipped)
    for name, value in hand.state.items():
        assert (got.state[name] == value).all(), name
    torch.testing.assert_close(got.losses, _scaled_plainly(recipe, got.skipped).losses, rtol=0, atol=5e-2)
    assert max(abs(a - b) for a, b in zip(got.losses, _scaled_plainly(recipe, []).losses, strict=True)) > 5e-2
