"""The precisions by bitsandbytes shrink frozen layers, and train what is not frozen."""

from typing import Any

import pytest
import torch
from fabric_bnb import FourBitPrecision
from torch import nn

pytest.importorskip("bitsandbytes")

from fabric_core import Fabric
from fabric_core.conformance import suite

test_rules = suite(
    "precision",
    "bnb-nf4",
    xfail={
        "PRE-203": "frozen weights lie in 4 bits, packed into bytes; a policy has no word for that",
        "PRE-205": "4 bits hold sixteen values: what is read back is near, and not the same",
    },
)


class Adapted(nn.Module):
    """A frozen layer with a trained one beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.adapter = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add both."""
        y: torch.Tensor = self.frozen(x) + self.adapter(x)
        return y


@pytest.mark.parametrize("precision", ["bnb-nf4", "bnb-fp4", "bnb-nf4:double_quant=true"])
def test_frozen_layers_shrink_and_others_train(precision: str) -> None:
    """The frozen weight takes an eighth of the memory, its output is near; the adapter learns."""
    with Fabric(accelerator="cpu", devices=1, precision=precision) as fabric:
        model = Adapted()
        x = torch.randn(8, 64)
        before, weight = model.frozen(x), model.adapter.weight.detach().clone()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.adapter.parameters(), lr=0.1))
        packed: Any = model.frozen.weight
        assert packed.numel() * packed.element_size() == 64 * 64 // 2
        assert type(model.adapter) is nn.Linear
        near = nn.functional.cosine_similarity(model.frozen(x), before).min().item()
        assert near > 0.98
        fabric.backward(wrapped(x).square().mean())
        optimizer.step()
        assert not torch.equal(model.adapter.weight, weight)


def test_named_layers_are_left() -> None:
    """A skipped layer stays a plain one."""
    with Fabric(accelerator="cpu", devices=1, precision=FourBitPrecision(skip=("frozen",))) as fabric:
        model = Adapted()
        fabric.setup(model, torch.optim.SGD(model.adapter.parameters(), lr=0.1))
        assert type(model.frozen) is nn.Linear
