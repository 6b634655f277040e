"""16-mixed: what a script may do around the scaled loss."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_core.errors import CheckpointError, MisuseError, OptionError
from fabric_plugins.precisions import BFloat16MixedPrecision, Float16MixedPrecision, MixedPrecision
from fabric_plugins.strategies import ModelParallelStrategy


def fabric_of(**options: Any) -> Fabric:
    """Make a façade on one process."""
    return Fabric(accelerator="cpu", devices=1, precision=Float16MixedPrecision(**options))


def quadratic() -> tuple[nn.Linear, Tensor, Tensor]:
    """Make a least-squares problem that has an exact solution."""
    torch.manual_seed(5)
    x = torch.randn(32, 3)
    return nn.Linear(3, 1), x, x @ torch.tensor([[1.0], [-2.0], [0.5]])


def overflow_once(strategy: str, devices: int, bad_rank: int) -> tuple[float, list[Tensor], list[Tensor]]:
    """Let the gradients of one rank overflow; give the scale, and the parameters before and after the step."""
    chosen: Any = strategy
    if strategy == "model_parallel":
        chosen = ModelParallelStrategy(parallelize_fn=by_columns, tensor_parallel_size=2)
    with Fabric(
        accelerator="cpu", strategy=chosen, devices=devices, precision=Float16MixedPrecision(init_scale=8.0)
    ) as fabric:
        fabric.launch()
        return _overflow(fabric, bad_rank)


def by_columns(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the only layer over the ranks."""
    parallelize_module(model, mesh["tensor_parallel"], {"0": ColwiseParallel(output_layouts=Replicate())})


def _overflow(fabric: Fabric, bad_rank: int) -> tuple[float, list[Tensor], list[Tensor]]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 4))
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
    before = [whole(one) for one in model.parameters()]
    loss = wrapped(torch.ones(2, 4)).sum()
    if fabric.global_rank == bad_rank:  # not in the loss: tensor-parallel ranks have one loss together
        weight = next(model.parameters())
        weight.register_hook(lambda gradient: gradient * math.inf)  # torch's
    fabric.backward(loss)
    optimizer.step()
    return fabric.precision.state_dict()["scale"], before, [whole(one) for one in model.parameters()]


def whole(tensor: Tensor) -> Tensor:
    """Give a whole copy of a tensor that may be sharded."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "model_parallel"])
def test_an_overflow_on_one_rank_skips_the_step_on_all(strategy: str, two_ranks: RankPool) -> None:
    """Both ranks keep their parameters and halve the scale."""
    for scale, before, after in two_ranks.run(overflow_once, strategy, 2, 1):
        assert scale == 4.0
        assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))
    for scale, before, after in two_ranks.run(overflow_once, strategy, 2, -1):
        assert scale == 8.0
        assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def _beside_another(strategy: str) -> float:
    """Accumulate in one model, while another's steps let the scale grow; gives the norm of the gradients."""
    precision = Float16MixedPrecision(init_scale=64.0, growth_interval=1)
    with Fabric(accelerator="cpu", strategy=strategy, devices=2, precision=precision) as fabric:
        fabric.launch()
        torch.manual_seed(5)
        models = [nn.Linear(4, 4), nn.Linear(4, 4)]
        (one, first), (other, second) = (
            fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.0)) for model in models
        )
        for number in range(3):
            with fabric.no_backward_sync(one, enabled=number < 2):
                fabric.backward(one(torch.ones(2, 4)).sum())
            fabric.backward(other(torch.ones(2, 4)).sum())
            second.step()
            second.zero_grad()
        norm = fabric.clip_gradients(one, first, max_norm=1e9)
        assert norm is not None
        return norm.item()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gradients_left_apart_stay_true_while_the_scale_grows(strategy: str, two_ranks: RankPool) -> None:
    """Three losses at three scales add up to three times one loss' gradients."""
    # Each of the 16 weights and 4 biases has the gradient 2 per loss: the sum over a batch of two ones.
    assert two_ranks.run(_beside_another, strategy) == [pytest.approx(6 * math.sqrt(20))] * 2


def test_an_optimizer_may_evaluate_its_closure_many_times() -> None:
    """LBFGS comes to the solution, and a step of twenty evaluations is one iteration."""
    model, x, y = quadratic()
    with fabric_of(init_scale=256.0, growth_interval=3) as fabric:
        wrapped, optimizer = fabric.setup(model, torch.optim.LBFGS(model.parameters(), lr=0.5))
        calls = 0

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(wrapped(x), y)
            fabric.backward(loss)
            return loss

        step: Any = optimizer.step
        first = step(closure).item()
        assert calls > 2
        assert fabric.precision.state_dict()["_growth_tracker"] == 1
        optimizer.step(closure)
        last = optimizer.step(closure).item()
        assert fabric.precision.state_dict()["scale"] == 512.0
    assert first > 1.0
    assert last < 1e-4


def test_an_overflow_inside_a_step_is_an_error() -> None:
    """Where an optimizer has begun its step, an overflow can't be skipped any more, so it raises; the scale falls."""
    model = nn.Linear(1, 1)
    with fabric_of(init_scale=8.0) as fabric:
        wrapped, optimizer = fabric.setup(model, torch.optim.LBFGS(model.parameters()))
        factors = iter([1.0, math.inf])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = wrapped(torch.ones(1, 1)).square().sum()
            fabric.backward(loss * next(factors))
            return loss

        with pytest.raises(MisuseError, match="overflowed after the optimizer had begun its step"):
            optimizer.step(closure)
        assert fabric.precision.state_dict()["scale"] == 4.0


def test_a_skipped_closure_returns_none_and_calls_no_step() -> None:
    """As a step without a closure does; the next one steps."""
    model = nn.Linear(1, 1)
    with fabric_of() as fabric:
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        factors = iter([math.inf, 1.0])

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = wrapped(torch.ones(1, 1)).sum()
            fabric.backward(loss * next(factors))
            return loss

        before = model.weight.detach().clone()
        assert optimizer.step(closure) is None
        assert torch.equal(before, model.weight)
        assert optimizer.step(closure) is not None
        assert not torch.equal(before, model.weight)


def test_gradients_without_a_scaled_loss_are_refused() -> None:
    """`loss.backward()` in the place of `fabric.backward(loss)`, or a second step, is not silently wrong."""
    model = nn.Linear(2, 1)
    with fabric_of(init_scale=8.0) as fabric:
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        optimizer.step()  # nothing to step on
        fabric.backward(wrapped(torch.ones(1, 2)).sum())
        optimizer.step()
        with pytest.raises(MisuseError, match=r"instead: fabric\.backward\(loss\) before each step"):
            optimizer.step()


def test_clipping_raises_for_an_overflow_only_when_asked() -> None:
    """The scaler skips what overflowed; asked for, or without a scaler, a norm that is not finite is an error."""
    model = nn.Linear(2, 1)
    with fabric_of() as fabric:
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        before = model.weight.detach().clone()
        fabric.backward(wrapped(torch.ones(1, 2)).sum() * math.inf)
        norm = fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
        assert norm is not None
        assert not torch.isfinite(norm)
        with pytest.raises(RuntimeError, match="non-finite"):
            fabric.clip_gradients(wrapped, optimizer, max_norm=1.0, error_if_nonfinite=True)
        optimizer.step()
        assert torch.equal(before, model.weight)
    plain = nn.Linear(2, 1)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        wrapped, optimizer = fabric.setup(plain, torch.optim.SGD(plain.parameters(), lr=0.1))
        fabric.backward(wrapped(torch.ones(1, 2)).sum() * math.inf)
        with pytest.raises(RuntimeError, match="non-finite"):
            fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)


def two_weights() -> tuple[nn.Module, torch.optim.Optimizer, torch.optim.Optimizer]:
    """Make a model of two layers, and an optimizer for each."""
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in model)
    return model, first, second


def test_an_overflow_that_was_clipped_away_still_skips_the_step() -> None:
    """Clipping by value makes an infinite gradient finite, more gradients are added; the step is skipped anyway."""
    model = nn.Linear(1, 1)
    with fabric_of(init_scale=8.0) as fabric:
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        before = model.weight.detach().clone()
        fabric.backward(wrapped(torch.ones(1, 1)).sum() * math.inf)
        fabric.clip_gradients(wrapped, optimizer, clip_val=1.0)
        assert all(parameter.grad is not None and parameter.grad.isfinite() for parameter in model.parameters())
        fabric.backward(wrapped(torch.ones(1, 1)).sum())
        optimizer.step()
        assert torch.equal(before, model.weight)
        assert fabric.precision.state_dict()["scale"] == 4.0


def test_an_overflow_belongs_to_its_iteration() -> None:
    """Gradients that overflowed, were clipped and then cleared don't skip a step of a later iteration."""
    model, *optimizers = two_weights()
    with fabric_of(init_scale=8.0) as fabric:
        wrapped, first, second = fabric.setup(model, *optimizers)
        fabric.backward(wrapped(torch.ones(1, 1)).sum() * math.inf)
        fabric.clip_gradients(wrapped, second, clip_val=1.0)
        first.step()
        first.zero_grad()
        second.zero_grad()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        fabric.backward(wrapped(torch.ones(1, 1)).sum())
        first.step()
        second.step()
        assert not any(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def test_steps_without_gradients_say_nothing_about_the_scale() -> None:
    """Only iterations with gradients count towards the scale's growth."""
    model, *optimizers = two_weights()
    with fabric_of() as fabric:
        wrapped, first, second = fabric.setup(model, *optimizers)
        for parameter in model.get_submodule("1").parameters():
            parameter.requires_grad_(False)
        fabric.backward(wrapped(torch.ones(1, 1)).sum() / 64)
        second.step()
        assert fabric.precision.state_dict()["_growth_tracker"] == 0
        first.step()
        assert fabric.precision.state_dict()["_growth_tracker"] == 1


def test_a_closure_computes_gradients_where_they_are_switched_off() -> None:
    """As in PyTorch's own optimizers, a step under `no_grad` runs its closure with gradients."""
    model = nn.Linear(1, 1)
    with fabric_of(init_scale=8.0) as fabric:
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))

        def closure() -> Tensor:
            loss: Tensor = wrapped(torch.ones(1, 1)).sum()
            fabric.backward(loss)
            return loss

        before = model.weight.detach().clone()
        with torch.no_grad():
            optimizer.step(closure)
        assert not torch.equal(before, model.weight)


def test_a_loaded_scale_is_the_next_losses() -> None:
    """What was stepped before the load has no say in it."""
    model = nn.Linear(1, 1)
    with fabric_of(init_scale=8.0) as fabric:
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        start = fabric.precision.state_dict()
        fabric.backward(wrapped(torch.ones(1, 1)).sum() * math.inf)
        optimizer.step()
        fabric.precision.load_state_dict(start)
        assert fabric.precision.state_dict() == start


def test_sparse_gradients_are_unscaled() -> None:
    """An embedding with sparse gradients trains as it does without scaling."""
    results = []
    for precision in ("32-true", Float16MixedPrecision(init_scale=64.0)):
        torch.manual_seed(2)
        model = nn.Embedding(5, 3, sparse=True)
        with Fabric(accelerator="cpu", devices=1, precision=precision) as fabric:
            wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.5))
            fabric.backward(wrapped(torch.tensor([1, 1, 4])).square().sum())
            optimizer.step()
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)


def test_a_checkpoint_brings_the_scale_back(tmp_path: Path) -> None:
    """The state saved is that of a `GradScaler` after `update`; a new run goes on with it, and with its own options."""
    model = nn.Linear(2, 1)
    with fabric_of(init_scale=64.0, growth_interval=2) as fabric:
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for factor in (math.inf, 1.0, 1.0, 1.0):
            optimizer.zero_grad()
            fabric.backward(wrapped(torch.ones(1, 2)).sum() * factor)
            optimizer.step()
        fabric.save(tmp_path / "run.ckpt", {"model": wrapped})
    by_hand = torch.amp.GradScaler("cpu")
    by_hand.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["fabric.precision"])
    assert (by_hand.get_scale(), by_hand.get_growth_interval(), by_hand._get_growth_tracker()) == (64.0, 2, 1)
    with fabric_of(growth_interval=7) as fabric:
        wrapped = fabric.setup(nn.Linear(2, 1))
        rest = fabric.load(tmp_path / "run.ckpt", {"model": wrapped})
        assert rest == {}
        state = fabric.precision.state_dict()
        assert (state["scale"], state["growth_interval"], state["_growth_tracker"]) == (64.0, 7, 1)
    with Fabric(accelerator="cpu", devices=1, precision="bf16-mixed") as fabric:
        assert fabric.load(tmp_path / "run.ckpt", {"model": fabric.setup(nn.Linear(2, 1))}) == {}


def test_the_name_of_the_precisions_entry_is_reserved(tmp_path: Path) -> None:
    """A state that uses it is refused before anything is written."""
    with Fabric(accelerator="cpu", devices=1) as fabric, pytest.raises(CheckpointError, match="reserved"):
        fabric.save(tmp_path / "run.ckpt", {"fabric.precision": 1})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["16-mixed:init_scale=0", "16-mixed:growth_factor=1", "16-mixed:backoff_factor=1.5"])
def test_options_that_would_never_work_are_refused(text: str) -> None:
    """A scale of zero, or factors the wrong way round."""
    with pytest.raises(OptionError):
        Fabric(accelerator="cpu", devices=1, precision=text)


def test_lightnings_class_takes_a_scalers_numbers_and_refuses_what_it_has_no_use_for() -> None:
    """All four numbers of the scaler; it is refused with bfloat16, as is every other name."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_factor=3.0, backoff_factor=0.25, growth_interval=7)
    taken = MixedPrecision("16-mixed", "cpu", scaler)
    numbers = {"init_scale": 8.0, "growth_factor": 3.0, "backoff_factor": 0.25, "growth_interval": 7}
    assert taken.options.model_dump(exclude={"cast_inputs"}) == numbers
    assert MixedPrecision("16-mixed", "cpu").options == Float16MixedPrecision().options
    assert isinstance(MixedPrecision("bf16-mixed", "cpu"), BFloat16MixedPrecision)
    for name, given in (("bf16-mixed", scaler), ("32-true", None)):
        with pytest.raises(ValueError, match=f"takes 16-mixed, or bf16-mixed without a scaler, and got '{name}'"):
            MixedPrecision(name, "cpu", given)
