"""What precision costs: µs added per forward and per step over autocast and ``GradScaler`` in plain PyTorch.

Every contestant runs once a round, in turn; a number is the median of its rounds.
"""

import argparse
import importlib.util
import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from _rounds import medians, table
from torch import Tensor, nn

from fabric_core import Fabric

_TYPES = {"bf16-true": torch.bfloat16, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


def microseconds(function: Callable[[], object], calls: int) -> float:
    """Give the mean time of a call."""
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls * 1e6


def forward_by_hand(precision: str, x: Tensor) -> Callable[[], object]:
    """Run a layer with the conversions written out."""
    dtype = _TYPES[precision]
    model = nn.Linear(8, 8)
    if precision.endswith("true"):
        model.to(dtype)
        return lambda: model(x.to(dtype)).float()

    def forward() -> Tensor:
        with torch.autocast("cpu", dtype):
            result: Tensor = model(x)
        return result.float()

    return forward


def forward_of(fabric: Any, x: Tensor) -> Callable[[], object]:
    """Run a layer that was set up."""
    return partial(fabric.setup(nn.Linear(8, 8)), x)


def step_by_hand(precision: str, x: Tensor) -> Callable[[], object]:
    """Run a whole step written out."""
    dtype = _TYPES[precision]
    model = nn.Linear(8, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=precision == "16-mixed")
    true = precision.endswith("true")
    if true:
        model.to(dtype)

    def step() -> None:
        optimizer.zero_grad()
        if true:
            result = model(x.to(dtype)).float()
        else:
            with torch.autocast("cpu", dtype):
                result = model(x)
            result = result.float()
        scaler.scale(result.sum()).backward()
        scaler.step(optimizer)
        scaler.update()

    return step


def step_of(fabric: Any, x: Tensor) -> Callable[[], object]:
    """Run a whole step through a façade, this project's or Lightning's."""
    model = nn.Linear(8, 8)
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1e-6))

    def step() -> None:
        optimizer.zero_grad()
        fabric.backward(model(x).sum())
        optimizer.step()

    return step


def lightning(precision: str) -> Any:
    """Make Lightning's façade, with a scale that overflows nowhere."""
    from lightning.fabric import Fabric as Theirs
    from lightning.fabric.plugins.precision import MixedPrecision

    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return Theirs(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))
    return Theirs(accelerator="cpu", devices=1, precision=cast("Any", precision))


def ours(precision: str) -> Fabric:
    """Make this project's façade, likewise."""
    return Fabric(
        accelerator="cpu",
        devices=1,
        precision=f"{precision}:init_scale=1024" if precision == "16-mixed" else precision,
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--calls", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    x = torch.randn(4, 8)
    peers = importlib.util.find_spec("lightning") is not None
    for title, by_hand, by_facade in (
        ("Forward of `Linear(8, 8)`", forward_by_hand, forward_of),
        ("A whole step with SGD", step_by_hand, step_of),
    ):
        rows = []
        for precision in _TYPES:
            functions = {"hand": by_hand(precision, x), "ours": by_facade(ours(precision), x)}
            if peers:
                functions["theirs"] = by_facade(lightning(precision), x)
            found = medians(
                {name: partial(microseconds, function, given.calls) for name, function in functions.items()},
                given.rounds,
            )
            hand = found["hand"]
            rows.append(
                (
                    f"`{precision}`",
                    f"{hand:.1f}",
                    f"+{found['ours'] - hand:.1f}",
                    f"+{found['theirs'] - hand:.1f}" if peers else "not installed",
                )
            )
        print(table(title, ("precision", "plain PyTorch, µs", "this project, µs", "Lightning Fabric, µs"), rows))


if __name__ == "__main__":
    main()
