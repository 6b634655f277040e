"""The wrappers by bitsandbytes shrink frozen layers, and train what is not frozen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fabric_bnb import FourBitWrapper
from torch import nn

pytest.importorskip("bitsandbytes")

from fabric_core import Fabric
from fabric_core.conformance import suite

test_rules = suite("wrapper", "bnb_nf4")


class Adapted(nn.Module):
    """A frozen layer with a trained one beside it, and a frozen one whose rows are too short."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.adapter = nn.Linear(64, 64)
        self.short = nn.Linear(3, 64).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add all."""
        y: torch.Tensor = self.frozen(x) + self.adapter(x) + self.short(x[:, :3])
        return y


def _trained(fabric: Fabric, model: Adapted) -> tuple[Any, Any]:
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.adapter.parameters(), lr=0.1))
    fabric.backward(wrapped(torch.ones(8, 64)).square().mean())
    optimizer.step()
    return wrapped, optimizer


@pytest.mark.parametrize("wrapper", ["bnb_nf4", "bnb_fp4", "bnb_nf4:double_quant=true"])
def test_frozen_layers_shrink_and_others_train(wrapper: str) -> None:
    """The frozen weight takes an eighth of the memory, its output is near; the adapter learns."""
    with Fabric(accelerator="cpu", devices=1, wrappers=[wrapper]) as fabric:
        model = Adapted()
        x = torch.randn(8, 64)
        before, weight = model.frozen(x), model.adapter.weight.detach().clone()
        _trained(fabric, model)
        packed: Any = model.frozen.weight
        assert packed.numel() * packed.element_size() == 64 * 64 // 2
        assert type(model.adapter) is nn.Linear
        assert type(model.short) is nn.Linear
        near = nn.functional.cosine_similarity(model.frozen(x), before).min().item()
        assert near > 0.98
        assert not torch.equal(model.adapter.weight, weight)


def test_it_goes_with_a_precision() -> None:
    """With bfloat16 parameters the frozen layer computes in bfloat16."""
    with Fabric(accelerator="cpu", devices=1, precision="bf16-true", wrappers=["bnb_nf4"]) as fabric:
        model = Adapted()
        _trained(fabric, model)
        assert model.frozen(torch.randn(8, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_named_layers_are_left() -> None:
    """A skipped layer stays a plain one."""
    with Fabric(accelerator="cpu", devices=1, wrappers=[FourBitWrapper(skip=("frozen",))]) as fabric:
        model = Adapted()
        _trained(fabric, model)
        assert type(model.frozen) is nn.Linear


def test_a_checkpoint_holds_the_4_bits(tmp_path: Path) -> None:
    """What is saved loads into a fresh model, and computes the same."""
    outputs = []
    for first in (True, False):
        with Fabric(accelerator="cpu", devices=1, wrappers=["bnb_nf4"]) as fabric:
            model = Adapted()
            wrapped, optimizer = _trained(fabric, model)
            if first:
                fabric.save(tmp_path / "state", {"model": wrapped, "optimizer": optimizer})
            else:
                with torch.no_grad():
                    model.adapter.weight.zero_()
                fabric.load(tmp_path / "state", {"model": wrapped, "optimizer": optimizer})
            outputs.append(wrapped(torch.ones(8, 64)).detach())
    assert torch.equal(*outputs)
