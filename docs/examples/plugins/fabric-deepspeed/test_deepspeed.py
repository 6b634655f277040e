"""The strategies of DeepSpeed train as plain DeepSpeed does, and their checkpoints go from and to other strategies."""

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("deepspeed")

from fabric_deepspeed import DeepSpeedStrategy

from fabric_core import Fabric
from fabric_core.conformance import RankPool, suite
from fabric_core.errors import MisuseError, SetupError, UnavailableError

STAGES = ["deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3"]


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Compile DeepSpeed's communication, for which the kit's ranks would not wait long enough."""
    # ninja, which compiles it, lies beside the interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with Fabric(accelerator="cpu", devices=1, strategy="deepspeed") as fabric:
        fabric.launch()


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    """Give two ranks."""
    with RankPool(2, parents=True) as pool:
        yield pool


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 15), nn.Tanh(), nn.Linear(15, 3))  # sizes that two ranks can't halve


def _batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def _whole(fabric: Fabric, model: nn.Module) -> dict[str, torch.Tensor]:
    return fabric.strategy.module_state(model, True)


def _steps(fabric: Fabric, wrapped: Any, optimizer: Any, steps: range, clip: float | None, passes: int) -> list[float]:
    norms = []
    for step in steps:
        for one in range(passes):
            with fabric.no_backward_sync(wrapped, enabled=one < passes - 1):
                fabric.backward(wrapped(_batch(step + 100 * one, fabric.global_rank)).square().mean() / passes)
        if clip is not None:
            norm = fabric.clip_gradients(wrapped, optimizer, max_norm=clip)
            assert norm is not None
            norms.append(norm.item())
        optimizer.step()
        optimizer.zero_grad()
    return norms


def _by_fabric(
    strategy: Any, clip: float | None = None, passes: int = 1
) -> tuple[dict[str, torch.Tensor], list[float]]:
    with Fabric(accelerator="cpu", devices=2, strategy=strategy) as fabric:
        fabric.launch()
        model = _model()
        wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.05))
        norms = _steps(fabric, wrapped, optimizer, range(4), clip, passes)
        return _whole(fabric, model), norms


def _by_deepspeed(stage: int, clip: float | None) -> dict[str, torch.Tensor]:
    """Train with plain DeepSpeed, in a process group that Fabric doesn't know of."""
    import deepspeed
    import torch.distributed as dist

    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", store=dist.PrefixStore(f"plain-{stage}", store), rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", dist_init_required=False)
    model = _model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": clip or 0.0,
        },
    )
    for step in range(4):
        engine.backward(engine(_batch(step, rank)).square().mean())
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        state = {name: one.detach().clone() for name, one in model.state_dict().items()}
    engine.destroy()
    deepspeed.comm.destroy_process_group()
    return state


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **how: float) -> None:
    torch.testing.assert_close(one, other, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_it_trains_as_plain_deepspeed(ranks: RankPool, stage: int) -> None:
    """Parameters are equal after some steps; clipped, to what another order of sums makes of the norm."""
    for clip, atol in ((None, 0), (0.01, 1e-6)):
        (got, _), (other, _) = ranks.run(_by_fabric, f"deepspeed_stage_{stage}", clip)
        _same(got, other, rtol=0, atol=0)
        _same(got, ranks.run(_by_deepspeed, stage, clip)[0], rtol=0, atol=atol)


@pytest.mark.parametrize("strategy", STAGES)
def test_it_trains_as_ddp(ranks: RankPool, strategy: str) -> None:
    """Also where several backward passes come before a step, and the norm that clipping returns is the same."""
    (got, norms), _ = ranks.run(_by_fabric, strategy, 0.05, 3)
    (expected, others), _ = ranks.run(_by_fabric, "ddp", 0.05, 3)
    _same(got, expected, rtol=1e-4, atol=1e-5)
    assert norms == pytest.approx(others, rel=1e-4)


def _offloaded(stage: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    return _by_fabric(DeepSpeedStrategy(stage=stage, offload_optimizer=True), 0.05, 3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_with_optimizer_states_on_the_host_it_trains_as_ddp(ranks: RankPool, stage: int) -> None:
    """Also after a step, when the optimizer has let go of what DeepSpeed writes gradients into."""
    (got, norms), _ = ranks.run(_offloaded, stage)
    (expected, others), _ = ranks.run(_by_fabric, "ddp", 0.05, 3)
    _same(got, expected, rtol=1e-4, atol=1e-5)
    assert norms == pytest.approx(others, rel=1e-4)


@pytest.mark.parametrize("strategy", STAGES)
def test_one_process_trains_alone(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing launched it, so that no variable tells DeepSpeed who it is; nothing is clipped unasked."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    got, expected = (_alone(one) for one in (strategy, "ddp"))
    _same(got, expected, rtol=1e-4, atol=1e-5)
    assert "LOCAL_RANK" not in os.environ


def _alone(strategy: str) -> dict[str, torch.Tensor]:
    with Fabric(accelerator="cpu", devices=1, strategy=strategy) as fabric:
        fabric.launch()
        model = _model()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.01))
        for step in range(4):
            fabric.backward(100 * wrapped(_batch(step, 0)).square().mean())  # a norm that DeepSpeed would clip
            optimizer.step()
            optimizer.zero_grad()
        return _whole(fabric, model)


def _cleared(strategy: str) -> dict[str, torch.Tensor]:
    with Fabric(accelerator="cpu", devices=2, strategy=strategy) as fabric:
        fabric.launch()
        model = _model()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
        for enabled in (True, False):
            with fabric.no_backward_sync(wrapped, enabled=enabled):
                fabric.backward(wrapped(_batch(9, fabric.global_rank)).square().mean())
            optimizer.zero_grad()
        _steps(fabric, wrapped, optimizer, range(2), None, 2)
        return _whole(fabric, model)


@pytest.mark.parametrize("strategy", STAGES)
def test_cleared_gradients_are_gone(ranks: RankPool, strategy: str) -> None:
    """Those that were accumulated, and those that were averaged already."""
    _same(ranks.run(_cleared, strategy)[0], ranks.run(_cleared, "ddp")[0], rtol=1e-4, atol=1e-5)


def _resumed(first: str, second: str, path: str) -> dict[str, torch.Tensor]:
    for strategy, steps in ((first, range(2)), (second, range(2, 4))):
        with Fabric(accelerator="cpu", devices=2, strategy=strategy) as fabric:
            fabric.launch()
            model = _model()
            wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.05))
            if steps.start:
                fabric.load(path, {"model": wrapped, "optimizer": optimizer})
            _steps(fabric, wrapped, optimizer, steps, None, 1)
            if not steps.start:
                fabric.save(path, {"model": wrapped, "optimizer": optimizer})
            whole = _whole(fabric, model)
    return whole


@pytest.mark.parametrize(
    "pair", [(STAGES[0], STAGES[0]), (STAGES[1], "ddp"), ("ddp", STAGES[2]), (STAGES[2], STAGES[0])], ids="-".join
)
def test_a_training_goes_on_from_a_checkpoint(ranks: RankPool, pair: tuple[str, str], tmp_path: Path) -> None:
    """Two steps, a file, and two steps under the same or another strategy end where four steps end."""
    got, _ = ranks.run(_resumed, *pair, str(tmp_path / "checkpoint"))
    (expected, _), _ = ranks.run(_by_fabric, "ddp")
    _same(got, expected, rtol=1e-4, atol=1e-5)


def _several_passes(strategy: str) -> tuple[dict[str, torch.Tensor], float]:
    """Run passes of one graph, of two graphs at once, and after a clipping, by another norm and by value."""
    with Fabric(accelerator="cpu", devices=1 if strategy == "single_device" else 2, strategy=strategy) as fabric:
        fabric.launch()
        model = _model()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        own = range(2) if fabric.world_size == 1 else [fabric.global_rank]
        for step in range(3):
            x = torch.cat([_batch(step, rank) for rank in own])
            loss = wrapped(x).square().mean()
            fabric.backward(loss, retain_graph=True)
            fabric.backward(loss, gradient=torch.tensor(2.0))
            one, other = wrapped(x).mean(), wrapped(x + 1).square().mean()
            fabric.backward(one)
            fabric.backward(other)
            norm = fabric.clip_gradients(wrapped, optimizer, max_norm=0.5, norm_type=3.0)
            fabric.backward(wrapped(x - 1).square().mean())
            fabric.clip_gradients(wrapped, optimizer, clip_val=0.05)
            optimizer.step()
            optimizer.zero_grad()
        assert norm is not None
        return _whole(fabric, model), norm.item()


@pytest.mark.parametrize("strategy", STAGES)
def test_passes_before_a_step_add_up(ranks: RankPool, strategy: str) -> None:
    """As in one process; also those of one graph, of two graphs at once, and after a clipping."""
    got, norm = ranks.run(_several_passes, strategy)[0]
    expected, other = _several_passes("single_device")
    _same(got, expected, rtol=1e-4, atol=1e-5)
    assert norm == pytest.approx(other, rel=1e-4)


def _refused() -> list[str]:
    seen = []
    with Fabric(accelerator="cpu", devices=2, strategy="deepspeed") as fabric:
        fabric.launch()
        model, other = _model(), _model()
        for wrong in (
            lambda: fabric.setup_module(_model()),
            lambda: fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=0.1)),
        ):
            with pytest.raises(SetupError) as caught:
                wrong()
            seen.append(caught.value.instead or "")
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        fabric.backward(model[0](_batch(0, 0)).sum())
        with pytest.raises(MisuseError, match="no rank used") as unused:
            optimizer.step()
        second, _ = fabric.setup(other, torch.optim.SGD(other.parameters(), lr=0.1))
        with pytest.raises(MisuseError, match="2 of 2 models"):
            fabric.backward(wrapped(_batch(0, 0)).sum() + second(_batch(0, 0)).sum(), model=wrapped)
        return [*seen, str(unused.value.got)]


def test_what_the_engine_can_t_do_is_refused(ranks: RankPool) -> None:
    """With what to write instead."""
    for alone, apart, unused in ranks.run(_refused):
        assert alone.startswith("fabric.setup(model, optimizer)")
        assert apart == "fabric.setup(model, optimizer)"
        assert unused == "2.weight, 2.bias"


def _unused() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    with Fabric(accelerator="cpu", devices=2, strategy=DeepSpeedStrategy(zero_unused=True)) as fabric:
        fabric.launch()
        model = _model()
        before = {name: one.detach().clone() for name, one in model.named_parameters()}
        _, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5))
        fabric.backward(model[0](_batch(0, 0)).sum())
        optimizer.step()
        return before, _whole(fabric, model)


def test_an_unused_parameter_steps_with_zeros_where_that_is_asked_for(ranks: RankPool) -> None:
    """As in plain DeepSpeed: decay moves it."""
    before, after = ranks.run(_unused)[0]
    _same({"": after["2.weight"]}, {"": before["2.weight"] * 0.95}, rtol=1e-5, atol=1e-6)


def _locked(folder: str) -> str:
    with pytest.MonkeyPatch.context() as patch, Fabric(accelerator="cpu", devices=2, strategy="deepspeed") as fabric:
        patch.setenv("TORCH_EXTENSIONS_DIR", folder)
        with pytest.raises(UnavailableError) as caught:
            fabric.launch()
        return f"{caught.value.where}"


def test_a_compilation_that_was_killed_is_named(ranks: RankPool, tmp_path: Path) -> None:
    """DeepSpeed would wait for its lock without an end."""
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 1000, time.time() - 1000))
    assert ranks.run(_locked, str(tmp_path)) == [str(lock), str(lock)]


test_rules_stage_1 = suite("strategy", "deepspeed_stage_1")
test_rules_stage_2 = suite("strategy", "deepspeed_stage_2")
test_rules_stage_3 = suite("strategy", "deepspeed_stage_3")
