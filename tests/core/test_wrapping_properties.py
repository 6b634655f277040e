"""Whatever the module, the container and the batch: wrapped and bare agree."""

import collections
import copy
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fabric_core import Fabric, unwrap
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import PrecisionPolicy, Strategy, StrategyCapabilities, World, convert_tensors

ONE_FIXTURE = settings(
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=60,
    # The registered in-memory plugins are the same for every example.
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Outer(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Routing(Strategy):
    capabilities = StrategyCapabilities(max_world_size=1, intercepts_forward=True)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        return SingleProcess()

    def setup_module(self, module: nn.Module) -> nn.Module:
        return Outer(module)


WIDTH = 3


class Point(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any
    label: str = "l"


@dataclasses.dataclass
class Loose:
    value: Any
    more: Any = None


def tensors() -> st.SearchStrategy[torch.Tensor]:
    """Draw small tensors of any type, whose numbers 16 bits hold exactly."""
    dtypes = [torch.float32, torch.float64, torch.float16, torch.int64, torch.bool, torch.complex64]
    return st.builds(
        lambda values, dtype: torch.tensor(values).to(dtype),
        st.lists(st.integers(-8, 8), min_size=1, max_size=WIDTH),
        st.sampled_from(dtypes),
    )


def batches() -> st.SearchStrategy[Any]:
    """Draw nested batches."""
    leaves = tensors() | st.none() | st.integers(-5, 5) | st.text(max_size=3)
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
            st.dictionaries(st.text(max_size=2), inner, max_size=3),
            st.builds(Point, inner, inner),
            st.builds(Frozen, inner),
            st.builds(Loose, inner, inner),
            st.builds(lambda one: collections.OrderedDict(a=one), inner),
            st.builds(lambda one: collections.defaultdict(list, a=one), inner),
            st.builds(lambda one: {1, 2} if one is None else collections.deque([one]), inner),
        ),
        max_leaves=8,
    )


class Residual(nn.Module):
    count: torch.Tensor

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("hidden", torch.ones(1), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        if self.training:
            self.count += 1
        return x + self.scale * self.inner(x)


class Last(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.named = nn.ModuleDict({"norm": nn.LayerNorm(WIDTH)})

    def forward(self, x: torch.Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
        return {"out": self.named["norm"](x), "parts": (x, [1])}


def modules() -> st.SearchStrategy[nn.Module]:
    """Draw modules from three numbers to three, nested."""
    leaves = st.builds(lambda bias: nn.Linear(WIDTH, WIDTH, bias=bias), st.booleans()) | st.sampled_from(
        [nn.Tanh, nn.Identity, nn.Softplus]
    ).map(lambda kind: kind())
    inner = st.recursive(
        leaves,
        lambda parts: (
            st.builds(Residual, parts) | st.lists(parts, min_size=1, max_size=3).map(lambda many: nn.Sequential(*many))
        ),
        max_leaves=6,
    )
    return inner | st.lists(inner, min_size=1, max_size=3).map(Last)


def flat(value: Any) -> list[torch.Tensor]:
    """Give the tensors of an output."""
    return [one for one in torch.utils._pytree.tree_leaves(value) if isinstance(one, torch.Tensor)]


@ONE_FIXTURE
@given(module=modules(), routed=st.booleans(), train=st.booleans(), seed=st.integers(0, 99))
def test_outputs_gradients_and_state_agree(
    in_memory: dict[str, Any], module: nn.Module, routed: bool, train: bool, seed: int
) -> None:
    """After two steps of a generated module both have the same outputs, gradients, buffers and names."""
    torch.manual_seed(seed)
    bare = copy.deepcopy(module)
    wrapped = Fabric(**{**in_memory, **({"strategy": Routing()} if routed else {})}).setup(module)
    wrapped.train(train)
    bare.train(train)
    for _ in range(2):
        x = torch.randn(2, WIDTH, requires_grad=True)
        ours, theirs = flat(wrapped(x)), flat(bare(x))
        for mine, other in zip(ours, theirs, strict=True):
            assert torch.equal(mine, other)
        sum(one.sum() for one in ours).backward()  # type: ignore[union-attr]
        sum(one.sum() for one in theirs).backward()  # type: ignore[union-attr]
    for (name, mine), (other_name, other) in zip(wrapped.named_parameters(), bare.named_parameters(), strict=True):
        assert name == other_name
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or other.grad is None or torch.equal(mine.grad, other.grad)
    state, bare_state = wrapped.state_dict(), bare.state_dict()
    assert list(state) == list(bare_state)
    assert all(torch.equal(state[name], bare_state[name]) for name in bare_state)
    assert [name for name, _ in wrapped.named_modules()] == [name for name, _ in bare.named_modules()]
    assert [name for name, _ in wrapped.named_buffers()] == [name for name, _ in bare.named_buffers()]
    assert repr(wrapped) == repr(bare)
    bare.load_state_dict(wrapped.state_dict())
    wrapped.load_state_dict(bare.state_dict())


NAMES = st.text("abcdefgh_", min_size=1, max_size=4).filter(lambda name: name.isidentifier())
VALUES = st.one_of(
    st.integers(),
    st.text(max_size=3),
    st.builds(lambda: nn.Parameter(torch.zeros(1))),
    st.builds(nn.Identity),
    st.builds(lambda: torch.zeros(2)),
    st.none(),
)


@ONE_FIXTURE
@given(
    module=modules(),
    routed=st.booleans(),
    acts=st.lists(st.tuples(st.sampled_from(["set", "delete", "read", "has"]), NAMES, VALUES), max_size=12),
)
def test_attributes_are_one(
    in_memory: dict[str, Any], module: nn.Module, routed: bool, acts: list[tuple[str, str, Any]]
) -> None:
    """Any sequence of reads, writes and deletions through the wrapper does to the original what it does to a twin."""
    twin = copy.deepcopy(module)
    wrapped = Fabric(**{**in_memory, **({"strategy": Routing()} if routed else {})}).setup(module)
    for act, name, value in acts:
        results: list[Any] = []
        for target in (wrapped, twin):
            try:
                if act == "set":
                    setattr(target, name, value)
                elif act == "delete":
                    delattr(target, name)
                elif act == "read":
                    results.append(type(getattr(target, name)))
                results.append(hasattr(target, name))
            except (AttributeError, TypeError) as error:
                results.append(str(error))
        assert results[: len(results) // 2] == results[len(results) // 2 :]
        if hasattr(module, name) and not callable(getattr(module, name)):
            assert getattr(wrapped, name) is getattr(module, name)
    assert set(vars(module)) == set(vars(twin))
    for registry in ("_parameters", "_modules", "_buffers"):
        assert list(vars(module)[registry]) == list(vars(twin)[registry])


@ONE_FIXTURE
@given(layers=st.lists(st.builds(lambda: nn.Linear(1, 1)), max_size=5), data=st.data())
def test_containers_are_one(in_memory: dict[str, Any], layers: list[nn.Module], data: st.DataObject) -> None:
    """Length, iteration, membership, indices and slices of a container are the bare one's, errors included."""
    container: Any = data.draw(st.sampled_from([nn.Sequential(*layers), nn.ModuleList(layers)]))
    wrapped: Any = Fabric(**in_memory).setup(container)
    assert (len(wrapped), bool(wrapped), list(wrapped)) == (len(container), bool(container), list(container))
    index = data.draw(st.integers(-7, 7))
    if -len(container) <= index < len(container):
        assert wrapped[index] is container[index]
        assert container[index] in wrapped
    else:
        with pytest.raises(IndexError):
            wrapped[index]
    assert list(wrapped[index:]) == list(container[index:])


@ONE_FIXTURE
@given(batch=batches())
def test_batches_keep_their_shape(in_memory: dict[str, Any], batch: Any) -> None:
    """Converted, moved or unwrapped, a batch keeps its kinds and what is no tensor; without change it is the same."""
    fabric = Fabric(**in_memory)
    assert fabric.to_device(batch) is batch
    assert unwrap(batch) is batch
    converted = convert_tensors(batch, torch.float64)
    before, structure = torch.utils._pytree.tree_flatten(batch, is_leaf=dataclasses.is_dataclass)
    after, same = torch.utils._pytree.tree_flatten(converted, is_leaf=dataclasses.is_dataclass)
    assert structure == same
    changed = False
    for old, new in zip(before, after, strict=True):
        assert type(old) is type(new)
        if isinstance(old, torch.Tensor):
            expected = old.double() if old.is_floating_point() else old
            assert new.dtype == expected.dtype
            assert torch.equal(new, expected)
            changed |= old.dtype != new.dtype
    if not changed and not any(dataclasses.is_dataclass(one) for one in before):
        assert converted is batch


@ONE_FIXTURE
@given(batch=batches())
def test_a_model_is_given_its_batch(in_memory: dict[str, Any], batch: Any) -> None:
    """Without conversions the model sees the very object, and its result is the very object too."""

    class Echo(nn.Module):
        def forward(self, value: Any) -> Any:
            return value

    assert Fabric(**in_memory).setup(Echo())(batch) is batch
