"""``torch.compile`` before or after ``setup``: the user's own arguments, outside the strategy's wrapper."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric, FabricModule, Precision, Strategy, is_wrapped, unwrap
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import PrecisionPolicy, StrategyCapabilities, World
from fabric_core.errors import MisuseError

# The compiler looks at the gradient of whatever goes into a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Graphs:
    """A compiler that keeps what it is given, and runs it as it is."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, graph: Any, _inputs: Any) -> Any:
        self.seen.append(graph)
        return graph.forward

    @property
    def calls(self) -> list[str]:
        """Name the functions of all graphs."""
        return [
            getattr(node.target, "__name__", str(node.target))
            for graph in self.seen
            for node in graph.graph.nodes
            if node.op == "call_function"
        ]


class Outer(nn.Module):
    """What a strategy puts round a module: adds a hundred, in a way that a compiler sees."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.add(self.module(*args, **kwargs), 100)


class Routing(Strategy):
    capabilities = StrategyCapabilities(max_world_size=1, intercepts_forward=True)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        return SingleProcess()

    def setup_module(self, module: nn.Module) -> nn.Module:
        return Outer(module)


class Half(Precision):
    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(compute_dtype=torch.bfloat16, output_dtype=torch.float64, autocast=True)

    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        return torch.autocast(device_type, torch.bfloat16)


class Scaling(Half):
    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(loss_scaling=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.layer(x))

    def generate(self, x: torch.Tensor) -> Any:
        return self(self(x))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Leave no compiled code behind."""
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["alone", "routing"])
def fabric(request: pytest.FixtureRequest, in_memory: dict[str, Any]) -> Callable[..., Fabric]:
    """Give a function that makes a Fabric with a strategy without, or with, a wrapper of its own."""
    routed = request.param == "routing"
    return lambda **given: Fabric(**{**in_memory, **({"strategy": Routing()} if routed else {}), **given})


def added(fabric: Fabric) -> int:
    """Say what the strategy adds to every output."""
    return 100 if isinstance(fabric.strategy, Routing) else 0


X = torch.arange(8.0).reshape(2, 4)


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("when", ["before", "after"])
def test_it_is_compiled_outside_the_strategy(fabric: Callable[..., Fabric], when: str, keyword: bool) -> None:
    """One graph holds the model and the strategy's part, made by the user's compiler with the user's arguments."""
    graphs, net, one = Graphs(), Net(), fabric()
    given: Any = {"backend": graphs, "fullgraph": True, "dynamic": False}

    def compiled(model: Any) -> Any:
        return torch.compile(model=model, **given) if keyword else torch.compile(model, **given)

    model: Any = one.setup(compiled(net)) if when == "before" else compiled(one.setup(net))
    reference = copy.deepcopy(net)
    for _ in range(2):
        torch.testing.assert_close(model(X), reference(X) + added(one))
    assert len(graphs.seen) == 1
    assert graphs.calls == ["linear", "sin", "add"][: 3 if added(one) else 2]
    model(X).sum().backward()
    assert net.layer.weight.grad is not None


def test_what_was_compiled_before_is_a_plain_wrapped_model(fabric: Callable[..., Fabric]) -> None:
    """Its original is the bare model: identity, names and marks know nothing of the compiler."""
    net = Net()
    one = fabric()
    model: Any = one.setup(torch.compile(net, backend="eager"))
    assert type(model) is FabricModule
    assert is_wrapped(model)
    assert unwrap(model) is model.module is net
    assert list(model.state_dict()) == list(net.state_dict()) == ["layer.weight", "layer.bias"]
    model.mark_forward_method("generate")
    torch.testing.assert_close(model.generate(X), net.generate(X) + added(one))


def test_what_was_compiled_after_is_still_wrapped(fabric: Callable[..., Fabric]) -> None:
    """The compiled object shows the wrapper's attributes, and its methods are guarded and routed as the wrapper's."""
    net = Net()
    one = fabric()
    model = one.setup(net)
    compiled: Any = torch.compile(model, backend="eager")
    assert is_wrapped(compiled)
    assert unwrap({"model": compiled})["model"] is net
    assert compiled.layer is net.layer
    assert compiled.module is net
    if added(one):
        with pytest.raises(MisuseError):
            compiled.generate(X)
    compiled.mark_forward_method("generate")
    torch.testing.assert_close(compiled.generate(X), net.generate(X) + added(one))


@pytest.mark.parametrize("when", ["before", "after"])
def test_precision_is_the_same_compiled(fabric: Callable[..., Fabric], when: str) -> None:
    """Context and conversions act round or inside the compiled code, in one graph where they are inside."""
    graphs, net, one = Graphs(), Net(), fabric(precision=Half())
    model: Any = (
        one.setup(torch.compile(net, backend=graphs, fullgraph=True))
        if when == "before"
        else torch.compile(one.setup(net), backend=graphs, fullgraph=True)
    )
    bare = fabric(precision=Half()).setup(copy.deepcopy(net))
    torch.testing.assert_close(model(X), bare(X))
    assert model(X).dtype == torch.float64
    assert len(graphs.seen) == 1


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_backward_guard_holds_compiled(fabric: Callable[..., Fabric], when: str) -> None:
    """A raw backward is refused, the right one passes."""
    net, one = Net(), fabric(precision=Scaling())
    model: Any = (
        one.setup(torch.compile(net, backend="aot_eager"))
        if when == "before"
        else torch.compile(one.setup(net), backend="aot_eager")
    )
    with pytest.raises(MisuseError, match=r"fabric\.backward"):
        model(X).sum().backward()
    assert net.layer.weight.grad is None
    one.backward(model(X).sum())
    assert net.layer.weight.grad is not None


def test_a_marked_method_can_be_compiled(fabric: Callable[..., Fabric]) -> None:
    """``torch.compile(model.generate)`` traces through the route."""
    graphs, net, one = Graphs(), Net(), fabric()
    model = one.setup(net)
    model.mark_forward_method("generate")
    compiled: Any = torch.compile(model.generate, backend=graphs, fullgraph=True)
    torch.testing.assert_close(compiled(X), net.generate(X) + added(one))
    assert len(graphs.seen) == 1


def test_compiling_is_not_touched(in_memory: dict[str, Any]) -> None:
    """``torch.compile`` is the very function that it was, before and after models are set up."""
    before = torch.compile
    Fabric(**in_memory).setup(torch.compile(Net(), backend="eager"))
    assert torch.compile is before


def test_a_deep_copy_of_a_compiled_model_runs(fabric: Callable[..., Fabric]) -> None:
    """The copy is compiled as the original was, on parameters of its own."""
    one = fabric()
    model: Any = one.setup(torch.compile(Net(), backend="eager"))
    clone = copy.deepcopy(model)
    torch.testing.assert_close(clone(X), model(X))
    clone(X).sum().backward()
    assert model.layer.weight.grad is None
