"""Every method that takes a model takes it compiled, before or after it was set up."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric, is_wrapped, unwrap


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.layer(x)  # type: ignore[no-any-return]


def _compiled(module: Any) -> Any:
    return torch.compile(module, backend="eager")


ORDERS: dict[str, Callable[[Fabric, Net], Any]] = {
    "before": lambda fabric, net: fabric.setup(_compiled(net)),
    "after": lambda fabric, net: _compiled(fabric.setup(net)),
    "both": lambda fabric, net: _compiled(fabric.setup(_compiled(net))),
}


@pytest.mark.parametrize("order", ORDERS)
def test_a_compiled_model_is_the_model(order: str, tmp_path: Path) -> None:
    """To train, accumulate, clip, save, load, unwrap, mark, and to refuse what was set up before."""
    fabric = Fabric(accelerator="cpu", devices=1)
    net = Net()
    bare = torch.optim.SGD(net.parameters(), lr=0.1)
    model = ORDERS[order](fabric, net)
    optimizer = fabric.setup_optimizers(bare)
    with fabric.no_backward_sync(model):
        fabric.backward(model(torch.ones(1, 2)).sum(), model=model)
    fabric.clip_gradients(model, optimizer, max_norm=0.1)
    optimizer.step()
    assert unwrap(model) is net
    assert is_wrapped(model)
    with pytest.raises(ValueError, match="set up before"):
        fabric.setup(model)
    model.mark_forward_method("twice")
    assert torch.equal(model.twice(torch.ones(1, 2)), 2 * model(torch.ones(1, 2)))
    trained = {name: value.clone() for name, value in net.state_dict().items()}
    fabric.save(tmp_path / "checkpoint", {"model": model})
    with torch.no_grad():
        net.layer.weight.zero_()
    fabric.load(tmp_path / "checkpoint", {"model": model})
    assert all(torch.equal(value, trained[name]) for name, value in net.state_dict().items())
    torch.save(net.state_dict(), tmp_path / "raw.pt")
    fabric.load_raw(tmp_path / "raw.pt", model)
    assert fabric.to_device(model) is not None


def test_a_compiled_model_that_was_not_set_up_is_refused() -> None:
    """As the bare one would be."""
    fabric = Fabric(accelerator="cpu", devices=1)
    with pytest.raises(TypeError, match="not set up"):
        fabric.no_backward_sync(_compiled(Net()))
