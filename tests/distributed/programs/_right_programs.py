"""More right programs that look as if they went round Fabric; they add themselves to those of ``_ways_round``."""

from typing import Any

import torch
from _ways_round import Net, Run, loss_of, right, step, usual
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__: list[str] = []


@right
def line_search(run: Run) -> None:
    net = run.net()
    model, optimizer = run.setup(net, torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=1))

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model(run.x))
        run.backward(loss)
        return loss

    # One iteration: a second one divides by differences of gradients, which magnifies what 16 bits round off.
    optimizer.step(evaluate)


class Checkpointed(Net):
    """Computes its features again in the backward pass."""

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(checkpoint(self.body, x.clone().requires_grad_(), use_reentrant=False))


@right
def checkpointed_activations(run: Run) -> None:
    net = run.net(Checkpointed)
    model, optimizer = run.setup(net, run.sgd(net))
    for _ in range(2):
        step(run, model, optimizer)


@right
def cleared_in_place(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    optimizer.zero_grad(set_to_none=False)
    run.backward(loss_of(model(run.x)))
    optimizer.step()


class Judge(nn.Module):
    """Tells what a ``Net`` gave from what is real."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


@right
def an_adversarial_pair_in_turn(run: Run) -> None:
    maker, judge = run.net(), run.net(Judge, seed=4)
    make, make_step = run.setup(maker, run.sgd(maker))
    tell, tell_step = run.setup(judge, run.sgd(judge))
    for _ in range(2):
        tell_step.zero_grad()
        run.backward(tell(run.x[:, :2]).square().mean())
        tell_step.step()
        make_step.zero_grad()
        run.backward(tell(make(run.x)).square().mean())
        make_step.step()


class Tied(Net):
    """Its body is as wide as its input, and has a weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.body.weight
        self.head = nn.Linear(4, 2)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.again(torch.tanh(self.body(x))))


@right
def tied_weights(run: Run) -> None:
    net = run.net(Tied)
    model, optimizer = run.setup(net, run.sgd(net))
    for _ in range(2):
        step(run, model, optimizer)


class Words(nn.Module):
    """Looks its inputs up."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(x))  # type: ignore[no-any-return]


@right
def embedding(run: Run) -> None:
    net = run.net(Words)
    model, optimizer = run.setup(net, run.sgd(net))
    for _ in range(2):
        run.backward(loss_of(model((run.x[:, 0].abs() * 100).long() % 5)))
        optimizer.step()
        optimizer.zero_grad()


@right
def perturbed_and_back(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    for _ in range(2):
        run.backward(loss_of(model(run.x)))
        optimizer.zero_grad()
        with torch.no_grad():
            moves = [torch.full_like(one, 0.01) for one in net.parameters()]
            for one, move in zip(net.parameters(), moves, strict=True):
                one.add_(move)
        run.backward(loss_of(model(run.x)))
        with torch.no_grad():
            for one, move in zip(net.parameters(), moves, strict=True):
                one.sub_(move)
        optimizer.step()
        optimizer.zero_grad()


@right
def teacher_and_student(run: Run) -> None:
    teacher = run.net(seed=8)
    teacher.requires_grad_(requires_grad=False)
    teach = run.setup(teacher)
    _, _, model, optimizer = usual(run)
    for _ in range(2):
        with torch.no_grad():
            wanted = teach(run.x)
        run.backward((model(run.x) - wanted).square().mean())
        optimizer.step()
        optimizer.zero_grad()


@right
def teacher_that_could_be_trained(run: Run) -> None:
    teach = run.setup(run.net(seed=8))
    _, _, model, optimizer = usual(run)
    for _ in range(2):
        run.backward((model(run.x) - teach(run.x).detach()).square().mean())
        optimizer.step()
        optimizer.zero_grad()


@right
def gradient_given(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    output = model(run.x)
    run.backward(output, gradient=torch.full_like(output, 1 / output.numel()))
    optimizer.step()


@right
def shallow_copy_of_the_model(run: Run) -> None:
    import copy

    _, _, model, optimizer = usual(run)
    for called in (copy.copy(model), model):
        step(run, called, optimizer)


@right
def new_optimizer_halfway(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    other: Any = torch.optim.SGD(list(net.parameters()), lr=0.01)
    if run.fabric is not None:
        other = run.fabric.setup_optimizers(other)
    step(run, model, other)


@right
def group_added_halfway(run: Run) -> None:
    net = run.net()
    model, optimizer = run.setup(net, run.sgd(net.body))
    step(run, model, optimizer)
    net.zero_grad()
    optimizer.add_param_group({"params": list(net.head.parameters())})
    step(run, model, optimizer)


@right
def step_inside_the_context(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    run.backward(loss_of(model(run.x)))
    with run.no_sync(model):
        optimizer.step()


@right
def cleared_between_forward_and_backward(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    for _ in range(2):
        loss = loss_of(model(run.x))
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()


@right
def one_of_two_models_steps(run: Run) -> None:
    one, two = run.net(), run.net(seed=4)
    model, first = run.setup(one, run.sgd(one))
    other, second = run.setup(two, run.sgd(two))
    for optimizer in (first, second):
        run.backward(loss_of(model(run.x)) + loss_of(other(run.x)))
        optimizer.step()
        first.zero_grad()
        second.zero_grad()


@right
def one_optimizer_over_two_models(run: Run) -> None:
    one, two = run.net(), run.net(seed=4)
    optimizer: Any = run.sgd(one, two)
    model, other = run.setup(one), run.setup(two)
    if run.fabric is not None:
        optimizer = run.fabric.setup_optimizers(optimizer)
    for _ in range(2):
        run.backward(loss_of(model(run.x)) + loss_of(other(run.x)))
        optimizer.step()
        optimizer.zero_grad()


@right
def accumulation_of_two_models(run: Run) -> None:
    one, two = run.net(), run.net(seed=4)
    model, first = run.setup(one, run.sgd(one))
    other, second = run.setup(two, run.sgd(two))
    step(run, model, first)
    step(run, other, second)
    with run.no_sync(model), run.no_sync(other):
        run.backward(loss_of(model(run.x)) + loss_of(other(run.x)))
    run.backward(loss_of(model(run.x * 2)) + loss_of(other(run.x * 2)))
    first.step()
    second.step()


@right
def hessian_by_vector(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    x = run.common().requires_grad_()
    (slope,) = torch.autograd.grad(loss_of(model(x)), x, create_graph=True)
    torch.autograd.grad(slope.sum(), x)
    step(run, model, optimizer)


@right
def running_average_of_weights(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    averages = [one.detach().clone() for one in net.parameters()]
    for _ in range(2):
        step(run, model, optimizer)
        with torch.no_grad():
            for average, one in zip(averages, net.parameters(), strict=True):
                average.lerp_(one, 0.1)


@right
def frozen_and_thawed_between_steps(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    net.requires_grad_(requires_grad=False)
    model(run.x)
    net.requires_grad_(requires_grad=True)
    step(run, model, optimizer)


@right
def numbers_read_from_gradients(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    run.backward(loss_of(model(run.x)))
    assert all(one.grad is not None and bool(one.grad.isfinite().all()) for one in net.parameters())
    optimizer.step()


def averaged(run: Run, gradient: Any, reduce_op: str = "mean") -> Any:
    """Reduce a gradient, as a script does that averages by itself."""
    return gradient if run.fabric is None else run.fabric.all_reduce(gradient, reduce_op=reduce_op)


def unsynchronized(run: Run, model: Any, passes: int = 2) -> None:
    """Run backward passes inside ``no_backward_sync``."""
    for index in range(passes):
        with run.no_sync(model):
            run.backward(loss_of(model(run.x * (index + 1))))


@right
def averaged_by_the_script(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    for _ in range(2):
        unsynchronized(run, model)
        for one in net.parameters():
            one.grad = averaged(run, one.grad)
            one.grad.mul_(0.5)
        optimizer.step()
        optimizer.zero_grad()
    step(run, model, optimizer)


@right
def averaged_by_the_script_in_one_piece(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    unsynchronized(run, model)
    own = list(net.parameters())
    flat = averaged(run, torch.cat([one.grad.flatten() for one in own]))
    for one, part in zip(own, flat.split([one.numel() for one in own]), strict=True):
        one.grad = part.view_as(one)
    optimizer.step()


@right
def averaged_by_the_script_into_what_is_there(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    unsynchronized(run, model)
    found = averaged(run, [one.grad for one in net.parameters()])
    for one, gradient in zip(net.parameters(), found, strict=True):
        one.grad.copy_(gradient)
    optimizer.step()


@right
def summed_by_the_script(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    unsynchronized(run, model)
    for one in net.parameters():
        one.grad = averaged(run, one.grad, "sum") / (1 if run.fabric is None else run.fabric.world_size)
    optimizer.step()


@right
def averaged_by_the_script_after_the_raw_model(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    run.backward(loss_of(net(run.x)))
    for one in net.parameters():
        one.grad = averaged(run, one.grad)
    optimizer.step()


@right
def learning_to_learn(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    for _ in range(2):
        with run.no_sync(model):
            inner = loss_of(model(run.common()))
            own = dict(net.named_parameters())
            slopes = torch.autograd.grad(inner, list(own.values()), create_graph=True)
            adapted = {name: one - 0.1 * slope for (name, one), slope in zip(own.items(), slopes, strict=True)}
            run.backward(loss_of(torch.func.functional_call(net, adapted, (run.x,))))
        for one in net.parameters():
            one.grad = averaged(run, one.grad)
        optimizer.step()
        optimizer.zero_grad()
