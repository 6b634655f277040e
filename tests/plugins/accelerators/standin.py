"""A device type of our own, whose tensors compute on the CPU: run as a script, it trains on it.

PyTorch lets one backend that it does not know take the device type ``PrivateUse1`` under a name of its own, once for
the life of the process; so this runs in a process of its own. Autocast's rules are each backend's own, in C++, so this
one has none.
"""

import sys
from typing import Any, Self

import torch
from torch import nn
from torch.utils import _pytree
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric


class Standin(torch.Tensor):
    """A tensor of the stand-in device, around one of the CPU."""

    raw: torch.Tensor
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def __new__(cls, raw: torch.Tensor) -> Self:
        make: Any = torch.Tensor._make_wrapper_subclass
        made: Self = make(cls, raw.size(), strides=raw.stride(), dtype=raw.dtype, device="standin:0")
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override] # typed as a method, and PyTorch wants a class method
        cls, op: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return compute(op, *args, **(kwargs or {}))


def compute(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute an operator on the CPU, and put its results on the stand-in device unless they are to leave it."""
    given, structure = _pytree.tree_flatten((args, kwargs))
    raw = [
        one.raw if isinstance(one, Standin) else torch.device("cpu") if isinstance(one, torch.device) else one
        for one in given
    ]
    raw_args, raw_kwargs = _pytree.tree_unflatten(raw, structure)
    result = op(*raw_args, **raw_kwargs)
    if torch.device(kwargs.get("device") or "standin").type == "cpu":
        return result
    owners = {id(after): before for before, after in zip(given, raw, strict=True) if isinstance(before, Standin)}

    def place(one: Any) -> Any:
        return owners[id(one)] if id(one) in owners else Standin(one)

    return _pytree.tree_map_only(torch.Tensor, place, result)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.tanh(self.norm(self.first(x))))
        return out


def train(accelerator: str, precision: str) -> tuple[list[float], str]:
    """Train four steps; gives the losses, and where everything was."""
    with Fabric(accelerator=accelerator, devices=1, precision=precision) as fabric:
        torch.manual_seed(1)
        model = Model()
        x, y = torch.randn(8, 4), torch.randn(8, 2)
        wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=0.1))
        loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, y), batch_size=4))
        losses, places = [], {fabric.device.type, *(one.device.type for one in model.parameters())}
        for _ in range(2):
            for inputs, targets in loader:
                loss = nn.functional.mse_loss(wrapped(inputs).to(torch.float32), targets.to(torch.float32))
                fabric.backward(loss)
                norm: Any = fabric.clip_gradients(wrapped, optimizer, max_norm=0.5)
                optimizer.step()
                optimizer.zero_grad()
                places |= {inputs.device.type, loss.device.type, norm.device.type}
                losses.append(loss.item())
        (place,) = places
        return losses, place


if __name__ == "__main__":
    _setup_privateuseone_for_python_backend("standin")
    library: Any = torch.library.Library("_", "IMPL")
    library.fallback(compute, "PrivateUse1")
    for name in sys.argv[1:]:
        expected, there = train("cpu", name)
        losses, place = train("torch", name)
        assert (there, place) == ("cpu", "standin"), (there, place)
        torch.testing.assert_close(losses, expected)
        print(name, "trains on", place)  # noqa: T201 - what the test reads
