"""The examples that rules are checked on: plain values that travel, and the generators that draw them.

Only the driver draws. A rank gets the value and builds from it, with the same seed on every rank.
"""

from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from fabric_core.conformance.numbers import widest

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

__all__ = [
    "Clipping",
    "Message",
    "Net",
    "Payload",
    "Script",
    "Tensors",
    "Training",
    "build",
    "devices",
    "payloads",
    "tensors",
    "trainings",
]

PARTS: Final = 4
"""A batch divides into this many equal parts, so that any of 1, 2 and 4 ranks reads the same number of rows."""


@dataclass(frozen=True)
class Training:
    """A small training.

    Args:
        seed: Of the parameters and the data.
        width: Of the hidden layer.
        depth: How many hidden layers, each a block.
        rows: How many rows each of the ``PARTS`` parts of a batch has.
        steps: How many optimizer steps.
        accumulate: Over how many backward passes a step's gradients are gathered.
        optimizer: ``"sgd"``, ``"momentum"``, ``"adam"``, or ``"decay"``: Nesterov, decay, groups in another order.
        frozen: The first layer isn't trained.
        tied: Two layers share a weight.
        buffers: The model has buffers, one of integers.
    """

    seed: int = 0
    width: int = 4
    depth: int = 2
    rows: int = 1
    steps: int = 2
    accumulate: int = 1
    optimizer: str = "momentum"
    frozen: bool = False
    tied: bool = False
    buffers: bool = False


class Block(nn.Module):
    """A hidden layer, as one of a model's repeated blocks: ``(rows, width) -> (rows, width)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    """The model of a training: ``(rows, 3) -> (rows, 2)``."""

    counter: torch.Tensor
    factor: torch.Tensor

    def __init__(self, case: Training) -> None:
        super().__init__()
        self.inner = nn.Linear(3, case.width)
        self.hidden = nn.ModuleList(Block(case.width) for _ in range(case.depth))
        self.outer = nn.Linear(case.width, 2)
        if case.tied:
            self.again = nn.Linear(case.width, case.width)
            self.again.weight = self.get_submodule("hidden.0.linear").weight  # type: ignore[assignment]
        if case.buffers:
            self.register_buffer("counter", torch.tensor([3, 5]))
            self.register_buffer("factor", torch.tensor(0.5))
        self.case = case
        self.seen: list[torch.dtype] = []

    def is_tied(self) -> bool:
        """Whether the two layers of a tied model share a weight."""
        return self.again.weight is self.get_submodule("hidden.0.linear").weight

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """``(rows, 3) -> (rows, width)``."""
        x = self.inner(x)
        self.seen.append(x.dtype)
        x = torch.tanh(x)
        for block in self.hidden:
            x = block(x)
        return torch.tanh(self.again(x)) if self.case.tied else x

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """``(rows, 3) -> (rows, 2)``."""
        y: torch.Tensor = self.outer(self.features(x)) * scale
        return y * self.factor if self.case.buffers else y

    def training_loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """A method other than ``forward`` that runs the model."""
        return nn.functional.mse_loss(self.outer(self.features(x)), target)

    def first_loss(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """A method that runs one layer alone, and none that holds others."""
        return nn.functional.mse_loss(self.inner(x).mean(dim=1, keepdim=True).expand_as(target), target)


def build(case: Training, dtype: torch.dtype | None = None) -> Net:
    """Make the model, of the widest type or another; the same one on every rank."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(case.seed)  # torch.manual_seed looks for every other device
    model = Net(case).to(dtype or widest())
    torch.set_rng_state(state)
    if case.frozen:
        model.inner.requires_grad_(False)
    return model


def optimizer_for(case: Training, parameters: Any) -> torch.optim.Optimizer:
    """Make the optimizer, with two groups of parameters: the first parameter learns at a rate of its own."""
    return _optimizer(case, _groups(case, parameters))


def optimizers_for(case: Training, parameters: Any) -> list[torch.optim.Optimizer]:
    """Make an optimizer for each group that the one optimizer has."""
    return [_optimizer(case, [group]) for group in _groups(case, parameters)]


def _groups(case: Training, parameters: Any) -> list[dict[str, Any]]:
    first, *others = [parameter for parameter in parameters if parameter.requires_grad]
    rate = 0.02 if case.optimizer == "adam" else 0.1
    groups = [{"params": [first], "lr": rate / 2}, {"params": others, "lr": rate}]
    return groups[::-1] if case.optimizer == "decay" else groups


def _optimizer(case: Training, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if case.optimizer == "adam":
        return torch.optim.AdamW(groups)
    if case.optimizer == "decay":
        return torch.optim.SGD(groups, momentum=0.9, weight_decay=0.1, nesterov=True)
    return torch.optim.SGD(groups, momentum=0.9 if case.optimizer == "momentum" else 0.0)


def batches(
    case: Training, dtype: torch.dtype | None = None, steps: int | None = None
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Give whole batches, one for each backward pass: ``(rows, 3)`` and ``(rows, 2)``."""
    generator = torch.Generator().manual_seed(case.seed + 1)
    rows = PARTS * case.rows
    for _ in range((case.steps if steps is None else steps) * case.accumulate):
        yield (
            torch.randn(rows, 3, generator=generator, dtype=torch.float64).to(dtype or widest()),
            torch.randn(rows, 2, generator=generator, dtype=torch.float64).to(dtype or widest()),
        )


def part(tensor: torch.Tensor, shard: tuple[int, int]) -> torch.Tensor:
    """Give one of several equal parts of a batch."""
    index, count = shard
    return tensor.chunk(count)[index]


Weights = dict[str, torch.Tensor]


def trained_alone(case: Training, skipped: tuple[int, ...] = ()) -> Weights:
    """Train in one process on whole batches, in plain PyTorch: the oracle; some steps may be left out."""
    return _trained_alone(case, skipped, widest())


@lru_cache(maxsize=256)
def _trained_alone(case: Training, skipped: tuple[int, ...], _dtype: torch.dtype) -> Weights:
    model = build(case)
    optimizer = optimizer_for(case, model.parameters())
    for index, (x, y) in enumerate(batches(case)):
        (nn.functional.mse_loss(model(x), y) / case.accumulate).backward()
        if (index + 1) % case.accumulate == 0:
            if index // case.accumulate not in skipped:
                optimizer.step()
            optimizer.zero_grad()
    return copied(model)


def copied(model: nn.Module) -> Weights:
    """Copy a plain model's state."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def distance(one: Weights, other: Weights) -> float:
    """The largest absolute difference of two states; infinite where names or shapes differ."""
    if set(one) != set(other) or any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    gaps = [(_wide(one[name]) - _wide(other[name])).abs().max().item() for name in one if one[name].numel()]
    return max((gap if gap == gap else float("inf") for gap in gaps), default=0.0)  # noqa: PLR0124 - not a number


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def trainings(**fixed: Any) -> "Callable[[], SearchStrategy[Training]]":
    """Draw trainings; what is given is fixed."""

    def draw() -> "SearchStrategy[Training]":
        from hypothesis import strategies as st

        drawn = {
            "seed": st.integers(0, 999),
            "width": st.integers(1, 5),
            "depth": st.integers(2, 3),
            "rows": st.integers(1, 3),
            "steps": st.integers(1, 4),
            "accumulate": st.just(1),
            "optimizer": st.sampled_from(["sgd", "momentum", "adam", "decay"]),
            "frozen": st.booleans(),
            "tied": st.booleans(),
            "buffers": st.booleans(),
        }
        drawn.update(
            {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()}
        )
        return st.builds(Training, **drawn)

    return draw


@dataclass(frozen=True)
class Tensors:
    """One tensor for each rank, of small numbers, whole or quarters, so that sums are exact.

    Args:
        seed: Of the numbers.
        shape: Its shape.
        dtype: Its type's name.
        transposed: It isn't contiguous.
        uneven: Rank r has r more in every dimension.
    """

    seed: int = 0
    shape: tuple[int, ...] = (2,)
    dtype: str = "float32"
    transposed: bool = False
    uneven: bool = False

    def make(self, rank: int) -> torch.Tensor:
        """Make a rank's tensor."""
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        shape = [size + rank * self.uneven for size in self.shape]
        dtype = getattr(torch, self.dtype)
        made = torch.randint(-9, 10, shape, generator=generator).to(dtype)
        made = made / 4 if dtype.is_floating_point else made
        return made.movedim(0, -1).contiguous().movedim(-1, 0) if self.transposed and made.ndim > 1 else made


def tensors(**fixed: Any) -> "Callable[[], SearchStrategy[Tensors]]":
    """Draw tensors, empty and without dimensions too; what is given is fixed."""

    def draw() -> "SearchStrategy[Tensors]":
        from hypothesis import strategies as st

        drawn = {
            "seed": st.integers(0, 99),
            "shape": st.lists(st.integers(0, 3), max_size=3).map(tuple),
            "dtype": st.sampled_from(["float32", "float64", "int64", "int32"]),
            "transposed": st.booleans(),
            "uneven": st.just(False),
        }
        drawn.update(
            {name: value if isinstance(value, st.SearchStrategy) else st.just(value) for name, value in fixed.items()}
        )
        return st.builds(Tensors, **drawn)

    return draw


Pair = namedtuple("Pair", ["left", "right"])  # noqa: PYI024 - a user's batch may be an untyped one


@dataclass(frozen=True)
class Record:
    """A batch in a dataclass."""

    value: Any
    label: str = "label"


@dataclass(frozen=True)
class Payload:
    """A nested value with tensors of several types in it.

    Args:
        form: A nesting: a type's name, or a container's name with its parts.
    """

    form: Any = "float32"

    def make(self) -> Any:
        """Make the value."""
        return _made(self.form)


_SHAPES: Final = {"": (2, 2), "empty": (0, 3), "scalar": ()}


def _made(form: Any) -> Any:
    if isinstance(form, str):
        if form in {"none", "text", "number"}:
            return {"none": None, "text": "text", "number": 7}[form]
        dtype, _, shape = form.partition("/")
        return torch.ones(_SHAPES[shape]).to(getattr(torch, dtype))
    head, *parts = form
    values = [_made(one) for one in parts]
    if head == "dict":
        return {f"key{index}": value for index, value in enumerate(values)}
    if head == "pair":
        return Pair(values[0], values[-1])
    if head == "record":
        return Record(values[0])
    return values if head == "list" else tuple(values)


def payloads() -> "SearchStrategy[Payload]":
    """Draw nested values: uneven, empty, with integers, booleans and complex numbers among them."""
    from hypothesis import strategies as st

    dtypes = ["float32", "float64", "bfloat16", "float16", "int64", "int32", "bool", "uint8", "complex64"]
    leaf = st.sampled_from([*dtypes, "float32/empty", "float32/scalar", "int64/empty", "none", "text", "number"])

    def grow(inner: "SearchStrategy[Any]") -> "SearchStrategy[Any]":
        head = st.sampled_from(["list", "tuple", "dict", "pair", "record"])
        return st.tuples(head, inner) | st.tuples(head, inner, inner)

    return st.builds(Payload, st.recursive(leaf, grow, max_leaves=4))


@dataclass(frozen=True)
class Clipping:
    """A clipping of the gradients of one pass."""

    norm_type: float = 2.0
    max_norm: float = 0.1
    seed: int = 0


@dataclass(frozen=True)
class Message:
    """An object that one rank sends."""

    content: Any = "text"
    src: int = 0


@dataclass(frozen=True)
class Script:
    """A script's calls, in their order.

    Args:
        seed: Of the parameters and the data.
        acts: ``"pass"``, ``"apart"``, ``"step"``, ``"clip"``, ``"save"``, ``"load"``, ``"restart"``.
    """

    seed: int = 0
    acts: tuple[str, ...] = ("pass", "step")


def devices() -> "SearchStrategy[Any]":
    """Draw what users write for devices, and what they shouldn't."""
    from hypothesis import strategies as st

    number = st.integers(-3, 9)
    return st.one_of(
        number,
        number.map(str),
        st.lists(number, max_size=3),
        st.lists(number, max_size=3).map(tuple),
        st.lists(number, min_size=1, max_size=3).map(lambda indices: ",".join(map(str, indices))),
        st.sampled_from(["auto", "AUTO", "", " ", "x", "1.5", ",", "0,", "a,b", True, False, None, 1.5, b"1", "-1"]),
        st.lists(st.sampled_from([0, True, "0", None, 1.0]), min_size=1, max_size=2),
    )
