"""A wrapped model is the original, but for how it runs."""

import copy
import inspect
import pickle
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric, FabricModule, Precision, Strategy
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import PrecisionPolicy, StrategyCapabilities, World
from fabric_core.errors import MisuseError
from fabric_core.wrapping.forward import Route


class Outer(nn.Module):
    """What a strategy puts round a module: counts its calls."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: list[Any] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append(args[0])
        return self.module(*args, **kwargs)


class Routing(Strategy):
    """One process, through whose wrapper every run must go."""

    capabilities = StrategyCapabilities(max_world_size=1, intercepts_forward=True)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        return SingleProcess()

    def setup_module(self, module: nn.Module) -> nn.Module:
        self.outer = Outer(module)
        return self.outer


class Half(Precision):
    """Autocasts to 16 bits and gives results in 64, so that both can be seen."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(
            compute_dtype=torch.bfloat16, input_dtype=torch.float32, output_dtype=torch.float64, autocast=True
        )

    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        return torch.autocast(device_type, torch.bfloat16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.tag = "plain"
        self.seen: list[tuple[bool, bool, torch.dtype]] = []

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> Any:
        """Scale what the layer gives."""
        self.seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), x.dtype))
        return self.layer(x) * scale

    def generate(self, x: torch.Tensor, steps: int = 1) -> torch.Tensor:
        """Run the layer through forward."""
        for _ in range(steps):
            x = torch.cat([self(x), x[:, :1]], dim=1)
        return x

    def again(self, x: torch.Tensor, depth: int) -> Any:
        return self.layer(x) if depth == 0 else self.again(x, depth - 1)

    def fail(self, x: torch.Tensor) -> torch.Tensor:
        self.layer(x)
        raise KeyError("inside")

    def training_step(self, x: torch.Tensor) -> Any:
        return self.layer(x).sum()

    def describe(self, word: str = "a") -> str:
        return f"{word} net of {self.layer.out_features}"

    def stream(self, x: torch.Tensor) -> Iterator[torch.Tensor | None]:
        yield None
        yield self.layer(x)

    def through(self, wrapped: FabricModule, x: torch.Tensor) -> Any:
        return wrapped(x)

    def borrow(self, foreign: nn.Module, x: torch.Tensor) -> Any:
        return foreign(x)

    def wait(self, inside: threading.Event, done: threading.Event) -> None:
        inside.set()
        done.wait(10)

    async def later(self) -> None: ...

    @staticmethod
    def constant() -> int:
        return 3


Setup = Callable[..., tuple[FabricModule, Net]]


@pytest.fixture(params=["alone", "routing"])
def set_up(request: pytest.FixtureRequest, in_memory: dict[str, Any]) -> Setup:
    """Give a function that sets up a net under a strategy without, or with, a wrapper of its own."""

    def make(**given: Any) -> tuple[FabricModule, Net]:
        if request.param == "routing":
            given["strategy"] = Routing()
        net = Net()
        return Fabric(**{**in_memory, **given}).setup(net), net

    return make


@pytest.fixture
def routed(in_memory: dict[str, Any]) -> tuple[FabricModule, Net, Outer]:
    """Give a net under a strategy with a wrapper, the net itself, and that wrapper."""
    strategy, net = Routing(), Net()
    return Fabric(**{**in_memory, "strategy": strategy}).setup(net), net, strategy.outer


X = torch.arange(8.0).reshape(2, 4)


def test_it_says_what_it_is(set_up: Setup) -> None:
    """Its type, its original and its device are there to see."""
    model, net = set_up()
    assert type(model) is FabricModule
    assert model.module is net
    assert model.device == torch.device("cpu")


def test_running_it_runs_the_original(set_up: Setup) -> None:
    """A call and ``forward`` give what the original gives, with positional and keyword arguments."""
    model, net = set_up()
    expected = net(X, scale=2.0)
    assert torch.equal(model(X, scale=2.0), expected)
    assert torch.equal(model.forward(X, scale=2.0), expected)
    assert torch.equal(model(x=X), net(X))


def test_forward_and_methods_show_the_originals_signature(set_up: Setup) -> None:
    """What inspects a signature or a docstring sees the original's."""
    model, net = set_up()
    model.mark_forward_method("generate")
    for name in ("forward", "generate", "describe"):
        assert inspect.signature(getattr(model, name)) == inspect.signature(getattr(net, name))
        assert getattr(model, name).__doc__ == getattr(net, name).__doc__


def test_attributes_are_the_very_same_objects(set_up: Setup) -> None:
    """Parameters, submodules, plain attributes, buffers and static methods are the original's own."""
    model, net = set_up()
    assert model.layer is net.layer
    assert model.layer.weight is net.layer.weight
    assert model.tag is net.tag
    assert model.seen is net.seen
    assert model.constant() == 3
    with pytest.raises(AttributeError, match="'Net' object has no attribute 'missing'"):
        _ = model.missing


def test_setting_and_deleting_reaches_the_original(set_up: Setup) -> None:
    """Attributes, parameters and submodules that are set or deleted are so on the original."""
    model, net = set_up()
    model.tag = "new"
    model.extra = nn.Linear(1, 1)
    model.bias = nn.Parameter(torch.zeros(1))
    assert net.tag == "new"
    assert "extra" in dict(net.named_children())
    assert "bias" in dict(net.named_parameters())
    del model.extra, model.tag
    assert not hasattr(net, "extra")
    assert not hasattr(model, "tag")
    assert net.__dict__.keys() == Net().__dict__.keys() - {"tag"}


@pytest.mark.parametrize("name", ["module", "device", "mark_forward_method"])
def test_its_own_names_can_not_be_overwritten(set_up: Setup, name: str) -> None:
    """What would be set on the original and still be read from the wrapper is refused."""
    model, _ = set_up()
    with pytest.raises(AttributeError, match=rf"model\.module\.{name}"):
        setattr(model, name, 1)
    with pytest.raises(AttributeError, match="can't be deleted"):
        delattr(model, name)


def test_a_method_that_is_replaced_is_seen(set_up: Setup) -> None:
    """A method that the user puts on the original takes the place of the one that was read before."""
    model, net = set_up()
    assert model.describe() == "a net of 3"
    net.describe = types.MethodType(lambda _: "another", net)  # type: ignore[method-assign]
    assert model.describe() == "another"
    setattr(model, "forward", types.MethodType(lambda _, x: x + 1, net))  # noqa: B010 - a property to type checkers
    assert torch.equal(model.forward(X), X + 1)
    assert torch.equal(model(X), X + 1)


def test_hasattr_tells_the_truth(set_up: Setup) -> None:
    """A step method is there where the original has it, and only there."""
    model, _ = set_up()
    assert hasattr(model, "training_step")
    assert not hasattr(model, "validation_step")
    assert not hasattr(model, "missing")


def test_names_and_state_are_the_originals(set_up: Setup) -> None:
    """Parameter, module and state names carry no prefix; loading knows ``strict`` and ``assign``."""
    model, net = set_up()
    for method in ("named_parameters", "named_modules", "named_children", "named_buffers"):
        assert list(getattr(model, method)()) == list(getattr(net, method)())
    assert list(model.children()) == list(net.children())
    state = {name: torch.ones_like(value) for name, value in model.state_dict().items()}
    assert model.state_dict().keys() == net.state_dict().keys()
    model.load_state_dict(state)
    assert torch.equal(net.layer.weight, torch.ones(3, 4))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({})
    assert model.load_state_dict({}, strict=False).missing_keys == ["layer.weight", "layer.bias"]
    model.load_state_dict(state, assign=True)
    assert net.layer.weight.data_ptr() == state["layer.weight"].data_ptr()


def test_methods_that_return_the_model_return_the_wrapper(set_up: Setup) -> None:
    """A chain of calls does not lose the wrapper."""
    model, net = set_up()
    assert model.train(False) is model
    assert net.training is False
    assert model.eval().train().requires_grad_(False).double() is model
    assert net.layer.weight.dtype == torch.float64
    assert not net.layer.weight.requires_grad
    assert model.apply(nn.Module.zero_grad) is model
    assert model.to(torch.float32) is model


def test_train_and_eval_reach_the_original_once(set_up: Setup) -> None:
    """A model that counts or changes what ``train`` does sees one call each."""
    model, net = set_up()
    modes: list[bool] = []

    class Counting(Net):
        def train(self, mode: bool = True) -> "Counting":
            modes.append(mode)
            return super().train(mode)

    net.__class__ = Counting
    model.eval()
    model.train()
    assert modes == [False, True]


def test_the_device_follows_a_move(set_up: Setup) -> None:
    """After ``to`` the wrapper remembers the new device."""
    model, _ = set_up()
    model.to("meta")
    assert model.device == torch.device("meta")


@pytest.mark.parametrize(
    "container",
    [nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 2)]), nn.ModuleList()],
)
def test_a_sequence_stays_one(in_memory: dict[str, Any], container: Any) -> None:
    """Length, truth, index, slice, iteration and membership are the original's."""
    model = Fabric(**in_memory).setup(container)
    assert len(model) == len(container)
    assert bool(model) == bool(container)
    assert list(model) == list(container)
    for layer in container:
        assert layer in model
    if len(container):
        assert model[0] is container[0]
        assert list(model[:1]) == [container[0]]
        model[0] = new = nn.Linear(4, 4)
        assert container[0] is new
        del model[1]
        assert len(container) == 1


def test_a_dict_of_modules_stays_one(in_memory: dict[str, Any]) -> None:
    """Keys, items and membership are the original's."""
    modules = nn.ModuleDict({"a": nn.Linear(1, 1)})
    model = Fabric(**in_memory).setup(modules)
    assert model["a"] is modules["a"]
    assert list(model) == ["a"]
    assert "a" in model
    assert list(model.items()) == list(modules.items())
    with pytest.raises(TypeError, match="no len"):
        len(Fabric(**in_memory).setup(nn.Linear(1, 1)))


def test_it_shows_itself_as_the_original(set_up: Setup) -> None:
    """``repr`` and ``dir`` are the original's; ``dir`` names the wrapper's own too."""
    model, net = set_up()
    assert repr(model) == repr(net)
    assert set(dir(net)) < set(dir(model)) == {*dir(net), "module", "device", "mark_forward_method"}


def pickled(model: Any) -> Any:
    """Give what comes back from a pickle."""
    return pickle.loads(pickle.dumps(model))  # noqa: S301 - made right here


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_is_a_wrapped_model_of_its_own(set_up: Setup, copied: Callable[[Any], Any]) -> None:
    """A deep copy and a pickled one run alike, in the same precision, on parameters of their own, marks included."""
    model, net = set_up(precision=Half())
    model.mark_forward_method("generate")
    clone = copied(model)
    assert type(clone) is FabricModule
    assert clone.module is not net
    assert torch.equal(clone(X), model(X))
    assert clone(X).dtype == torch.float64
    assert torch.equal(clone.generate(X), model.generate(X))
    with torch.no_grad():
        clone.layer.weight.zero_()
    assert not torch.equal(clone(X), model(X))
    clone(X).sum().backward()
    assert net.layer.weight.grad is None


def test_a_deep_copy_keeps_model_and_optimizer_together(in_memory: dict[str, Any]) -> None:
    """Copied in one go, the copied optimizer steps the copied model."""
    net = nn.Linear(2, 1)
    pair = Fabric(**in_memory).setup(net, torch.optim.SGD(net.parameters(), lr=1.0))
    model, optimizer = copy.deepcopy(pair)
    before = net.weight.detach().clone()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(net.weight, before)
    assert torch.equal(model.weight, before - 1)


def test_a_shallow_copy_shares_the_original(set_up: Setup) -> None:
    """``copy.copy`` goes round the same original."""
    model, net = set_up()
    assert copy.copy(model).module is net


def test_several_models_and_fabrics_live_side_by_side(in_memory: dict[str, Any]) -> None:
    """Each model keeps its own Fabric's precision and strategy."""
    plain, half = Fabric(**in_memory), Fabric(**{**in_memory, "precision": Half(), "strategy": Routing()})
    nets = [Net() for _ in range(4)]
    models = [fabric.setup(net) for fabric, net in zip((plain, half, plain, half), nets, strict=True)]
    assert [model(X).dtype for model in models] == [torch.float32, torch.float64, torch.float32, torch.float64]
    assert [net.seen[0][0] for net in nets] == [False, True, False, True]


def test_precision_goes_round_forward_and_marked_methods(set_up: Setup) -> None:
    """Inputs are converted, the context is on, outputs are converted; the unmarked rest is left alone."""
    model, net = set_up(precision=Half())
    model.mark_forward_method("generate")
    assert model(X.double()).dtype == torch.float64
    assert model.generate(X.double()).dtype == torch.float64
    assert model.training_step(X.double()).dtype == torch.float64
    assert net.seen == [(True, True, torch.float32)] * 2
    assert model.describe() == "a net of 3"
    assert not torch.is_autocast_enabled("cpu")


def test_a_strategy_that_carries_the_types_is_left_to_it(in_memory: dict[str, Any]) -> None:
    """Nothing is cast on the way in and nothing autocasts where the strategy does it."""

    class Carrying(Routing):
        capabilities = StrategyCapabilities(max_world_size=1, intercepts_forward=True, applies_mixed_precision=True)

    net = Net().double()
    model = Fabric(**{**in_memory, "strategy": Carrying(), "precision": Half()}).setup(net)
    assert model(X.double()).dtype == torch.float64
    assert net.seen == [(False, True, torch.float64)]


def test_an_extension_round_a_conversion_is_heard(in_memory: dict[str, Any]) -> None:
    """A wrapped behaviour runs although the precision's own does nothing."""
    from fabric_core import around

    class Doubling:
        @around.precision
        def convert_input(self, data: Any) -> Any:
            args, kwargs = yield
            return tuple(2 * one for one in args), kwargs

    net = Net()
    model = Fabric(**{**in_memory, "plugins": [Doubling()]}).setup(net)
    assert torch.equal(model(X), net(2 * X))


@pytest.mark.parametrize("way", ["name", "own", "wrapped"])
def test_a_marked_method_passes_through_the_strategy(routed: tuple[FabricModule, Net, Outer], way: str) -> None:
    """Marked by name, by the original's method or by the wrapper's, it runs through the strategy's module."""
    model, net, outer = routed
    model.mark_forward_method({"name": "generate", "own": net.generate, "wrapped": model.generate}[way])
    expected = net.generate(X, steps=2)
    assert torch.equal(model.generate(X, steps=2), expected)
    assert outer.calls == ["generate"]
    assert "generate" not in vars(net)


@pytest.mark.parametrize(
    ("method", "error", "text"),
    [
        ("forward", ValueError, "needs no mark"),
        ("missing", AttributeError, "no method 'missing'"),
        ("tag", AttributeError, "no method but of the type str"),
        ("layer", AttributeError, "no method but of the type Linear"),
        ("constant", AttributeError, "no method but of the type function"),
        ("stream", TypeError, "goes on running"),
        ("later", TypeError, "goes on running"),
        (3, TypeError, "takes a method of Net or its name"),
        (Net.generate, TypeError, "takes a method of Net or its name"),
        (Net().generate, TypeError, "no method of this Net"),
    ],
)
def test_what_can_not_be_marked_says_so(set_up: Setup, method: Any, error: type[Exception], text: str) -> None:
    """Each wrong mark raises what its kind of mistake is, and says which."""
    model, _ = set_up()
    with pytest.raises(error, match=text):
        model.mark_forward_method(method)


def test_marking_forward_by_the_method_is_refused_too(set_up: Setup) -> None:
    """``model.forward`` given as a method is recognised."""
    model, net = set_up()
    for method in (model.forward, net.forward):
        with pytest.raises(ValueError, match="needs no mark"):
            model.mark_forward_method(method)


@pytest.mark.parametrize("name", ["training_step", "validation_step", "test_step", "predict_step"])
def test_step_methods_count_as_marked(in_memory: dict[str, Any], name: str) -> None:
    """The four step methods pass through the strategy without a mark."""
    strategy, net = Routing(), Net()
    setattr(type(net), name, Net.training_step)
    try:
        model = Fabric(**{**in_memory, "strategy": strategy}).setup(net)
        getattr(model, name)(X)
        assert strategy.outer.calls == [name]
    finally:
        if name != "training_step":
            delattr(Net, name)


def test_an_unmarked_method_that_runs_the_model_is_refused(routed: tuple[FabricModule, Net, Outer]) -> None:
    """The error names class and method and the call that cures it, before anything computes."""
    model, net, outer = routed
    with pytest.raises(MisuseError, match=r"Net\.generate(.|\n)*model\.mark_forward_method\('generate'\)"):
        model.generate(X)
    assert net.seen == []
    assert outer.calls == []
    with pytest.raises(MisuseError, match=r"Net\.again"):
        model.again(X, 3)


def test_an_unmarked_method_that_runs_no_module_is_free(routed: tuple[FabricModule, Net, Outer]) -> None:
    """Reading, counting and describing go on, and so do modules that are not the model's."""
    model, _, _ = routed
    assert model.describe("one") == "one net of 3"
    assert model.borrow(foreign := nn.Linear(4, 1), X).shape == (2, foreign.out_features)


def test_an_unmarked_method_may_use_the_wrapper(routed: tuple[FabricModule, Net, Outer]) -> None:
    """A method that runs the model through its wrapper runs it through the strategy."""
    model, net, outer = routed
    assert torch.equal(model.through(model, X), net(X))
    assert outer.calls == ["forward"]


def test_an_unmarked_generator_is_refused_where_it_runs_the_model(routed: tuple[FabricModule, Net, Outer]) -> None:
    """A generator is watched while it runs, and leaves others alone while it waits."""
    model, net, _ = routed
    stream = model.stream(X)
    assert next(stream) is None
    net(X)
    with pytest.raises(MisuseError, match=r"Net\.stream"):
        next(stream)
    model.stream(X).close()


def test_the_guard_is_for_its_own_thread(routed: tuple[FabricModule, Net, Outer]) -> None:
    """While one thread is inside an unmarked method, another runs the model undisturbed."""
    model, net, _ = routed
    inside, done = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def other() -> None:
        try:
            inside.wait(10)
            model(X)
            net(X)
        except BaseException as error:  # noqa: BLE001 - handed to the test
            failures.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    model.wait(inside, done)
    thread.join()
    assert failures == []


def test_marked_methods_behave_as_on_the_bare_module(set_up: Setup) -> None:
    """Raising, recursing, calling ``self``, another marked method, without gradients: all as on the original."""
    model, net = set_up()
    for name in ("generate", "again", "fail"):
        model.mark_forward_method(name)
    with pytest.raises(KeyError, match="inside"):
        model.fail(X)
    assert torch.equal(model.again(X, 5), net.again(X, 5))
    with torch.no_grad():
        assert not model.generate(X).requires_grad
    assert net.seen[-1][1] is False
    assert model.generate(X).requires_grad


def test_marked_methods_run_in_several_threads_at_once(set_up: Setup) -> None:
    """Two threads inside the same marked method get their own results."""
    model, _ = set_up(precision=Half())
    model.mark_forward_method("generate")
    inputs = [X * factor for factor in range(8)]
    results: dict[int, torch.Tensor] = {}

    def work(number: int) -> None:
        for _ in range(20):
            results[number] = model.generate(inputs[number], steps=2)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, x in enumerate(inputs):
        assert torch.equal(results[number], model.generate(x, steps=2))


def test_no_attribute_of_the_model_is_touched(set_up: Setup) -> None:
    """After every kind of run the original has the attributes, hooks and methods that it had."""

    def seen(net: Net) -> Mapping[str, Any]:
        return {name: value for name, value in vars(net).items() if name != "seen"} | {"class": type(net)}

    model, net = set_up()
    before = copy.copy(seen(net))
    model.mark_forward_method("generate")
    model.generate(X)
    model(X).sum().backward()
    model.describe()
    model.mark_forward_method("fail")
    with pytest.raises(KeyError):
        model.fail(X)
    assert seen(net) == before


def test_the_route_passes_forward_and_methods() -> None:
    """The thin module that a strategy wraps runs the module or a method of it, and is its only parent."""
    net = Net()
    route = Route(net)
    assert torch.equal(route("forward", X, scale=3.0), net(X, scale=3.0))
    assert torch.equal(route("generate", X), net.generate(X))
    assert dict(route.named_children()) == {"module": net}
