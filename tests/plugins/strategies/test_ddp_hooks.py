"""DDP's communication hooks, by name."""

from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool, RankRaised
from fabric_core.errors import OptionError


def _gradient(hook: str) -> Any:
    with Fabric(accelerator="cpu", strategy=f"ddp:ddp_comm_hook={hook}", devices=2) as fabric:
        fabric.launch()
        model = nn.Linear(1, 1, bias=False)
        wrapped = fabric.setup(model)
        # 1 + 2^-12 is no 16-bit number; its half comes from rank 1 alone.
        fabric.backward(wrapped(torch.full((1, 1), fabric.global_rank * (2 + 2**-11))).sum())
        assert model.weight.grad is not None
        return model.weight.grad.item()


@pytest.mark.parametrize(("hook", "gradient"), [("none", 1 + 2**-12), ("fp16", 1.0), ("powersgd", 1 + 2**-12)])
def test_gradients_travel_as_the_hook_says(hook: str, gradient: float, two_ranks: RankPool) -> None:
    """In 16 bits the average loses what 16 bits can't hold; PowerSGD's first steps are ordinary ones."""
    assert two_ranks.run(_gradient, hook) == [gradient, gradient]


def test_a_hook_that_the_backend_cannot_carry_out_is_refused(two_ranks: RankPool) -> None:
    """With gloo, bfloat16 is refused at ``setup``, with the reason and the option to change."""
    with pytest.raises(RankRaised, match=r"'bf16' can't be used here[\s\S]*backend gloo[\s\S]*ddp_comm_hook=\"none\""):
        two_ranks.run(_gradient, "bf16")


def _gradient_where_the_build_has_nccl() -> Any:
    from unittest import mock

    # What PyTorch asks of a CUDA build.
    with (
        mock.patch("torch.version.cuda", "13.0"),
        mock.patch("torch.distributed.is_nccl_available", return_value=True),
        mock.patch("torch.cuda.nccl.version", return_value=(2, 30)),
    ):
        return _gradient("bf16")


def test_what_the_build_could_do_with_another_backend_does_not_count(two_ranks: RankPool) -> None:
    """A build with CUDA and NCCL refuses it as well where the process group is gloo's, and names that backend."""
    with pytest.raises(RankRaised, match=r"gradients on cpu travel by gloo[\s\S]*ddp_comm_hook=\"none\""):
        two_ranks.run(_gradient_where_the_build_has_nccl)


def test_an_unknown_hook_is_refused_at_construction() -> None:
    """A name that is no hook is an error of the option."""
    with pytest.raises(OptionError, match="ddp_comm_hook"):
        Fabric(accelerator="cpu", strategy="ddp:ddp_comm_hook=int8", devices=2)
