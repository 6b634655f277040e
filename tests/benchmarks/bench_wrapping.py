"""What wrapping adds to the calls of a training loop, beside plain PyTorch and the peers, in one run.

python tests/benchmarks/bench_wrapping.py [rounds]
"""

import importlib
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from _rounds import fastest, table
from torch import nn

from fabric_core import Fabric

CALLS = 50
"""Calls of one measurement."""


class Nested(nn.Module):
    """Takes and gives a nested batch: eight tensors, in dicts, lists and tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Run the layer on one tensor, and pass on the others."""
        return {"y": self.layer(batch["x"]), "rest": batch["rest"]}


def nested_batch() -> dict[str, Any]:
    """Give such a batch."""
    return {
        "x": torch.randn(4, 8),
        "rest": [torch.randn(4), (torch.randn(4), {"a": torch.randn(4), "b": torch.arange(4)}), torch.randn(4)],
        "more": (torch.randn(4), torch.randn(4)),
    }


def ours(precision: str, model: nn.Module, *optimizers: Any) -> Any:
    """Set up with this project; gives the backward pass too."""
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    return fabric.setup(model, *optimizers), fabric.backward


def lightning(precision: str, model: nn.Module, *optimizers: Any) -> Any:
    """Set up with Lightning Fabric."""
    fabric = importlib.import_module("lightning.fabric").Fabric(accelerator="cpu", devices=1, precision=precision)
    return fabric.setup(model, *optimizers), fabric.backward


def accelerate(precision: str, model: nn.Module, *optimizers: Any) -> Any:
    """Set up with Accelerate."""
    peer = importlib.import_module("accelerate")
    # It keeps one precision for the whole process.
    peer.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = peer.Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16-mixed" else "no")
    return accelerator.prepare(model, *optimizers), accelerator.backward


def plain(precision: str, model: nn.Module, *optimizers: Any) -> Any:
    """Do by hand what the precision promises: autocast, and results in 32 bits."""

    def run(*args: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            result = model(*args)
        if isinstance(result, torch.Tensor):
            return result.float()
        return {**result, "y": result["y"].float()}

    called: Any = run if precision == "bf16-mixed" else model
    return (called, *optimizers) if optimizers else called, torch.Tensor.backward


def autocast_alone(_precision: str, model: nn.Module) -> Any:
    """Plain autocast, and leave the results in 16 bits."""

    def run(*args: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(*args)

    return run, torch.Tensor.backward


SETUPS: dict[str, Callable[..., Any]] = {
    "plain PyTorch": plain,
    "this project": ours,
    "Lightning Fabric": lightning,
    "Accelerate": accelerate,
}


def microseconds(call: Callable[[], Any]) -> float:
    """Give the microseconds of one call."""
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS * 1e6


def forward(setup: Callable[..., Any], precision: str, *, nested: bool = False) -> Callable[[], Any]:
    """Give a forward pass."""
    torch.manual_seed(0)
    model = setup(precision, Nested() if nested else nn.Linear(8, 8))
    called = model[0] if isinstance(model, tuple) else model
    return partial(called, nested_batch() if nested else torch.randn(4, 8))


def step(setup: Callable[..., Any]) -> Callable[[], Any]:
    """Give a whole step: zero the gradients, forward, backward, step."""
    net = nn.Linear(8, 8)
    (model, optimizer), backward = setup("32-true", net, torch.optim.SGD(net.parameters(), lr=0.01))
    x = torch.randn(4, 8)

    def run() -> None:
        optimizer.zero_grad()
        backward(model(x).sum())
        optimizer.step()

    return run


def attribute(setup: Callable[..., Any]) -> Callable[[], Any]:
    """Give the read of a parameter."""
    model = setup("32-true", nn.Linear(8, 8))[0]
    return lambda: model.weight


CASES: dict[str, Callable[[Callable[..., Any]], Callable[[], Any]]] = {
    "forward of Linear(8, 8), 32-true": lambda setup: forward(setup, "32-true"),
    "forward of Linear(8, 8), bf16-mixed": lambda setup: forward(setup, "bf16-mixed"),
    "the same, and plain PyTorch leaves results in 16 bits": lambda setup: forward(
        autocast_alone if setup is plain else setup, "bf16-mixed"
    ),
    "forward of a nested batch, 32-true": lambda setup: forward(setup, "32-true", nested=True),
    "forward of a nested batch, bf16-mixed": lambda setup: forward(setup, "bf16-mixed", nested=True),
    "SGD step of Linear(8, 8), 32-true": step,
    "read of model.weight": attribute,
}


def main() -> None:
    """Measure, and print the table."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = []
    for case, prepare in CASES.items():
        found = fastest({name: partial(microseconds, prepare(setup)) for name, setup in SETUPS.items()}, rounds)
        base = found["plain PyTorch"]
        rows.append([case, f"{base:.2f}", *[f"{found[name] - base:+.2f}" for name in list(SETUPS)[1:]]])
    print(table("Microseconds of a call, and what is added to it", ["call", *SETUPS], rows))


if __name__ == "__main__":
    main()
