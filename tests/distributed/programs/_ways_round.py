"""Scripts that go round Fabric in one way each, and right ones that only look so; each runs with Fabric and without.

A script is a function of a ``Run``: it trains a small model for a few steps on this process's rows. Without Fabric the
rows are all there are, so that it ends where every rank must end.
"""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from fabric_core import Fabric

Script = Callable[["Run"], None]


class Net(nn.Module):
    """A body and a head, with methods of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.body(x))

    def score(self, x: torch.Tensor) -> torch.Tensor:
        return self(x).square().mean()  # type: ignore[no-any-return]

    def both(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inner = self.features(x)
        return inner, self.head(inner)


class Pair(Net):
    """Gives two outputs, of which a script may use one."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.both(x)


def loss_of(output: torch.Tensor) -> torch.Tensor:
    """Give a loss that is a mean over the rows, as averaging over ranks needs it."""
    return (output - 1).square().mean()


class Run:
    """One run of a script: what it trains, with Fabric or in plain PyTorch.

    Args:
        fabric: The Fabric, or ``None``.
        rows: All rows, divided over the ranks.
    """

    def __init__(self, fabric: Fabric | None, rows: int = 8) -> None:
        self.fabric = fabric
        self.nets: list[nn.Module] = []
        everything = torch.linspace(-2, 2, rows * 4).reshape(rows, 4).cos() * torch.linspace(0.2, 3, rows)[:, None]
        index, count = (0, 1) if fabric is None else fabric.strategy.data_shard()
        self.x = everything[index * rows // count : (index + 1) * rows // count]

    def net(self, kind: type[nn.Module] = Net, seed: int = 3) -> Any:
        """Make a model, the same on every rank."""
        torch.manual_seed(seed)
        self.nets.append(kind())
        return self.nets[-1]

    def sgd(self, *modules: nn.Module) -> torch.optim.Optimizer:
        """Make an optimizer."""
        return torch.optim.SGD([one for net in modules for one in net.parameters()], lr=0.05, momentum=0.5)

    def setup(self, net: Any, *optimizers: Any) -> Any:
        """Set up, or return what was given."""
        if self.fabric is None:
            return (net, *optimizers) if optimizers else net
        return self.fabric.setup(net, *optimizers)

    def backward(self, loss: torch.Tensor, **arguments: Any) -> None:
        """Run a backward pass as it should be run."""
        loss.backward(**arguments) if self.fabric is None else self.fabric.backward(loss, **arguments)

    def no_sync(self, model: Any, enabled: bool = True) -> AbstractContextManager[Any]:
        """Skip gradient synchronization."""
        return contextlib.nullcontext() if self.fabric is None else self.fabric.no_backward_sync(model, enabled)

    def common(self, rows: int = 8) -> torch.Tensor:
        """Give rows that are the same on every rank."""
        return torch.linspace(-1, 1, rows * 4).reshape(rows, 4)

    def parameters(self) -> list[torch.Tensor]:
        """Give what was trained, whole."""
        found = [one for net in self.nets for one in net.parameters()]
        return [(one.full_tensor() if hasattr(one, "full_tensor") else one).detach().clone() for one in found]


def usual(run: Run) -> tuple[Any, Any, Any, Any]:
    """Give a net, its optimizer, and what setup makes of them."""
    net = run.net()
    raw = run.sgd(net)
    model, optimizer = run.setup(net, raw)
    return net, raw, model, optimizer


def step(run: Run, model: Any, optimizer: Any) -> None:
    """Do one right step."""
    run.backward(loss_of(model(run.x)))
    optimizer.step()
    optimizer.zero_grad()


# --- Ways round: each raises, or trains as plain PyTorch does ------------------------------------

WAYS: dict[str, Script] = {}
RIGHT: dict[str, Script] = {}


def way(script: Script) -> Script:
    """Register a way round."""
    WAYS[script.__name__] = script
    return script


def right(script: Script) -> Script:
    """Register a right program."""
    RIGHT[script.__name__] = script
    return script


@way
def forward_unsynchronized(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    with run.no_sync(model):
        loss = loss_of(model(run.x))
    run.backward(loss)
    optimizer.step()


@way
def all_unsynchronized(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    optimizer.step()


@way
def backward_unsynchronized(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    loss = loss_of(model(run.x))
    with run.no_sync(model):
        run.backward(loss)
    optimizer.step()


@way
def accumulation_ends_unsynchronized(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    for last in (False, True):
        with run.no_sync(model, enabled=last):
            run.backward(loss_of(model(run.x)))
    optimizer.step()


@way
def accumulation_ends_raw(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    run.backward(loss_of(model(run.x)))
    run.backward(loss_of(net(run.x)))
    optimizer.step()


@way
def raw_model(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    run.backward(loss_of(net(run.x)))
    optimizer.step()


@way
def raw_model_after_a_right_step(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    run.backward(loss_of(net(run.x)))
    optimizer.step()


@way
def raw_model_and_raw_backward(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    loss_of(net(run.x)).backward()
    optimizer.step()


@way
def raw_model_backward_and_optimizer(run: Run) -> None:
    net, raw, model, optimizer = usual(run)
    step(run, model, optimizer)
    loss_of(net(run.x)).backward()
    raw.step()


@way
def raw_part(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    features = torch.tanh(run.x @ torch.ones(4, 6))
    run.backward(loss_of(net.head(features)))
    optimizer.step()


@way
def raw_part_through_the_wrapper(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    run.backward(loss_of(model.head(torch.tanh(run.x @ torch.ones(4, 6)))))
    optimizer.step()


@way
def raw_part_between_forward_and_backward(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    loss = loss_of(model(run.x))
    run.backward(loss_of(model.head(torch.tanh(run.x @ torch.ones(4, 6)))))
    optimizer.step()
    del loss


@way
def raw_part_beside_the_model(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    output = model(run.x)
    run.backward(loss_of(output) + loss_of(model.head(torch.tanh(run.x @ torch.ones(4, 6)))))
    optimizer.step()


@way
def raw_method(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    run.backward(net.score(run.x))
    optimizer.step()


@way
def unmarked_method(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    run.backward(model.score(run.x))
    optimizer.step()


@way
def raw_backward(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    loss_of(model(run.x)).backward()
    optimizer.step()


@way
def raw_optimizer(run: Run) -> None:
    _, raw, model, optimizer = usual(run)
    for _ in range(2):
        run.backward(loss_of(model(run.x)))
        raw.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(run.x)


@way
def raw_optimizer_after_a_right_step(run: Run) -> None:
    _, raw, model, optimizer = usual(run)
    step(run, model, optimizer)
    run.backward(loss_of(model(run.x)))
    raw.step()


@way
def raw_optimizer_on_unsynchronized(run: Run) -> None:
    _, raw, model, _ = usual(run)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    raw.step()


@way
def optimizer_never_set_up(run: Run) -> None:
    net = run.net()
    model = run.setup(net)
    optimizer = run.sgd(net)
    run.backward(loss_of(model(run.x)))
    optimizer.step()


@way
def optimizer_never_set_up_on_unsynchronized(run: Run) -> None:
    net = run.net()
    model = run.setup(net)
    optimizer = run.sgd(net)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    optimizer.step()


@way
def closure_runs_the_raw_model(run: Run) -> None:
    net, _, _, optimizer = usual(run)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(net(run.x))
        run.backward(loss)
        return loss

    optimizer.step(closure)


@way
def closure_unsynchronized(run: Run) -> None:
    _, _, model, optimizer = usual(run)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        with run.no_sync(model):
            loss = loss_of(model(run.x))
            run.backward(loss)
        return loss

    optimizer.step(closure)


@way
def closure_of_the_raw_optimizer(run: Run) -> None:
    net, raw, _, optimizer = usual(run)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(net(run.x))
        run.backward(loss)
        return loss

    raw.step(closure)


@way
def raw_step_inside_a_closure(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    other = run.net(seed=4)
    second = run.sgd(other)
    run.setup(other, second)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(run.x))
        run.backward(loss)
        run.backward(loss_of(other(run.x)))
        second.step()
        return loss

    optimizer.step(closure)


@way
def two_forwards_then_two_backwards(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    losses = [loss_of(model(run.x)), loss_of(model(run.x * 2))]
    for loss in losses:
        run.backward(loss)
    optimizer.step()


@way
def retained_graph_twice(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    loss = loss_of(model(run.x))
    run.backward(loss, retain_graph=True)
    run.backward(loss)
    optimizer.step()


@way
def unsynchronized_forward_between(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    first = loss_of(model(run.x))
    with run.no_sync(model):
        second = loss_of(model(run.x * 2))
        run.backward(second)
    run.backward(first)
    optimizer.step()


@way
def stale_preparation(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    loss = loss_of(model(run.x))
    with run.no_sync(model):
        run.backward(loss)
        second = loss_of(model(run.x * 2))
    run.backward(second)
    optimizer.step()


@way
def penalty_between_forward_and_backward(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    loss = loss_of(model(run.x))
    run.backward(sum(one.square().sum() for one in net.parameters()) * 1e-2)
    run.backward(loss)
    optimizer.step()


@way
def raw_backward_of_a_penalty(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    penalty: Any = sum(one.square().sum() for one in net.parameters()) * 1e-2
    penalty.backward()
    run.backward(loss_of(model(run.x)))
    optimizer.step()


@way
def one_output_of_two(run: Run) -> None:
    net = run.net(Pair)
    model, optimizer = run.setup(net, run.sgd(net))
    run.backward(loss_of(model(run.x)[0]))
    optimizer.step()


@way
def unused_parameters(run: Run) -> None:
    net = run.net()
    model, optimizer = run.setup(net, run.sgd(net))
    if run.fabric is not None:
        model.mark_forward_method("features")
    run.backward(loss_of(model.features(run.x)))
    optimizer.step()


@way
def frozen_after_setup(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    net.head.requires_grad_(requires_grad=False)
    run.backward(loss_of(model(run.x)))
    optimizer.step()


@way
def thawed_after_setup_and_raw(run: Run) -> None:
    net = run.net()
    net.head.requires_grad_(requires_grad=False)
    model, optimizer = run.setup(net, run.sgd(net))
    step(run, model, optimizer)
    net.head.requires_grad_(requires_grad=True)
    run.backward(loss_of(net(run.x)))
    optimizer.step()


@way
def raw_model_compiled(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    compiled: Any = torch.compile(net, backend="eager")
    run.backward(loss_of(compiled(run.x)))
    optimizer.step()


@way
def second_of_two_models_raw(run: Run) -> None:
    one, two = run.net(), run.net(seed=4)
    model, first = run.setup(one, run.sgd(one))
    _, second = run.setup(two, run.sgd(two))
    run.backward(loss_of(model(run.x)) + loss_of(two(run.x)))
    first.step()
    second.step()


@way
def one_optimizer_over_a_raw_and_a_right_model(run: Run) -> None:
    one, two = run.net(), run.net(seed=4)
    optimizer = run.sgd(one, two)
    model = run.setup(one)
    run.setup(two)
    if run.fabric is not None:
        optimizer = run.fabric.setup_optimizers(optimizer)
    run.backward(loss_of(model(run.x)) + loss_of(two(run.x)))
    optimizer.step()


@way
def raw_after_a_failed_forward(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    with contextlib.suppress(RuntimeError):
        model(run.x.T)
    run.backward(loss_of(net(run.x)))
    optimizer.step()


@way
def raw_copy(run: Run) -> None:
    import copy

    _, _, model, _ = usual(run)
    clone = copy.deepcopy(model)
    net = clone if run.fabric is None else clone.module
    run.nets.append(net)
    optimizer = run.sgd(net)
    run.backward(loss_of(net(run.x)))
    optimizer.step()


@way
def hooks_of_a_failed_backward(run: Run) -> None:
    net, _, model, optimizer = usual(run)

    def fail(_gradient: torch.Tensor) -> None:
        raise KeyError("in between")

    output = model(run.x)
    output.register_hook(fail)
    with contextlib.suppress(KeyError):
        run.backward(loss_of(output))
    run.backward(loss_of(net(run.x)))
    optimizer.step()


# --- Right programs: none raises, all train as plain PyTorch does ---------------------------------


@right
def plain_steps(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    for _ in range(3):
        step(run, model, optimizer)


@right
def accumulation(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    for index in range(4):
        with run.no_sync(model, enabled=index % 2 == 0):
            run.backward(loss_of(model(run.x * (index + 1))))
        if index % 2:
            optimizer.step()
            optimizer.zero_grad()


@right
def accumulation_synchronized(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    for _ in range(2):
        run.backward(loss_of(model(run.x)))
    optimizer.step()


@right
def evaluation_in_between(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    for _ in range(2):
        loss = loss_of(model(run.x))
        model.eval()
        with torch.no_grad():
            model(run.x)
        model.train()
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model(run.x)
    del net


@right
def closure(run: Run) -> None:
    _, _, model, optimizer = usual(run)

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(run.x))
        run.backward(loss)
        return loss

    for _ in range(2):
        optimizer.step(evaluate)


@right
def step_without_gradients(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    optimizer.step()
    step(run, model, optimizer)
    optimizer.step()


@right
def cleared_unsynchronized(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    optimizer.zero_grad()
    step(run, model, optimizer)


@right
def cleared_by_the_model(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    model.zero_grad()
    optimizer.step()
    step(run, model, optimizer)


@right
def cleared_by_the_raw_optimizer(run: Run) -> None:
    _, raw, model, optimizer = usual(run)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    raw.zero_grad()
    optimizer.step()
    step(run, model, optimizer)


@right
def one_backward_of_two_forwards(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    run.backward(loss_of(model(run.x)) + loss_of(model(run.x * 2)))
    optimizer.step()


@right
def autograd_grad(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    x = run.x.clone().requires_grad_()
    torch.autograd.grad(loss_of(model(x)), x)
    step(run, model, optimizer)
    del net


@right
def marked_method(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    if run.fabric is not None:
        model.mark_forward_method("score")
    for _ in range(2):
        run.backward(model.score(run.x))
        optimizer.step()
        optimizer.zero_grad()


@right
def compiled_after_setup(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        step(run, compiled, optimizer)


@right
def compiled_before_setup(run: Run) -> None:
    net = run.net()
    compiled = torch.compile(net, backend="eager")
    model, optimizer = run.setup(compiled, run.sgd(net))
    for _ in range(2):
        step(run, model, optimizer)


@right
def frozen_before_setup(run: Run) -> None:
    net = run.net()
    net.head.requires_grad_(requires_grad=False)
    model, optimizer = run.setup(net, run.sgd(net))
    for _ in range(2):
        step(run, model, optimizer)


@right
def two_models(run: Run) -> None:
    one, two = run.net(), run.net(seed=4)
    model, first = run.setup(one, run.sgd(one))
    other, second = run.setup(two, run.sgd(two))
    for _ in range(2):
        run.backward(loss_of(model(run.x)) + loss_of(other(run.x)))
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()


@right
def two_optimizers(run: Run) -> None:
    net = run.net()
    model, body, head = run.setup(net, run.sgd(net.body), run.sgd(net.head))
    for _ in range(2):
        run.backward(loss_of(model(run.x)))
        body.step()
        head.step()
        body.zero_grad()
        head.zero_grad()


@right
def one_model_behind_another(run: Run) -> None:
    class Back(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    one, two = run.net(), run.net(Back, seed=4)
    model, first = run.setup(one, run.sgd(one))
    other, second = run.setup(two, run.sgd(two))
    run.backward(loss_of(other(model(run.x))))
    first.step()
    second.step()


@right
def an_adversarial_pair(run: Run) -> None:
    class Judge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x)  # type: ignore[no-any-return]

    maker, judge = run.net(), run.net(Judge, seed=4)
    make, make_step = run.setup(maker, run.sgd(maker))
    tell, tell_step = run.setup(judge, run.sgd(judge))
    for _ in range(2):
        fake = make(run.x)
        run.backward(tell(run.x[:, :2]).square().mean() + (tell(fake.detach()) - 1).square().mean())
        tell_step.step()
        tell_step.zero_grad()
        judge.requires_grad_(requires_grad=False)
        run.backward(tell(fake).square().mean())
        judge.requires_grad_(requires_grad=True)
        make_step.step()
        make_step.zero_grad()


@right
def gradients_made_by_hand(run: Run) -> None:
    net, raw, model, optimizer = usual(run)
    step(run, model, optimizer)
    for one in net.parameters():
        one.grad = torch.full_like(one, 0.25)
    raw.step() if _scales(run) else optimizer.step()


@right
def a_failed_forward(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    with contextlib.suppress(RuntimeError):
        model(run.x[:, :3])
    step(run, model, optimizer)


@right
def parameters_outside_any_model(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    scale = nn.Parameter(torch.ones(1))
    outside = torch.optim.SGD([scale], lr=0.1)
    if run.fabric is not None:
        outside = run.fabric.setup_optimizers(outside)
    run.backward(loss_of(model(run.x)))
    run.backward((scale * run.common()).square().mean())
    optimizer.step()
    outside.step()
    assert torch.allclose(scale, torch.ones(1) - 0.2 * run.common().square().mean(), atol=1e-2)


@right
def a_model_that_was_never_set_up(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    other = nn.Linear(4, 1)
    alone = torch.optim.SGD(other.parameters(), lr=0.1)
    for _ in range(2):
        other(run.x).square().mean().backward()
        alone.step()
        alone.zero_grad()
        step(run, model, optimizer)


@right
def clipping(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    for _ in range(2):
        run.backward(loss_of(model(run.x)))
        if run.fabric is None:
            nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        else:
            run.fabric.clip_gradients(model, optimizer, max_norm=0.1)
        optimizer.step()
        optimizer.zero_grad()


@right
def penalty_before_forward(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    run.backward(sum(one.square().sum() for one in net.parameters()) * 1e-2)
    run.backward(loss_of(model(run.x)))
    optimizer.step()


@right
def penalty_in_the_loss(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    run.backward(loss_of(model(run.x)) + sum(one.square().sum() for one in net.parameters()) * 1e-2)
    optimizer.step()


@right
def gradient_penalty(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    for _ in range(2):
        x = run.x.clone().requires_grad_()
        output = model(x)
        (slope,) = torch.autograd.grad(output.float().sum(), x, create_graph=True)
        run.backward(loss_of(output) + slope.square().mean())
        optimizer.step()
        optimizer.zero_grad()


@right
def gradient_penalty_alone(run: Run) -> None:
    net = run.net()
    for one in (net.body.bias, net.head.bias):
        one.requires_grad_(requires_grad=False)
    model, optimizer = run.setup(net, torch.optim.SGD(net.parameters(), lr=0.05))
    for _ in range(2):
        x = run.x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).float().sum(), x, create_graph=True)
        run.backward((slope.square().sum(1) - 1).square().mean())
        optimizer.step()
        optimizer.zero_grad()


@right
def a_copy(run: Run) -> None:
    import copy

    _, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    clone, stepper = copy.deepcopy((model, optimizer))
    run.nets.append(clone if run.fabric is None else clone.module)
    for _ in range(2):
        step(run, clone, stepper)
    step(run, model, optimizer)


@right
def scheduler_and_raw_zero_grad(run: Run) -> None:
    net, raw, model, optimizer = usual(run)
    scheduler = torch.optim.lr_scheduler.StepLR(raw, 1, 0.5)
    for _ in range(3):
        run.backward(loss_of(model(run.x)))
        optimizer.step()
        scheduler.step()
        net.zero_grad()


@right
def an_unused_forward(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    model(run.x)
    step(run, model, optimizer)
    model(run.x)
    step(run, model, optimizer)


def _scales(run: Run) -> bool:
    return run.fabric is not None and run.fabric.precision.policy.loss_scaling
