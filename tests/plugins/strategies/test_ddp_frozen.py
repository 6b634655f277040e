"""What is frozen when DDP is set up, and what happens to it later."""

import functools
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised

_MAKE_SGD = functools.partial(torch.optim.SGD, lr=0.5)


def _x() -> torch.Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def _model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))


def _frozen_teacher() -> Any:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        teacher = _model(fabric.global_rank).requires_grad_(requires_grad=False)
        return fabric.setup(teacher).eval()(_x()).tolist()


def test_a_frozen_model_has_rank_zero_s_values(two_ranks: RankPool) -> None:
    """A teacher, made from another seed on every rank, answers the same on each: what rank 0's answers."""
    expected = _model(0).eval()(_x()).tolist()
    assert two_ranks.run(_frozen_teacher) == [expected, expected]


def _thaw(part: str) -> None:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        raw = _model(0)
        thawed = raw if part == "all" else raw[2]
        thawed.requires_grad_(requires_grad=False)
        model = fabric.setup(raw)
        thawed.requires_grad_(requires_grad=True)
        with torch.no_grad():
            model(_x())  # asks for no gradients
        model(_x())


@pytest.mark.parametrize("part", ["all", "head"])
def test_thawing_after_setup_is_refused(part: str, two_ranks: RankPool) -> None:
    """A gradient that would never be averaged is refused in the forward pass, with the parameter's name."""
    with pytest.raises(RankRaised) as caught:
        two_ranks.run(_thaw, part)
    for error in caught.value.errors:
        assert error is not None
        assert "MisuseError: parameters became trainable after setup" in error
        assert "2.weight, 2.bias" in error
        assert ("0.weight" in error) == (part == "all")


def _gradual(fabric: Fabric | None) -> list[Any]:
    raw = _model(0)
    batch = _x()
    if fabric is None:
        model: Any = raw
        optimizer: Any = _MAKE_SGD(raw.parameters())
    else:
        model, optimizer = fabric.setup(raw, _MAKE_SGD(raw.parameters()))
    raw[0].requires_grad_(requires_grad=False)
    for step in range(4):
        if step == 2:
            raw[0].requires_grad_(requires_grad=True)
        loss = model.eval()(batch).square().mean()
        torch.autograd.backward(loss) if fabric is None else fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.tolist() for parameter in raw.parameters()]


def _gradual_by_ddp() -> list[Any]:
    with Fabric(accelerator="cpu", strategy="ddp:find_unused_parameters=true", devices=2) as fabric:
        fabric.launch()
        return _gradual(fabric)


def test_freezing_after_setup_is_what_to_do_instead(two_ranks: RankPool) -> None:
    """What is frozen between ``setup`` and training stays as it is, and trains as in one process once it is thawed."""
    expected = _gradual(None)
    for got in two_ranks.run(_gradual_by_ddp):
        for mine, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(theirs))


def _after_teardown(part: str) -> Any:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        raw = _model(0)
        model = fabric.setup(raw)
        fabric.backward(model(_x()).sum())
    if part == "train":
        model(_x())
    with torch.no_grad():
        return torch.equal(model(_x()), raw(_x()))


def test_after_the_teardown_a_model_still_answers(two_ranks: RankPool) -> None:
    """Without gradients the model runs as the bare one; training, which would be each rank's own, is refused."""
    assert two_ranks.run(_after_teardown, "evaluate") == [True, True]
    with pytest.raises(RankRaised, match=r"no other processes any more[\s\S]*torch\.no_grad"):
        two_ranks.run(_after_teardown, "train")
