"""More scripts that go round Fabric: by hooks, changes after setup, captured activations, compiled functions, errors.

They add themselves to those of ``_ways_round``, which must be imported before.
"""

import contextlib
import copy
import pickle
from collections.abc import Callable
from typing import Any

import torch
from _ways_round import Net, Run, loss_of, step, usual, way
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__: list[str] = []


def inner(run: Run) -> torch.Tensor:
    """Give what a body could have given."""
    return torch.tanh(run.x @ torch.ones(4, 6))


def fail(_gradient: torch.Tensor) -> None:
    """Stop a backward pass."""
    raise KeyError("in between")


class Judge(nn.Module):
    """Tells what a ``Net`` gave from what is real."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


# --- Steps inside a backward pass ------------------------------------------------------------------


def _step_in_hooks(run: Run, net: nn.Module, *, wrapped: bool = False) -> None:
    """Let each parameter have an optimizer of its own, which steps as soon as the gradient is there."""
    optimizers: dict[torch.Tensor, Any] = {}
    for one in net.parameters():
        optimizers[one] = torch.optim.SGD([one], lr=0.05)
        if wrapped and run.fabric is not None:
            optimizers[one] = run.fabric.setup_optimizers(optimizers[one])

    def arrived(one: torch.Tensor) -> None:
        optimizers[one].step()
        optimizers[one].zero_grad()

    for one in net.parameters():
        one.register_post_accumulate_grad_hook(arrived)


def _two_passes(run: Run, model: Any) -> None:
    for _ in range(2):
        run.backward(loss_of(model(run.x)))


@way
def steps_in_hooks(run: Run) -> None:
    net = run.net()
    model = run.setup(net)
    _step_in_hooks(run, net)
    _two_passes(run, model)


@way
def steps_in_hooks_from_before_setup(run: Run) -> None:
    net = run.net()
    _step_in_hooks(run, net)
    _two_passes(run, run.setup(net))


@way
def wrapped_steps_in_hooks(run: Run) -> None:
    net = run.net()
    model = run.setup(net)
    _step_in_hooks(run, net, wrapped=True)
    _two_passes(run, model)


# --- Models that change after setup ---------------------------------------------------------------


def _ready(run: Run, optimizer: torch.optim.Optimizer) -> Any:
    return optimizer if run.fabric is None else run.fabric.setup_optimizers(optimizer)


def _another(inputs: int) -> nn.Module:
    torch.manual_seed(9)
    return nn.Linear(inputs, 2)


@way
def layer_replaced_after_setup(run: Run) -> None:
    net = run.net()
    model = run.setup(net)
    net.head = _another(6)
    optimizer = _ready(run, run.sgd(net))
    for _ in range(2):
        step(run, model, optimizer)


@way
def layer_replaced_after_setup_and_raw_optimizer(run: Run) -> None:
    net = run.net()
    model = run.setup(net)
    net.head = _another(6)
    optimizer = run.sgd(net)
    for _ in range(2):
        step(run, model, optimizer)


@way
def layer_added_after_a_step(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    new = _another(2)
    net.head = nn.Sequential(net.head, new)
    optimizer.add_param_group({"params": list(new.parameters()), "lr": 1.0})
    for _ in range(2):
        step(run, model, optimizer)


@way
def reparametrized_after_setup(run: Run) -> None:
    net = run.net()
    model = run.setup(net)
    nn.utils.parametrizations.weight_norm(net.head)
    optimizer = _ready(run, run.sgd(net))
    for _ in range(2):
        step(run, model, optimizer)


# --- Other ways to run a part of a model -----------------------------------------------------------


@way
def functional_call_of_the_raw_model(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    run.backward(loss_of(torch.func.functional_call(net, dict(net.named_parameters()), (run.x,))))
    optimizer.step()


@way
def functional_call_of_the_model(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    run.backward(loss_of(torch.func.functional_call(model, dict(net.named_parameters()), (run.x,))))
    optimizer.step()


@way
def captured_activation(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    seen: list[torch.Tensor] = []
    handle = net.body.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(run.x)
    handle.remove()
    run.backward(loss_of(seen[0]))
    optimizer.step()


@way
def captured_activation_unsynchronized(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    seen: list[torch.Tensor] = []
    handle = net.body.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    with run.no_sync(model):
        model(run.x)
    handle.remove()
    run.backward(loss_of(seen[0]))
    optimizer.step()


@way
def captured_activation_after_steps(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    for _ in range(2):
        step(run, model, optimizer)
    seen: list[torch.Tensor] = []
    handle = net.body.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model(run.x)
    handle.remove()
    run.backward(loss_of(seen[0]))
    optimizer.step()


@way
def checkpointed_raw_part(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    x = run.x.clone().requires_grad_()
    run.backward(loss_of(net.head(torch.tanh(checkpoint(net.body, x, use_reentrant=False)))))
    optimizer.step()


@way
def raw_model_checkpointed_by_reentering(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    run.backward(loss_of(checkpoint(net, run.x.clone().requires_grad_(), use_reentrant=True)))
    optimizer.step()


@way
def raw_shallow_copy(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    run.backward(loss_of(copy.copy(net)(run.x)))
    optimizer.step()


@way
def raw_model_in_evaluation_mode(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    net.eval()
    run.backward(loss_of(net(run.x)))
    net.train()
    optimizer.step()


@way
def raw_part_after_an_unused_forward(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    for _ in range(3):
        step(run, model, optimizer)
    model(run.x)
    run.backward(loss_of(model.head(inner(run))))
    optimizer.step()


@way
def raw_model_after_an_unused_forward(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    model(run.x)
    run.backward(loss_of(net(run.x)))
    optimizer.step()


@way
def raw_backward_of_the_raw_model_after_an_unused_forward(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    model(run.x)
    loss_of(net(run.x)).backward()
    optimizer.step()


@way
def gradients_averaged_by_hand(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    parameters = list(net.parameters())
    found = torch.autograd.grad(loss_of(net(run.x)), parameters)
    for one, gradient in zip(parameters, found, strict=True):
        one.grad = gradient if run.fabric is None else run.fabric.all_reduce(gradient)
    optimizer.step()


@way
def raw_part_beside_a_kept_graph(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    run.backward(loss_of(model(run.x)), retain_graph=True)
    run.backward(loss_of(model.head(inner(run))))
    optimizer.step()


@way
def raw_part_after_the_right_pass(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    run.backward(loss_of(model(run.x)))
    run.backward(loss_of(net.head(inner(run))))
    optimizer.step()


@way
def raw_part_before_the_right_pass(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    run.backward(loss_of(net.head(inner(run))))
    run.backward(loss_of(model(run.x)))
    optimizer.step()


@way
def raw_model_without_a_set_up_optimizer(run: Run) -> None:
    net = run.net()
    run.setup(net)
    optimizer = run.sgd(net)
    run.backward(loss_of(net(run.x)))
    optimizer.step()


@way
def raw_judge(run: Run) -> None:
    maker, judge = run.net(), run.net(Judge, seed=4)
    make, make_step = run.setup(maker, run.sgd(maker))
    tell, tell_step = run.setup(judge, run.sgd(judge))
    for _ in range(2):
        tell_step.zero_grad()
        run.backward(tell(run.x[:, :2]).square().mean())
        tell_step.step()
        make_step.zero_grad()
        run.backward(judge(make(run.x)).square().mean())
        make_step.step()


@way
def raw_judge_that_steps(run: Run) -> None:
    maker, judge = run.net(), run.net(Judge, seed=4)
    make, make_step = run.setup(maker, run.sgd(maker))
    _, tell_step = run.setup(judge, run.sgd(judge))
    run.backward(judge(make(run.x)).square().mean())
    make_step.step()
    tell_step.step()


@way
def raw_teacher(run: Run) -> None:
    teacher = run.net(seed=8)
    run.setup(teacher)
    _, _, model, optimizer = usual(run)
    with torch.no_grad():
        wanted = teacher(run.x)
    run.backward((model(run.x) - wanted).square().mean())
    optimizer.step()


# --- Backward passes of other kinds ---------------------------------------------------------------


@way
def engine_called_on_the_raw_model(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    torch.autograd.backward([loss_of(net(run.x))])
    optimizer.step()


@way
def backward_of_some_inputs(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    run.backward(loss_of(model(run.x)), inputs=list(net.head.parameters()))
    optimizer.step()


@way
def backward_of_all_inputs(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    run.backward(loss_of(model(run.x)), inputs=list(net.parameters()))
    optimizer.step()


@way
def gradients_doubled_by_hooks(run: Run) -> None:
    net, _, model, optimizer = usual(run)

    def double(one: torch.Tensor) -> None:
        if one.grad is not None:
            one.grad = one.grad * 2

    for one in net.parameters():
        one.register_post_accumulate_grad_hook(double)
    for _ in range(2):
        step(run, model, optimizer)


@way
def sparse_embedding(run: Run) -> None:
    net = run.net(Words)
    model, optimizer = run.setup(net, torch.optim.SGD(net.parameters(), lr=0.05))
    for _ in range(2):
        run.backward(loss_of(model((run.x[:, 0].abs() * 100).long() % 5)))
        optimizer.step()
        optimizer.zero_grad()


class Words(nn.Module):
    """Has gradients that are sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 4, sparse=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.words(x))  # type: ignore[no-any-return]


@way
def scaler_of_the_script(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(2):
        run.backward(scaler.scale(loss_of(model(run.x))))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


@way
def optimizer_that_divides_its_state(run: Run) -> None:
    net = run.net()
    model = run.setup(net)
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.05)
    if run.fabric is not None and run.fabric.world_size > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer = ZeroRedundancyOptimizer(net.parameters(), torch.optim.SGD, lr=0.05)
    optimizer = _ready(run, optimizer)
    for _ in range(2):
        step(run, model, optimizer)


# --- no_backward_sync, and clearing too little ----------------------------------------------------


@way
def inner_context_not_enabled(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    with run.no_sync(model), run.no_sync(model, enabled=False):
        run.backward(loss_of(model(run.x)))
    optimizer.step()


@way
def error_inside_the_context(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    with contextlib.suppress(KeyError), run.no_sync(model):
        run.backward(loss_of(model(run.x)))
        raise KeyError("in between")
    optimizer.step()


def _closure(run: Run, called: Any, optimizer: Any) -> Callable[[], torch.Tensor]:
    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(called(run.x))
        run.backward(loss)
        return loss

    return evaluate


@way
def closure_inside_the_context(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    with run.no_sync(model):
        optimizer.step(_closure(run, model, optimizer))


@way
def line_search_on_the_raw_model(run: Run) -> None:
    net = run.net()
    _, optimizer = run.setup(net, torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=1))
    optimizer.step(_closure(run, net, optimizer))


@way
def one_of_two_optimizers_cleared(run: Run) -> None:
    net = run.net()
    model, body, head = run.setup(net, run.sgd(net.body), run.sgd(net.head))
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    body.zero_grad()
    head.step()


@way
def optimizer_of_another_model_cleared(run: Run) -> None:
    one, two = run.net(), run.net(seed=4)
    model, first = run.setup(one, run.sgd(one))
    other, second = run.setup(two, run.sgd(two))
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    second.zero_grad()
    run.backward(loss_of(other(run.x)))
    second.step()
    first.step()


@way
def half_cleared_by_hand(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    for one in net.body.parameters():
        one.grad = None
    optimizer.step()


@way
def accumulation_interrupted_by_another_model(run: Run) -> None:
    one, two = run.net(), run.net(seed=4)
    model, first = run.setup(one, run.sgd(one))
    other, second = run.setup(two, run.sgd(two))
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
        run.backward(loss_of(other(run.x)))
    second.step()
    first.step()


# --- Models that share a part ---------------------------------------------------------------------


def _sharing(run: Run) -> tuple[Any, Any]:
    one, two = run.net(), run.net(seed=4)
    two.body = one.body
    return one, two


@way
def shared_part_trained_in_turn(run: Run) -> None:
    one, two = _sharing(run)
    model, first = run.setup(one, run.sgd(one))
    other, second = run.setup(two, run.sgd(two.head))
    for called, optimizer in ((model, first), (other, second), (model, first)):
        run.backward(loss_of(called(run.x)))
        optimizer.step()
        first.zero_grad()
        second.zero_grad()


@way
def shared_part_trained_at_once(run: Run) -> None:
    one, two = _sharing(run)
    model, first = run.setup(one, run.sgd(one))
    other, second = run.setup(two, run.sgd(two.head))
    for _ in range(2):
        run.backward(loss_of(model(run.x)) + loss_of(other(run.x)))
        first.step()
        second.step()
        first.zero_grad()
        second.zero_grad()


@way
def shared_part_used_raw(run: Run) -> None:
    one, two = _sharing(run)
    model, first = run.setup(one, run.sgd(one))
    run.setup(two)
    step(run, model, first)
    run.backward(loss_of(two(run.x)))
    first.step()


# --- torch.compile ----------------------------------------------------------------------------------


def _compiled(function: Callable[..., Any]) -> Any:
    return torch.compile(function, backend="aot_eager")


@way
def compiled_function_of_the_model(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    loss = _compiled(lambda x: loss_of(model(x)))
    for _ in range(2):
        run.backward(loss(run.x))
        optimizer.step()
        optimizer.zero_grad()


@way
def compiled_function_of_the_raw_model(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    loss = _compiled(lambda x: loss_of(net(x)))
    run.backward(loss(run.x))
    optimizer.step()


@way
def compiled_function_unsynchronized(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    loss = _compiled(lambda x: loss_of(model(x)))
    run.backward(loss(run.x))
    optimizer.step()
    optimizer.zero_grad()
    with run.no_sync(model):
        run.backward(loss(run.x))
    optimizer.step()


@way
def compiled_raw_part(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    run.backward(loss_of(_compiled(net.head)(inner(run))))
    optimizer.step()


@way
def compiled_unmarked_method(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    run.backward(_compiled(model.score)(run.x))
    optimizer.step()


# --- Errors in between, and ends -------------------------------------------------------------------


@way
def raw_after_a_failed_raw_backward(run: Run) -> None:
    net, _, _, optimizer = usual(run)
    output = net.body(run.x)
    output.register_hook(fail)
    with contextlib.suppress(KeyError):
        loss_of(net.head(torch.tanh(output))).backward()
    optimizer.zero_grad()
    loss_of(net(run.x)).backward()
    optimizer.step()


@way
def right_after_a_backward_that_failed_in_the_middle(run: Run) -> None:
    net, _, model, optimizer = usual(run)

    def hook(_module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(fail)

    handle = net.body.register_forward_hook(hook)
    with contextlib.suppress(KeyError):
        run.backward(loss_of(model(run.x)))
    handle.remove()
    optimizer.zero_grad()
    for _ in range(2):
        step(run, model, optimizer)


@way
def right_after_a_failed_backward(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    output = model(run.x)
    output.register_hook(fail)
    with contextlib.suppress(KeyError):
        run.backward(loss_of(output))
    optimizer.zero_grad()
    for _ in range(2):
        step(run, model, optimizer)


@way
def gradients_of_a_failed_accumulation(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    with contextlib.suppress(RuntimeError), run.no_sync(model):
        run.backward(loss_of(model(run.x)))
        model(run.x.T)
    optimizer.step()


@way
def training_after_the_teardown(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    step(run, model, optimizer)
    if run.fabric is not None and run.fabric.world_size > 1:
        run.fabric.teardown()
    run.backward(loss_of(model(run.x)))
    optimizer.step()


@way
def pickled_and_set_up(run: Run) -> None:
    _, _, model, optimizer = usual(run)
    net = run.net(seed=5)
    other = pickle.loads(pickle.dumps(net))  # noqa: S301 - its own
    run.nets[-1] = other
    again, second = run.setup(other, run.sgd(other))
    step(run, again, second)
    step(run, model, optimizer)


class Tied(Net):
    """Has a weight twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(4, 6)
        self.again.weight = self.body.weight


@way
def raw_tied_part(run: Run) -> None:
    net = run.net(Tied)
    model, optimizer = run.setup(net, run.sgd(net))
    run.backward(loss_of(model(run.x)) + net.again.bias.sum() * 0)
    run.backward(loss_of(net.again(run.x)))
    optimizer.step()


def reduced(run: Run, gradient: torch.Tensor) -> torch.Tensor:
    """Average a gradient."""
    return gradient.clone() if run.fabric is None else run.fabric.all_reduce(gradient)


@way
def averaged_for_a_log(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    for one in net.parameters():
        reduced(run, one.grad).norm()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e6)  # shortens nothing, scaled gradients neither
    optimizer.step()


@way
def averaged_before_the_last_pass(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    for one in net.parameters():
        one.grad = reduced(run, one.grad)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    optimizer.step()


@way
def averaged_in_part(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    for one in net.head.parameters():
        one.grad = reduced(run, one.grad)
    optimizer.step()


@way
def averaged_and_replaced_by_what_was_there(run: Run) -> None:
    net, _, model, optimizer = usual(run)
    with run.no_sync(model):
        run.backward(loss_of(model(run.x)))
    for one in net.parameters():
        before = one.grad.clone()
        one.grad = reduced(run, one.grad)
        one.grad = before
    optimizer.step()
