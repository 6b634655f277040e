"""After a thousand calls of every kind, exceptions included, nothing is left: no hook, no cycle, no growth."""

import contextlib
import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torch_modules
from torch.optim import SGD
from torch.utils.data import DataLoader

from fabric_core import Fabric, FabricModule, Precision, Strategy
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import PrecisionPolicy, StrategyCapabilities, World
from fabric_core.errors import MisuseError

COUNT = 500
ROUNDS = 3


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


class Everything(Precision):
    """Needs all that a precision can need."""

    @property
    def policy(self) -> PrecisionPolicy:
        return PrecisionPolicy(
            compute_dtype=torch.bfloat16,
            input_dtype=torch.float32,
            output_dtype=torch.float32,
            autocast=True,
            loss_scaling=True,
        )

    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        return torch.autocast(device_type, torch.bfloat16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.layer(x))

    def generate(self, x: torch.Tensor) -> Any:
        return self(x)

    def unmarked(self, x: torch.Tensor) -> Any:
        return self.layer(x)

    def stream(self, x: torch.Tensor) -> Iterator[Any]:
        yield None
        yield self.layer(x)

    def fail(self, x: torch.Tensor) -> None:
        self.layer(x)
        raise KeyError("inside")

    def describe(self) -> int:
        return 3


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute in one thread: the many small steps here would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["plain", "everything"])
def fabric(request: pytest.FixtureRequest, in_memory: dict[str, Any]) -> Fabric:
    """Give a Fabric that needs nothing round a model, and one that needs everything."""
    more = {} if request.param == "plain" else {"strategy": Routing(), "precision": Everything()}
    return Fabric(**{**in_memory, **more})


X = torch.ones(2, 4)


def once(fabric: Fabric, model: FabricModule, optimizer: Any, loader: Any) -> None:
    """Do one of everything."""
    for _ in loader:
        optimizer.zero_grad()
        fabric.backward(model(X).sum())
        optimizer.step()
    model.forward(X)
    model.generate(X)
    model.describe()
    model.train().eval()
    _ = model.layer.weight, model.last[0], model.state_dict(), list(model.modules()), dir(model), repr(model)
    model.note = 1
    del model.note
    model.mark_forward_method("generate")
    for action in (
        lambda: model.fail(X),
        lambda: model.unmarked(X),
        lambda: list(model.stream(X)),
        lambda: model(X.reshape(4, 2)),
        lambda: model(X).sum().backward(),
        lambda: model.missing,
        lambda: model.mark_forward_method("missing"),
    ):
        with contextlib.suppress(KeyError, MisuseError, RuntimeError, AttributeError):
            action()


def prepared(fabric: Fabric) -> tuple[FabricModule, Any, Any]:
    """Set up one of everything."""
    net = Net()
    model, optimizer = fabric.setup(net, SGD(net.parameters(), lr=0.1))
    model.mark_forward_method("generate")
    model.mark_forward_method("fail")
    return model, optimizer, fabric.setup_dataloaders(DataLoader([1.0, 2.0]))  # type: ignore[arg-type]


def hooks(module: nn.Module) -> int:
    """Count every hook of a module, its parts, its parameters, and of all modules."""
    count = sum(
        len(found)
        for name, found in vars(torch_modules).items()
        if name.startswith("_global_") and isinstance(found, dict)
    )
    for part in module.modules():
        count += sum(len(found) for name, found in vars(part).items() if "hooks" in name and found)
    for parameter in module.parameters():
        count += len(parameter._backward_hooks or ()) + len(parameter._post_accumulate_grad_hooks or ())
    return count


def test_a_thousand_calls_leave_no_hook_and_no_growth(fabric: Fabric) -> None:
    """Hooks are as many as before, and neither objects nor blocks of memory grow with the calls."""
    parts = prepared(fabric)
    for _ in range(100):
        once(fabric, *parts)
    before = hooks(parts[0].module)
    grown = []
    for _ in range(ROUNDS):
        gc.collect()
        objects, blocks = len(gc.get_objects()), sys.getallocatedblocks()
        for _ in range(COUNT):
            once(fabric, *parts)
        gc.collect()
        grown.append((len(gc.get_objects()) - objects, sys.getallocatedblocks() - blocks))
    assert hooks(parts[0].module) == before
    # Autograd's engine fills pools of its own, with Python 3.13 for hundreds of calls. What leaks grows in every round.
    assert min(objects for objects, _ in grown) < COUNT / 10, grown
    assert min(blocks for _, blocks in grown) < COUNT / 2, grown


def test_nothing_keeps_a_model_alive(fabric: Fabric) -> None:
    """After ``del`` the model is gone without the cycle collector, and so are optimizer and loader with it."""
    for used in (False, True):
        model, optimizer, loader = prepared(fabric)
        if used:
            once(fabric, model, optimizer, loader)
            # PyTorch's engine forgets what is left of a failed pass when the next one begins.
            torch.ones(1, requires_grad=True).sum().backward()
        alive = [weakref.ref(one) for one in (model, model.module, loader, optimizer, model.layer.weight)]
        gc.collect()
        gc.disable()
        try:
            del model, loader
            assert [one() for one in alive[:3]] == [None] * 3
        finally:
            gc.enable()
        # An optimizer of PyTorch's keeps itself alive in cycles of its own.
        del optimizer
        gc.collect()
        assert [one() for one in alive] == [None] * 5


def test_setting_up_again_and_again_leaves_nothing(fabric: Fabric) -> None:
    """A hundred models, each set up and dropped, leave no object behind in the Fabric."""
    once(fabric, *prepared(fabric))
    gc.collect()
    objects = len(gc.get_objects())
    for _ in range(100):
        once(fabric, *prepared(fabric))
    gc.collect()
    assert len(gc.get_objects()) - objects < 100


def test_threads_leave_no_hook(fabric: Fabric) -> None:
    """Several threads in and out of guarded methods leave none either."""
    model, _, _ = prepared(fabric)

    def work() -> None:
        for _ in range(50):
            with contextlib.suppress(MisuseError):
                model.unmarked(X)
            model.describe()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert hooks(model.module) == 0
