"""Models unlike each other: what users train besides linear layers, in a size that costs nothing."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance.cases import PARTS
from fabric_core.conformance.numbers import widest

__all__ = ["COARSE", "ZOO", "Branching", "Running", "batches", "make"]

_ROWS: Final = 2 * PARTS
_WIDTH: Final = 4


class Branching(nn.Module):
    """A model in which each row goes one of two ways; a way that no row goes isn't used."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.default_generator.manual_seed(seed)
        self.left = nn.Linear(3, 2, dtype=widest())
        self.right = nn.Linear(3, 2, dtype=widest())

    def forward(self, x: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """``(rows, 3)``, and which rows go right, ``(rows,)`` -> ``(rows, 2)``."""
        y = torch.zeros(len(x), 2, dtype=x.dtype, device=x.device)
        if not right.all():
            y = y + self.left(x) * ~right[:, None]
        if right.any():
            y = y + self.right(x) * right[:, None]
        return y


class _Embedding(nn.Module):
    """Word vectors that are the output's weights too, with a norm between them: ``(rows, 3) -> (rows, 5)``."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, _WIDTH)
        self.norm = nn.LayerNorm(_WIDTH)
        self.out = nn.Linear(_WIDTH, 5, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        indices = (x.abs() * 3).long() % 5
        y: torch.Tensor = self.out(self.norm(self.words(indices).mean(1)))
        return y


class _Convolution(nn.Module):
    """Convolutions and a group norm, frozen in between: ``(rows, 3) -> (rows, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, _WIDTH, 2)
        self.norm = nn.GroupNorm(2, _WIDTH)
        self.frozen = nn.Conv1d(_WIDTH, _WIDTH, 1).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.frozen(torch.relu(self.norm(self.first(x[:, None])))).sum(2)
        return y


class _Recurrent(nn.Module):
    """A recurrent cell: ``(rows, 3) -> (rows, 4)``."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(1, _WIDTH, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.cell(x[..., None])[0][:, -1]
        return y


class _TwoTypes(nn.Module):
    """A body in 32 bits and a head in 64: ``(rows, 3) -> (rows, 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, _WIDTH, dtype=torch.float32)
        self.head = nn.Linear(_WIDTH, 2, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(torch.tanh(self.body(x.float())).double())
        return y


class _Complex(nn.Module):
    """A complex parameter: ``(rows, 3) -> (rows, 2)``, real."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2, dtype=widest().to_complex()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = (x.to(self.weight.dtype) @ self.weight).abs()
        return y


class _Transposed(nn.Module):
    """A parameter that is not contiguous, so neither is its gradient: ``(rows, 3) -> (rows, 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 3, dtype=widest()).t())
        self.scalar = nn.Parameter(torch.tensor(0.5, dtype=widest()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight * self.scalar


class _Half(nn.Module):
    """Parameters of 16 bits: ``(rows, 3) -> (rows, 2)``."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layer(x.to(self.layer.weight.dtype)).to(widest())
        return y


class Running(nn.Module):
    """A layer that follows the mean of what it sees, as batch normalization does: ``(rows, 3) -> (rows, 2)``."""

    mean: torch.Tensor
    seen: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Follow the mean in training mode alone."""
        if self.training:
            with torch.no_grad():
                self.mean.add_(0.5 * (x.mean(0) - self.mean))
                self.seen.add_(len(x))
        y: torch.Tensor = self.layer(x)
        return y


class _Dropping(nn.Module):
    """Dropout between two layers: ``(rows, 3) -> (rows, 2)``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 16)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(self.drop(torch.tanh(self.first(x))))
        return y


ZOO: Final[dict[str, Callable[[], nn.Module]]] = {
    "tied word vectors and a norm": lambda: _Embedding().to(widest()),
    "convolutions, one frozen": lambda: _Convolution().to(widest()),
    "a recurrent cell": lambda: _Recurrent().to(widest()),
    "parameters of two types": _TwoTypes,
    "a complex parameter": _Complex,
    "a parameter that is not contiguous": _Transposed,
    "parameters in float16": lambda: _Half(torch.float16),
    "parameters in bfloat16": lambda: _Half(torch.bfloat16),
    "dropout": lambda: _Dropping().to(widest()),
    "a running mean": lambda: Running().to(widest()),
}
"""The models, under the words that a message calls them by."""

COARSE: Final = {"parameters of two types": 1e-5, "parameters in float16": 2e-2, "parameters in bfloat16": 1e-1}
"""How far parameters may be off that are computed in few digits, as a part of how far they went."""


def make(name: str, seed: int = 0) -> nn.Module:
    """Make a model; the same one on every rank, and no random number is drawn from the process's generator."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    model = ZOO[name]()
    torch.set_rng_state(state)
    return model


def batches(seed: int = 1, count: int = 2) -> Iterator[torch.Tensor]:
    """Give whole batches of inputs, ``(rows, 3)``, which divide into equal parts."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        yield torch.randn(_ROWS, 3, generator=generator, dtype=torch.float64).to(widest())


def loss(output: torch.Tensor) -> Any:
    """Give a loss that is a mean over rows."""
    return (output - 0.5).square().mean()
