"""Inputs are converted in any nesting; what needs no conversion is the very same object."""

import collections
import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree
from transformers.modeling_outputs import BaseModelOutput
from transformers.tokenization_utils_base import BatchEncoding

from fabric_core import Fabric

ONE = torch.ones(2)
INTEGER = torch.ones(2, dtype=torch.int64)


class Pair(NamedTuple):
    a: Any
    b: Any


@dataclasses.dataclass
class Open:
    a: Any
    b: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any

    def __post_init__(self) -> None:
        """Refuse to be made twice."""
        if getattr(self.a, "dtype", None) is torch.bfloat16:
            raise AssertionError("a dataclass's own __post_init__ is not run again")


@dataclasses.dataclass(frozen=True, slots=True)
class Slotted:
    a: Any
    b: Any


class Registered:
    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b


class OwnDict(dict[str, Any]):
    note: str


CONTAINERS: dict[str, Any] = {
    "list": lambda a, b: [a, b],
    "tuple": lambda a, b: (a, b),
    "dict": lambda a, b: {"a": a, "b": b},
    "named tuple": Pair,
    "dataclass": Open,
    "frozen dataclass": Frozen,
    "dataclass with slots": Slotted,
    "registered with pytree": Registered,
    "ordered dict": lambda a, b: collections.OrderedDict(a=a, b=b),
    "default dict": lambda a, b: collections.defaultdict(list, a=a, b=b),
    "deque": lambda a, b: collections.deque([a, b]),
    "subclass of dict": lambda a, b: OwnDict(a=a, b=b),
    "user dict": lambda a, b: collections.UserDict(a=a, b=b),
    "transformers' batch": lambda a, b: BatchEncoding({"a": a, "b": b}),
    "nested": lambda a, b: {"x": [Slotted(a, (1, "text")), {"y": Pair(b, None)}]},
}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    _pytree.register_pytree_node(Registered, lambda own: ([own.a, own.b], None), lambda parts, _: Registered(*parts))
    yield
    _pytree._deregister_pytree_node(Registered)


def leaves(data: Any) -> list[Any]:
    """Give what a container of two holds."""
    if isinstance(data, Open | Frozen | Slotted | Registered):
        return [data.a, data.b]
    if isinstance(data, dict) and "x" in data:
        return [data["x"][0].a, data["x"][1]["y"].a]
    if isinstance(data, dict | collections.UserDict):
        return [data["a"], data["b"]]
    return list(data)


class Echo(nn.Module):
    """Returns what it got, so that a test sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.got: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> None:
        """Keep what came."""
        self.got = (args, kwargs)


def received(precision: str, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give what a model is called with."""
    model = Echo()
    with Fabric(accelerator="cpu", devices=1, precision=precision) as fabric:
        fabric.setup(model)(*args, **kwargs)
    got: tuple[tuple[Any, ...], dict[str, Any]] = model.got
    return got


@pytest.mark.parametrize("name", CONTAINERS)
def test_floating_point_tensors_are_converted_and_the_rest_is_the_same(name: str) -> None:
    """A container of the same class comes, the number converted, the integer the very same; the original stays."""
    original = CONTAINERS[name](ONE, INTEGER)
    (got,), kwargs = received("bf16-true", original, again=original)
    for one in (got, kwargs["again"]):
        assert type(one) is type(original)
        number, integer = leaves(one)
        assert number.dtype is torch.bfloat16
        assert integer is INTEGER
    assert leaves(original)[0] is ONE


@pytest.mark.parametrize("name", CONTAINERS)
def test_what_needs_no_conversion_is_the_very_same_object(name: str) -> None:
    """Containers of integers, or of numbers that have the type already, are not copied."""
    for number in (ONE.bfloat16(), INTEGER, "text"):
        if name != "frozen dataclass" or number is INTEGER:  # its test class refuses bfloat16
            original = CONTAINERS[name](number, INTEGER)
            (got,), _ = received("bf16-true", original)
            assert got is original


def test_objects_that_hold_no_tensor_that_is_known_come_through_untouched() -> None:
    """An object of a class that nobody registered is passed on as it is."""
    thing = SimpleNamespace(x=ONE)
    (got,), _ = received("bf16-true", thing)
    assert got is thing
    assert thing.x is ONE


def test_attributes_of_a_mapping_survive() -> None:
    """A subclass of dict keeps what it has beside its entries; a default dict its factory."""
    own = OwnDict(a=ONE)
    own.note = "kept"
    (got, default), _ = received("bf16-true", own, collections.defaultdict(list, a=ONE))
    assert got.note == "kept"
    assert default["missing"] == []


def test_outputs_of_transformers_come_back_in_32_bits() -> None:
    """A model output is a dataclass and a dict at once: both faces are converted, and so are packed sequences."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> tuple[BaseModelOutput, Any]:
            hidden: Any = x * self.weight
            return BaseModelOutput(last_hidden_state=hidden), pack_padded_sequence(hidden[:, None, None], [2])

    with Fabric(accelerator="cpu", devices=1, precision="bf16-true") as fabric:
        output, packed = fabric.setup(Model())(ONE)
    assert isinstance(output, BaseModelOutput)
    assert output.last_hidden_state is output["last_hidden_state"]
    assert output.last_hidden_state.dtype is torch.float32
    assert packed.data.dtype is torch.float32


class Blocks(nn.Module):
    """What strategies shard apart, with parameters that meet inputs in several ways."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(2))
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x * self.gain + layer(x)
        return x


@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp", "fsdp:auto_wrap_policy=null"])
@pytest.mark.parametrize("name", ["16-mixed", "bf16-mixed"])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_cast_inputs_false_leaves_inputs_under_every_strategy(name: str, strategy: str, given: torch.dtype) -> None:
    """The model and its blocks see what they are given, autocast computes with it, and the parameters are trained."""
    model = Blocks()
    seen = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    computed = []
    linear: Any = model.layers[0]
    linear[0].register_forward_hook(lambda _, __, output: computed.append(output.dtype))
    with Fabric(accelerator="cpu", devices=1, strategy=strategy, precision=f"{name}:cast_inputs=false") as fabric:
        fabric.launch()
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        output = wrapped(torch.ones(1, 4, dtype=given))
        fabric.backward(output.square().mean())
        optimizer.step()
        trained = [one.grad is not None and one.dtype is torch.float32 for one in wrapped.parameters()]
    assert seen == [given, given]
    assert computed == [torch.float16 if name == "16-mixed" else torch.bfloat16]
    assert output.dtype is torch.float32
    assert all(trained)
