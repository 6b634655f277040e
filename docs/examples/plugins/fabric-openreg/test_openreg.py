"""The accelerator ``openreg``: a training on a device type that PyTorch does not ship."""

import torch
from torch import nn

from fabric_core import Fabric
from fabric_core.conformance import suite

test_rules = suite(
    "accelerator",
    "openreg",
    xfail={"ACC-117": "PyTorch has no process group for the type, and Python alone makes none"},
)


def _train(accelerator: str) -> tuple[torch.device, list[torch.Tensor]]:
    with Fabric(accelerator=accelerator, devices=1) as fabric:
        fabric.launch()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
        for step in range(4):
            x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
            fabric.backward(wrapped(fabric.to_device(x)).square().mean())
            fabric.clip_gradients(wrapped, optimizer, max_norm=0.1)
            optimizer.step()
            optimizer.zero_grad()
        return next(model.parameters()).device, [one.detach().cpu() for one in model.parameters()]


def test_it_trains_as_the_cpu() -> None:
    """To the last bit; the parameters lie on the device."""
    device, trained = _train("openreg")
    assert str(device) == "openreg:0"
    torch.testing.assert_close(trained, _train("cpu")[1], rtol=0, atol=0)
