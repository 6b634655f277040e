"""Rules for wrappers: what they add, and what they leave as it is."""

import contextlib
import pickle
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from fabric_core._torch import has_hooks
from fabric_core.conformance import cases, snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training, distance
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Level, Table
from fabric_core.conformance.rules.strategy.measures import whole
from fabric_core.contracts import Wrapper
from fabric_core.wrapping import unwrap

TABLE: Final = Table("wrapper")

_CLOSE: Final = 1e-6
"""How far 64-bit numbers may be off that were computed by other kernels."""


def _wrapped(bench: Bench, case: Training) -> tuple[nn.Module, nn.Module, nn.Module]:
    plain, model = cases.build(case), cases.build(case)
    for one in (plain, model):
        one.inner.eval()
    return plain, model, bench.plugin().wrap_module(model)


@TABLE.rule(
    "WRA-401",
    "Before the strategy it returns the very module that it was given.",
    reason="The user's own references, and the optimizer's, stay true.",
    advice='change the module in place, or declare the stage "after_strategy"',
)
def _in_place(bench: Bench) -> None:
    _, model, wrapped = _wrapped(bench, Training())
    if bench.declared["stage"] == "before_strategy" and wrapped is not model:
        raise Broken(f"it gives a new {type(wrapped).__name__}")


@TABLE.rule(
    "WRA-402",
    "Names and values of parameters and buffers stay; what was training is training, and what was not is not.",
    reason="Checkpoints are named by them, and dropout is told by the mode.",
    advice="wrap by hooks or by changing forward; take prefixes off in state_dict; call neither train() nor eval()",
)
def _names(bench: Bench) -> None:
    plain, model, _ = _wrapped(bench, Training(tied=True, buffers=True))
    before = [name for name, _ in plain.named_parameters()]
    after = [name for name, _ in model.named_parameters()]
    if after != before or distance(cases.copied(plain), cases.copied(model)) != 0:
        raise Broken(f"{before} become {after}, or hold other values")
    inside = dict(model.named_modules())
    changed = [name for name, one in plain.named_modules() if name in inside and one.training != inside[name].training]
    if changed:
        raise Broken(f"module.training is changed of {', '.join(name or 'the model' for name in changed)}")


@TABLE.rule(
    "WRA-403",
    "The wrapped module computes what the module computes, gradients included.",
    reason="A wrapper saves memory or time; it is no other model.",
    advice="compare outputs and gradients with the bare module's",
    examples=cases.trainings(),
    count=4,
)
def _transparent(bench: Bench, case: Training) -> None:
    plain, model, wrapped = _wrapped(bench, case)
    x, _ = next(cases.batches(case))
    expected, got = plain(x, scale=2.0), wrapped(x, scale=2.0)
    expected.sum().backward()
    got.sum().backward()
    gradients = [
        (one.grad, other.grad)
        for one, other in zip(plain.parameters(), model.parameters(), strict=True)
        if one.grad is not None
    ]
    if any(other is None for _, other in gradients):
        raise Broken("a parameter has no gradient")
    off = max((one - other).abs().max().item() for one, other in [(expected, got), *gradients])
    if not off <= max(_CLOSE, exact()):
        raise Broken(f"outputs or gradients differ by {off:.3g}")


def _train(place: Place, case: Training, **parts: Any) -> tuple[cases.Weights, bool]:
    with place.fabric(**parts) as fabric:
        model = cases.build(case)
        wrapped, stepper = fabric.setup(model, cases.optimizer_for(case, model.parameters()))
        for x, y in cases.batches(case):
            fabric.backward(nn.functional.mse_loss(wrapped(x.to(fabric.device)), y.to(fabric.device)))
            stepper.step()
            stepper.zero_grad()
        return whole(fabric, model), unwrap(wrapped) is model


@TABLE.rule(
    "WRA-404",
    "A training with it ends where one without it ends.",
    reason="What is transparent once must stay so over steps.",
    advice="keep no gradient or activation from one step to the next",
    examples=cases.trainings(),
    count=4,
)
def _trains(bench: Bench, case: Training) -> None:
    got, _ = bench.run(_train, case)[0]
    if not distance(got, cases.trained_alone(case)) <= max(_CLOSE, exact()):
        raise Broken(f"the parameters differ by {distance(got, cases.trained_alone(case)):.3g}")


@TABLE.rule(
    "WRA-405",
    "`unwrap` returns the user's own module.",
    reason="Users save, export and evaluate it.",
    advice="leave what the core wraps to the core",
)
def _unwraps(bench: Bench) -> None:
    if not bench.run(_train, Training())[0][1]:
        raise Broken("it gives something else")


@TABLE.rule(
    "WRA-406",
    "`forward_context` gives a new context each time, always or never.",
    reason="A model calls another one; both were set up.",
    advice="make the context in forward_context",
)
def _contexts(bench: Bench) -> None:
    plugin = bench.plugin()
    first, second = plugin.forward_context(), plugin.forward_context()
    if (first is None) != (second is None) or (first is not None and first is second):
        raise Broken(f"first {first!r}, then {second!r}")
    with contextlib.ExitStack() as stack:
        for context in (first, second):
            if context is not None:
                stack.enter_context(context)


@TABLE.rule(
    "WRA-407",
    "The order that it declares can be kept: it is neither before nor after itself, nor on both sides of another.",
    reason="Otherwise no order of wrappers is right.",
    advice="name in `before` what must come later, in `after` what must come earlier, and not itself",
)
def _order(bench: Bench) -> None:
    before, after = bench.declared["before"], bench.declared["after"]
    if before & after or bench.subject.name in before | after:
        raise Broken(f"before {sorted(before)}, after {sorted(after)}")


@TABLE.rule(
    "WRA-408",
    "A module that was transformed before the strategy pickles, and computes the same after it.",
    reason="Models travel to processes that are started.",
    advice="register functions of a module's top level as hooks, no closures",
    level=Level.SHOULD,
)
def _pickles(bench: Bench) -> None:
    if bench.declared["stage"] != "before_strategy":
        return
    _, model, wrapped = _wrapped(bench, Training())
    try:
        again = pickle.loads(pickle.dumps(model))  # noqa: S301 - our own
    except Exception as error:
        raise Broken(f"it doesn't pickle: {error!r}") from error
    x, _ = next(cases.batches(Training()))
    if not torch.allclose(again(x), wrapped(x), rtol=0, atol=max(_CLOSE, exact())):
        raise Broken("it computes something else")


@TABLE.rule(
    "WRA-409",
    "An optimizer that it wraps is an optimizer of the same parameters, and steps as before.",
    reason="Schedulers and checkpoints know the optimizer.",
    advice="change it in place, or give an Optimizer around it",
)
def _optimizers(bench: Bench) -> None:
    case = Training()
    plain, model = cases.build(case), cases.build(case)
    expected = cases.optimizer_for(case, plain.parameters())
    wrapped = bench.plugin().wrap_optimizer(cases.optimizer_for(case, model.parameters()), [model])
    if not isinstance(wrapped, Optimizer):
        raise Broken(f"it is a {type(wrapped).__name__}")
    held = {id(one) for group in wrapped.param_groups for one in group["params"]}
    if held != {id(one) for one in model.parameters()}:
        raise Broken("its param_groups don't hold the model's parameters")
    x, y = next(cases.batches(case))
    for module, optimizer in ((plain, expected), (model, wrapped)):
        nn.functional.mse_loss(module(x), y).backward()
        optimizer.step()
    if not distance(cases.copied(plain), cases.copied(model)) <= max(_CLOSE, exact()):
        raise Broken("a step goes elsewhere")


def _backwards(rows: list[Any]) -> tuple[torch.Tensor]:
    return (torch.stack([one for (one,) in reversed(rows)]),)


@TABLE.rule(
    "WRA-410",
    "A loader that it wraps gives the same batches in the same order, as many as its length says, and again in the "
    "next epoch.",
    reason="A prefetcher is no other data set.",
    advice="iterate over the loader anew in __iter__, and give its __len__",
)
def _loaders(bench: Bench) -> None:
    numbers = TensorDataset(torch.arange(5))
    plain: DataLoader[Any] = DataLoader(numbers, batch_size=2)
    collated: DataLoader[Any] = DataLoader(numbers, batch_size=2, drop_last=True, collate_fn=_backwards)
    for loader in (plain, collated):
        expected = [one.tolist() for (one,) in loader]
        wrapped = bench.plugin().wrap_dataloader(loader)
        for epoch in range(2):
            seen = [one.tolist() for (one,) in wrapped]
            if seen != expected or len(wrapped) != len(expected):
                raise Broken(f"epoch {epoch} gives {seen}, not {expected}, and the length is {len(wrapped)}")


def _leaves(place: Place) -> list[str]:
    with place.fabric() as fabric:
        model = cases.build(Training())
        before = snapshot.take()
        wrapped = fabric.setup(model)
        with contextlib.suppress(Exception):  # a compiler makes another one of the TypeError
            wrapped(next(cases.batches(Training()))[0].to(fabric.device), scale=None)
        return snapshot.differences(before)


@TABLE.rule(
    "WRA-411",
    "Wrapping a module, and a run that raises, leave PyTorch's settings and random numbers alone.",
    reason="The script's other computations are none of its business.",
    advice="undo in `finally`",
)
def _settings(bench: Bench) -> None:
    left = bench.run(_leaves)[0]
    if left:
        raise Broken(f"it leaves {', '.join(left)} changed")


def _train_sharded(place: Place, case: Training) -> cases.Weights:
    from fabric_core.conformance.references import Sharding

    return _train(place, case, strategy=Sharding())[0]


@TABLE.rule(
    "WRA-412",
    "Who declares supports_sharded_parameters: a training under a strategy that shards ends where one without it does.",
    reason="Before the strategy a module is whole, and in its passes parameters come and go.",
    advice="look at parameters inside forward only, or declare supports_sharded_parameters=False",
    needs=("supports_sharded_parameters",),
)
def _trains_sharded(bench: Bench) -> None:
    got = bench.run(_train_sharded, Training())[0]
    if not distance(got, cases.trained_alone(Training())) <= max(_CLOSE, exact()):
        raise Broken(f"the parameters differ by {distance(got, cases.trained_alone(Training())):.3g}")


@TABLE.rule(
    "WRA-413",
    "One instance wraps several models, optimizers and loaders, each by itself.",
    reason="It serves all of its Fabric: a generator and a discriminator, training and validation data.",
    advice="keep what belongs to one of them in a mapping with weak keys, and none of it on self",
)
def _several(bench: Bench) -> None:
    plugin, given = bench.plugin(), [Training(seed=seed) for seed in (1, 2)]
    models = [cases.build(case) for case in given]
    wrapped = [plugin.wrap_module(model) for model in models]
    x, _ = next(cases.batches(given[0]))
    for index, (case, module) in enumerate(zip(given, wrapped, strict=True)):
        if not torch.allclose(module(x), cases.build(case)(x), rtol=0, atol=max(_CLOSE, exact())):
            raise Broken(f"of two models, number {index + 1} computes something else")
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    held = [plugin.wrap_optimizer(one, [model]) for one, model in zip(optimizers, models, strict=True)]
    for index, (optimizer, model) in enumerate(zip(held, models, strict=True)):
        if {id(one) for group in optimizer.param_groups for one in group["params"]} != set(map(id, model.parameters())):
            raise Broken(f"of two optimizers, number {index + 1} holds other parameters")
    loaders = [plugin.wrap_dataloader(DataLoader(TensorDataset(torch.full((3,), number)))) for number in range(2)]
    for index, loader in enumerate(loaders):
        if [one.item() for (one,) in loader] != [index] * 3:
            raise Broken(f"of two loaders, number {index + 1} gives other batches")


class _Assorted(nn.Module):
    """A layer of each usual kind, narrow, wide and frozen, and blocks of one class: nobody runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = _layers(4), _layers(64)
        self.frozen = _layers(64).requires_grad_(False)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 4) for _ in range(2))


def _layers(width: int) -> nn.ModuleList:
    convolutions = [one(width, width, 2) for one in (nn.Conv1d, nn.Conv2d, nn.Conv3d)]
    norms = [nn.LayerNorm(width), nn.BatchNorm2d(width), nn.GroupNorm(2, width), nn.Dropout(), nn.ReLU()]
    sequences = [nn.Embedding(width, width), nn.GRU(width, width), nn.MultiheadAttention(width, 2)]
    return nn.ModuleList([nn.Linear(width, width), *convolutions, *norms, *sequences])


def _shown(value: Any) -> Any:
    """Give a plain value itself, how many there are in a mapping, and the class of anything else."""
    if isinstance(value, Mapping):
        return len(value)
    return value if isinstance(value, bool | int | float | str | tuple) else type(value)


def _outside(module: nn.Module) -> list[Any]:
    """Describe what can be seen of a module from outside: classes, attributes and hooks, and tensors' layout."""
    modules = [
        (name, type(one), {key: _shown(value) for key, value in vars(one).items()})
        for name, one in module.named_modules()
    ]
    tensors = (*module.named_parameters(), *module.named_buffers())
    return [modules, [(name, type(one), one.dtype, one.stride(), has_hooks(one)) for name, one in tensors]]


@TABLE.rule(
    "WRA-414",
    "Who transforms modules and does nothing else changes something by it: the object, a class, attributes, hooks, or "
    "the layout of tensors.",
    reason="A wrapper whose condition is the wrong way round changes no result, and saves nothing either.",
    advice="look at which modules wrap_module finds; one that acts on some classes alone may say why it does nothing",
    level=Level.SHOULD,
)
def _acts(bench: Bench) -> None:
    plugin = bench.plugin()
    more = ("after_setup", "forward_context", "wrap_optimizer", "after_step", "wrap_dataloader", "state_dict")
    if type(plugin).wrap_module is Wrapper.wrap_module or any(
        getattr(type(plugin), name) is not getattr(Wrapper, name) for name in more
    ):
        return
    model = _Assorted()
    before = _outside(model)
    if plugin.wrap_module(model) is model and _outside(model) == before:
        raise Broken("a model with a layer of each usual kind is as it was")
