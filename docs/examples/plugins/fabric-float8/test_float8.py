"""The precision ``float8`` keeps the rules of its kind, and converts what hardware multiplies."""

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from fabric_core import Fabric
from fabric_core.conformance import suite

test_rules = suite("precision", "float8")


def test_layers_of_fitting_sizes_are_converted() -> None:
    """The other layer stays a plain one, and both train."""
    with Fabric(accelerator="cpu", devices=1, precision="float8") as fabric:
        model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 3))
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert [type(one).__name__ for one in model] == ["Float8Linear", "Linear"]
        before = [one.detach().clone() for one in model.parameters()]
        fabric.backward(wrapped(torch.randn(16, 16)).square().mean())
        optimizer.step()
        assert not any(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
