"""Rules for precisions: what they say in their policy is what happens, and nothing else does."""

import contextlib
import io
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fabric_core._torch import tree_flatten, tree_map_only
from fabric_core.conformance import cases, snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table
from fabric_core.contracts import PrecisionPolicy
from fabric_core.wrapping import unwrap

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TABLE: Final = Table("precision")

_DTYPES: Final = ("param_dtype", "compute_dtype", "reduce_dtype", "input_dtype", "output_dtype")
_CASE: Final = cases.Training(steps=4, rows=2, buffers=True)
_TWO: Final = 2
_LARGE: Final = 64.0
"""A rate so large that a step is longer than the parameters, whose rounding then doesn't hide it."""


@TABLE.rule(
    "PRE-201",
    "Its policy is the same whenever it is asked.",
    reason="A strategy reads it once, at setup; the plan shows it.",
    advice="return one constant PrecisionPolicy, made from the options alone",
)
def _policy_is_constant(bench: Bench) -> None:
    plugin = bench.plugin()
    first = plugin.policy
    with contextlib.ExitStack() as stack:
        context = plugin.forward_context("cpu")
        if context is not None:
            stack.enter_context(context)
        if plugin.policy != first or bench.plugin().policy != first:
            raise Broken(f"first {first}, then {plugin.policy}")


@TABLE.rule(
    "PRE-202",
    "The types of its policy are floating-point types or None.",
    reason="Parameters, products and gradients are real numbers.",
    advice="give torch.dtype objects, not their names",
)
def _policy_types(bench: Bench) -> None:
    policy = bench.plugin().policy
    if not isinstance(policy, PrecisionPolicy):
        raise Broken(f"policy is a {type(policy).__name__}")
    for name in _DTYPES:
        value = getattr(policy, name)
        if value is not None and not (isinstance(value, torch.dtype) and value.is_floating_point):
            raise Broken(f"{name} is {value!r}")


def _converted(bench: Bench) -> tuple[cases.Net, cases.Net, Any]:
    model = cases.build(cases.Training(frozen=True, tied=True, buffers=True), torch.float32)
    plain = cases.build(cases.Training(frozen=True, tied=True, buffers=True), torch.float32)
    plugin = bench.plugin()
    return plain, plugin.convert_module(model), plugin


@TABLE.rule(
    "PRE-203",
    "`convert_module` leaves parameters in the policy's param_dtype, or as they are where it has none.",
    reason="Memory is planned by it, and a sharding strategy allocates by it.",
    advice="convert in convert_module what the policy says, and say in the policy what you convert",
)
def _parameters(bench: Bench) -> None:
    plain, model, plugin = _converted(bench)
    for (name, parameter), (_, before) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        expected = plugin.policy.param_dtype or before.dtype
        if parameter.dtype != expected:
            raise Broken(f"{name} is {parameter.dtype}, and the policy means {expected}")


@TABLE.rule(
    "PRE-204",
    "`convert_module` leaves buffers of integers alone.",
    reason="Counters and indices break silently as floating-point numbers.",
    advice="use module.to(dtype), which leaves integers alone, or check is_floating_point()",
)
def _integer_buffers(bench: Bench) -> None:
    _, model, _ = _converted(bench)
    if model.counter.dtype != torch.int64 or model.counter.tolist() != [3, 5]:
        raise Broken(f"an int64 buffer becomes {model.counter!r}")


@TABLE.rule(
    "PRE-205",
    "`convert_module` keeps the values, as far as the type holds them.",
    reason="A model that was loaded before setup must be the one that is trained.",
    advice="convert the tensors; make no new ones",
)
def _values(bench: Bench) -> None:
    plain, model, plugin = _converted(bench)
    dtype = plugin.policy.param_dtype or torch.float32
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if not torch.equal(one.detach(), other.detach().to(dtype)):
            raise Broken(f"{name} has other values")


@TABLE.rule(
    "PRE-206",
    "`convert_module` keeps what is frozen frozen, what is shared shared, and every name.",
    reason="Converting is no training: an optimizer made before or after sees the same parameters.",
    advice="convert in place: module.to(dtype)",
)
def _structure_of_modules(bench: Bench) -> None:
    plain, model, _ = _converted(bench)
    if [(name, one.requires_grad) for name, one in model.named_parameters()] != [
        (name, one.requires_grad) for name, one in plain.named_parameters()
    ]:
        raise Broken("names or requires_grad differ")
    if not model.is_tied():
        raise Broken("a weight that two layers shared is two weights")


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _flat(data: Any) -> tuple[list[Any], Any]:
    # The kit's dataclass is no registered container; the kit opens it itself.
    opened = tree_map_only(cases.Record, lambda one: {"value": _open(one.value), "label": one.label}, data)
    return tree_flatten(opened)


def _open(data: Any) -> Any:
    return tree_map_only(cases.Record, lambda one: {"value": _open(one.value), "label": one.label}, data)


def _conversion(
    bench: Bench, payload: cases.Payload, convert: Callable[[Any, Any], Any]
) -> tuple[Any, Any, list[tuple[Any, Any]]]:
    data = payload.make()
    result = convert(bench.plugin(), data)
    before, structure = _flat(data)
    after, again = _flat(result)
    if structure != again or type(result) is not type(data):
        raise Broken(f"{data!r} becomes {result!r}: another structure")
    return data, result, list(zip(before, after, strict=True))


def _payloads() -> Any:
    return cases.payloads()


def _check_floats(bench: Bench, payload: cases.Payload, which: str) -> None:
    dtype = getattr(bench.plugin().policy, f"{which}_dtype")
    _, _, leaves = _conversion(bench, payload, lambda plugin, data: getattr(plugin, f"convert_{which}")(data))
    for before, after in leaves:
        if _is_float(before) and after.dtype != (dtype or before.dtype):
            raise Broken(f"a tensor of {before.dtype} becomes {after.dtype}, and the policy means {dtype}")


def _check_others(bench: Bench, payload: cases.Payload, which: str) -> None:
    _, _, leaves = _conversion(bench, payload, lambda plugin, data: getattr(plugin, f"convert_{which}")(data))
    for before, after in leaves:
        if not _is_float(before) and after is not before:
            raise Broken(f"{before!r} becomes {after!r}")


def _check_same(bench: Bench, payload: cases.Payload, which: str) -> None:
    dtype = getattr(bench.plugin().policy, f"{which}_dtype")
    data, result, leaves = _conversion(bench, payload, lambda plugin, data: getattr(plugin, f"convert_{which}")(data))
    if all(not _is_float(one) or one.dtype == (dtype or one.dtype) for one, _ in leaves) and result is not data:
        raise Broken(f"nothing in {data!r} had to change, and another object comes back")


@TABLE.rule(
    "PRE-207",
    "`convert_input` converts every floating-point tensor to the policy's input_dtype, however deep it lies.",
    reason="A batch may be a tuple, a dict, a dataclass; one that is left out fails in the first matrix product.",
    advice="use fabric_core.contracts.convert_tensors",
    examples=_payloads,
    count=40,
)
def _inputs(bench: Bench, payload: cases.Payload) -> None:
    _check_floats(bench, payload, "input")


@TABLE.rule(
    "PRE-208",
    "`convert_input` leaves integers, booleans, complex numbers and all that is no tensor alone.",
    reason="Token ids and masks are not quantities.",
    advice="convert where tensor.is_floating_point(), and nothing else",
    examples=_payloads,
    count=40,
)
def _other_inputs(bench: Bench, payload: cases.Payload) -> None:
    _check_others(bench, payload, "input")


@TABLE.rule(
    "PRE-209",
    "`convert_input` returns the very same object where nothing had to change.",
    reason="Copying every batch costs time, and breaks a batch that is compared by identity.",
    advice="use fabric_core.contracts.convert_tensors",
    examples=_payloads,
    count=40,
)
def _same_input(bench: Bench, payload: cases.Payload) -> None:
    _check_same(bench, payload, "input")


@TABLE.rule(
    "PRE-210",
    "`convert_output` converts every floating-point tensor to the policy's output_dtype, however deep it lies.",
    reason="The loss is computed from it, in the type that the policy promises.",
    advice="use fabric_core.contracts.convert_tensors",
    examples=_payloads,
    count=40,
)
def _outputs(bench: Bench, payload: cases.Payload) -> None:
    _check_floats(bench, payload, "output")


@TABLE.rule(
    "PRE-211",
    "`convert_output` leaves integers, booleans, complex numbers and all that is no tensor alone.",
    reason="Predicted classes are not quantities.",
    advice="convert where tensor.is_floating_point(), and nothing else",
    examples=_payloads,
    count=40,
)
def _other_outputs(bench: Bench, payload: cases.Payload) -> None:
    _check_others(bench, payload, "output")


@TABLE.rule(
    "PRE-212",
    "`convert_output` returns the very same object where nothing had to change.",
    reason="A model may return an object that its caller knows.",
    advice="use fabric_core.contracts.convert_tensors",
    examples=_payloads,
    count=40,
)
def _same_output(bench: Bench, payload: cases.Payload) -> None:
    _check_same(bench, payload, "output")


def _forward(place: Place, fails: bool) -> dict[str, Any]:
    """Run a model once through the façade; say which types were seen, and what it left behind."""
    with place.fabric() as fabric:
        model = cases.build(_CASE, torch.float32)
        wrapped = fabric.setup(model)
        x, _ = next(cases.batches(_CASE, torch.float32))
        x = x.to(fabric.device)
        before = snapshot.take()
        if fails:
            with contextlib.suppress(TypeError):
                wrapped(x, scale=None)
            return {"left": snapshot.differences(before)}
        y = wrapped(x)
        return {"inside": model.seen[0], "out": y.dtype, "left": snapshot.differences(before)}


def _inside(policy: PrecisionPolicy) -> torch.dtype:
    return policy.compute_dtype or policy.param_dtype or torch.float32


@TABLE.rule(
    "PRE-213",
    "Inside the model a matrix product comes out in compute_dtype, or in the parameters' type where there is none.",
    reason="The policy is what a sharding strategy carries out; without one the acts must do the same.",
    advice="let forward_context and convert_module do what compute_dtype says, and say there what they do",
)
def _computes(bench: Bench) -> None:
    expected = _inside(bench.plugin().policy)
    seen = bench.run(_forward, False)[0]["inside"]
    if seen != expected:
        raise Broken(f"a linear layer gives {seen}, and the policy means {expected}")


@TABLE.rule(
    "PRE-214",
    "What the model returns has the type output_dtype, or the type that it was computed in where there is none.",
    reason="A loss in 16 bits loses what the parameters keep.",
    advice="set output_dtype, or leave convert_output as the contract has it",
)
def _returns(bench: Bench) -> None:
    policy = bench.plugin().policy
    seen = bench.run(_forward, False)[0]
    # A product with a buffer promotes to the wider of two types.
    if seen["out"] not in {policy.output_dtype or seen["inside"], policy.output_dtype or torch.float32}:
        raise Broken(f"it has {seen['out']}, and the policy means {policy.output_dtype or seen['inside']}")


@TABLE.rule(
    "PRE-215",
    "A run of the model leaves default type, autocast and modes as they were.",
    reason="The script's own computations between runs must not change their type.",
    advice="put it into a context, and undo it in its end",
)
def _leaves_nothing(bench: Bench) -> None:
    left = bench.run(_forward, False)[0]["left"]
    if left:
        raise Broken(f"it leaves {', '.join(left)} changed")


@TABLE.rule(
    "PRE-216",
    "A run that raises leaves default type, autocast and modes as they were.",
    reason="A user may catch the error and go on.",
    advice="undo in `finally`",
)
def _leaves_nothing_on_errors(bench: Bench) -> None:
    left = bench.run(_forward, True)[0]["left"]
    if left:
        raise Broken(f"after an exception {', '.join(left)} is changed")


def _nest(place: Place, which: str) -> list[str]:
    plugin = place.plugin()
    make = plugin.backward_context if which == "backward" else partial(plugin.forward_context, which)
    before = snapshot.take()
    first, second = make(), make()
    if (first is None) != (second is None):
        return ["None only sometimes"]
    if first is None:
        return []
    if first is second:
        return ["the same context twice"]
    with first:
        inside = snapshot.take()
        with second:
            pass
        if snapshot.differences(inside):
            return ["the end of an inner context ends the outer one"]
    return snapshot.differences(before)


@TABLE.rule(
    "PRE-217",
    "`forward_context` and `backward_context` give a new context each time, always or never, and contexts nest.",
    reason="A model calls another one; both were set up.",
    advice="make the context in forward_context, or backward_context, and keep nothing on self",
)
def _contexts_nest(bench: Bench) -> None:
    for which in ("cpu", "backward"):
        faults = bench.run(_nest, which)[0]
        if faults:
            raise Broken(", ".join(faults))


def _autocast(place: Place) -> tuple[bool, torch.dtype, list[str]]:
    plugin = place.plugin()
    outside = snapshot.take()
    context = plugin.forward_context("cpu")
    with contextlib.nullcontext() if context is None else context:
        other = [name for name in snapshot.differences(outside) if not name.startswith("autocast")]
        return torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), other


@TABLE.rule(
    "PRE-218",
    "Where the policy says autocast, the forward context autocasts to compute_dtype, and does nothing else.",
    reason="A strategy that carries compute types itself leaves the context out.",
    advice="return torch.autocast(device_type, compute_dtype)",
    needs=("autocast",),
)
def _autocasts(bench: Bench) -> None:
    enabled, dtype, other = bench.run(_autocast)[0]
    expected = bench.plugin().policy.compute_dtype
    if not enabled or dtype != expected:
        raise Broken(f"autocast is {'on' if enabled else 'off'} with {dtype}, and the policy means {expected}")
    if other:
        raise Broken(f"it changes {', '.join(other)} too")


@TABLE.rule(
    "PRE-219",
    "Where the policy doesn't say autocast, nothing autocasts.",
    reason="A strategy believes the policy, and would not take the context's place.",
    advice="set autocast=True in the policy",
    lacks=("autocast",),
)
def _does_not_autocast(bench: Bench) -> None:
    enabled, dtype, _ = bench.run(_autocast)[0]
    if enabled:
        raise Broken(f"the forward context autocasts to {dtype}")


def _make(place: Place, fails: bool) -> tuple[torch.dtype, torch.dtype, list[str]]:
    plugin = place.plugin()
    random = torch.get_rng_state()
    before = snapshot.take()
    context = plugin.init_context()
    made = nn.Linear(1, 1)
    counted = torch.zeros(1, dtype=torch.int64)
    with contextlib.suppress(ZeroDivisionError), contextlib.nullcontext() if context is None else context:
        made = nn.Linear(1, 1)
        counted = torch.tensor([1, 2])
        if fails:
            raise ZeroDivisionError
    torch.set_rng_state(random)  # the layers drew from it
    return made.weight.dtype, counted.dtype, snapshot.differences(before)


@TABLE.rule(
    "PRE-220",
    "A model made in `init_context` has parameters of param_dtype, or PyTorch's default where there is none.",
    reason="A large model must not be made in 32 bits first, and converted after.",
    advice="set the default type in the context",
)
def _init(bench: Bench) -> None:
    expected = bench.plugin().policy.param_dtype or torch.float32
    dtype, integer, _ = bench.run(_make, False)[0]
    if dtype != expected or integer != torch.int64:
        raise Broken(f"a linear layer has {dtype}, integers {integer}; the policy means {expected}")


@TABLE.rule(
    "PRE-221",
    "`init_context` leaves the default type and device as they were, also when the block raises.",
    reason="What the script makes after it is its own.",
    advice="undo in `finally`",
)
def _init_leaves_nothing(bench: Bench) -> None:
    for fails in (False, True):
        _, _, left = bench.run(_make, fails)[0]
        if left:
            raise Broken(f"it leaves {', '.join(left)} changed{' after an exception' if fails else ''}")


def _gradients(place: Place, clip: float | None = None, unscale: int = 1) -> dict[str, Any]:
    """Run one backward pass; give the gradients as they come out of unscaling, and as plain PyTorch has them."""
    with place.fabric() as fabric:
        model = cases.build(_CASE, torch.float32)
        optimizer = cases.optimizer_for(_CASE, model.parameters())
        wrapped, stepper = fabric.setup(model, optimizer)
        x, y = next(cases.batches(_CASE, torch.float32))
        out = wrapped(x.to(fabric.device))
        fabric.backward(nn.functional.mse_loss(out, y.to(out)))
        raw = [parameter.grad.detach().clone() for parameter in model.parameters() if parameter.grad is not None]
        norm = None
        if clip is not None:
            norm = fabric.clip_gradients(wrapped, stepper, max_norm=clip)
        else:
            for _ in range(unscale):
                fabric.precision.unscale_gradients(unwrap(stepper))
        got = [parameter.grad.double().cpu() for parameter in model.parameters() if parameter.grad is not None]
        plain = cases.build(_CASE, torch.float32)
        nn.functional.mse_loss(plain(x), y).backward()
        expected = [parameter.grad.double() for parameter in plain.parameters() if parameter.grad is not None]
        return {
            "raw": raw,
            "got": got,
            "expected": expected,
            "norm": None if norm is None else float(norm),
            "types": sorted(
                {(str(one.dtype), str(two.dtype)) for one, two in zip(raw, model.parameters(), strict=True)}
            ),
        }


def _tolerance(policy: PrecisionPolicy) -> float:
    """How far numbers may be off that went through the coarsest of the policy's types."""
    dtypes = [getattr(policy, name) for name in _DTYPES]
    return 32 * max([torch.finfo(torch.float32).eps, *(torch.finfo(dtype).eps for dtype in dtypes if dtype)])


def _off(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    whole = torch.cat([one.flatten() for one in expected])
    gap: float = (torch.cat([one.flatten() for one in got]) - whole).norm().item() / whole.norm().item()
    return gap


@TABLE.rule(
    "PRE-222",
    "After `unscale_gradients` the gradients are those of plain PyTorch, to the policy's accuracy.",
    reason="Whoever looks at gradients must see their true size.",
    advice="divide by exactly what scale_loss multiplied by",
)
def _true_gradients(bench: Bench) -> None:
    seen = bench.run(_gradients)[0]
    off = _off(seen["got"], seen["expected"])
    if not off <= _tolerance(bench.plugin().policy):
        raise Broken(f"they are off by {off:.2g} of their norm")


@TABLE.rule(
    "PRE-223",
    "A second `unscale_gradients` in the same step changes nothing, and neither does clipping before the step.",
    reason="Clipping unscales, and so does the step.",
    advice="remember for which optimizers it was done in this step",
)
def _unscale_twice(bench: Bench) -> None:
    seen = bench.run(_gradients, None, 2)[0]
    off = _off(seen["got"], seen["expected"])
    if not off <= _tolerance(bench.plugin().policy):
        raise Broken(f"after two calls they are off by {off:.2g} of their norm")
    _check_step(bench, "clipping")


@TABLE.rule(
    "PRE-224",
    "Clipping sees unscaled gradients: `fabric.clip_gradients` gives the norm that plain PyTorch has.",
    reason="A threshold of 1.0 must mean 1.0.",
    advice="do the unscaling in unscale_gradients, not only in optimizer_step",
)
def _clip(bench: Bench) -> None:
    seen = bench.run(_gradients, 1000.0)[0]
    expected = torch.cat([one.flatten() for one in seen["expected"]]).norm().item()
    if not abs(seen["norm"] - expected) <= _tolerance(bench.plugin().policy) * expected:
        raise Broken(f"the norm is {seen['norm']:.6g}, and plain PyTorch's {expected:.6g}")


@TABLE.rule(
    "PRE-225",
    "A gradient has its parameter's type.",
    reason="Optimizers refuse others, and strategies reduce by it.",
    advice="leave gradients to autograd",
)
def _gradient_types(bench: Bench) -> None:
    seen = bench.run(_gradients)[0]
    if any(one != two for one, two in seen["types"]):
        raise Broken(f"gradients and parameters have {seen['types']}")


@TABLE.rule(
    "PRE-226",
    "Where the policy says loss_scaling, the loss that is differentiated is another than the user's.",
    reason="A strategy that can't take a scaled loss is refused because of it.",
    advice="scale in scale_loss, or take loss_scaling out of the policy",
    needs=("loss_scaling",),
)
def _scales(bench: Bench) -> None:
    loss = torch.ones(())
    if bench.plugin().scale_loss(loss).item() == 1.0:
        raise Broken("scale_loss(1.0) is 1.0")


@TABLE.rule(
    "PRE-227",
    "Where the policy doesn't say loss_scaling, the loss is differentiated as it is.",
    reason="A strategy that takes over the backward pass trusts the policy.",
    advice="set loss_scaling=True in the policy",
    lacks=("loss_scaling",),
)
def _does_not_scale(bench: Bench) -> None:
    loss = torch.tensor(3.0)
    scaled = bench.plugin().scale_loss(loss)
    if scaled.item() != 3.0:
        raise Broken(f"scale_loss(3.0) is {scaled.item()}")


def _steps(
    place: Place, models: int, broken: tuple[int, ...], where: int = 0, value: float = float("inf")
) -> dict[str, Any]:
    """Step once with each of some optimizers; the broken ones' gradients hold a value that isn't finite.

    Then look at the scale, which is what a loss of one becomes.
    """
    with place.fabric() as fabric:
        pairs = [
            fabric.setup(model, cases.optimizer_for(_CASE, model.parameters()))
            for model in (cases.build(_CASE, torch.float32) for _ in range(models))
        ]
        x, y = (one.to(fabric.device) for one in next(cases.batches(_CASE, torch.float32)))
        scale = fabric.precision.scale_loss(torch.ones((), device=fabric.device)).item()
        for model, _ in pairs:
            out = model(x)
            fabric.backward(nn.functional.mse_loss(out, y.to(out)))
        before = [cases.copied(model.module) for model, _ in pairs]
        for index in broken:
            _spoil(pairs[index][0], where, value)
        for _, stepper in pairs:
            stepper.step()
            stepper.zero_grad()
        after = fabric.precision.scale_loss(torch.ones((), device=fabric.device)).item()
        return {
            "moved": [
                cases.distance(old, cases.copied(new.module)) for old, (new, _) in zip(before, pairs, strict=True)
            ],
            "factor": after / scale,
            "state": fabric.precision.state_dict(),
            "scale": after,
        }


def _spoil(model: nn.Module, where: int, value: float) -> None:
    gradient: Any = list(model.parameters())[where].grad
    gradient.view(-1)[0] = value


def _step_after(place: Place, what: str) -> tuple[float, bool]:
    """Step after something; say how far the step is off plain PyTorch's, and whether a closure's loss came back."""
    with place.fabric() as fabric:
        model = cases.build(_CASE, torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=_LARGE)
        wrapped, stepper = fabric.setup(model, optimizer)
        x, y = next(cases.batches(_CASE, torch.float32))

        def closure() -> torch.Tensor:
            stepper.zero_grad()
            out = wrapped(x.to(fabric.device))
            loss = nn.functional.mse_loss(out, y.to(out))
            fabric.backward(loss)
            return loss

        if what == "a skipped step":
            closure()
            _spoil(model, 0, float("inf"))
            stepper.step()
        before = [one.detach().clone() for one in model.parameters()]
        if what == "a closure":
            returned = isinstance(stepper.step(closure), torch.Tensor)
        else:
            closure()
            if what == "clipping":
                fabric.clip_gradients(wrapped, stepper, max_norm=1000.0)
            stepper.step()
            returned = True
        moved = [(old - new.detach()).double().cpu() for old, new in zip(before, model.parameters(), strict=True)]
        plain = cases.build(_CASE, torch.float32)
        nn.functional.mse_loss(plain(x), y).backward()
        return _off(moved, [_LARGE * one.grad.double() for one in plain.parameters() if one.grad is not None]), returned


def _check_step(bench: Bench, what: str) -> None:
    off, returned = bench.run(_step_after, what)[0]
    if not returned:
        raise Broken(f"a step with {what} doesn't return what it returned")
    if not off <= _tolerance(bench.plugin().policy):
        raise Broken(f"a step after {what} is off by {off:.2g} of its length")


class _Telling(torch.optim.SGD):
    """Says which of its steps it was, or what the closure gave."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        """Step."""
        self.steps += 1
        result = super().step(closure)
        return self.steps if closure is None else result


def _returned(place: Place) -> list[tuple[float, float]]:
    """Step twice, and twice with a closure where gradients are off; give what was returned, and what the step gave."""
    found: list[tuple[float, float]] = []
    with place.fabric() as fabric:
        model, inputs = _model_and_inputs(0, 0, 4)
        optimizer = _Telling(model.parameters(), lr=1e-2)
        wrapped, stepper = fabric.setup(model, optimizer)

        def closure() -> torch.Tensor:
            stepper.zero_grad()
            loss = _small(wrapped(inputs[len(found)].to(fabric.device)))
            fabric.backward(loss)
            return loss

        for with_closure in (False, False, True, True):
            steps, loss = optimizer.steps, closure()
            if with_closure:
                with torch.no_grad():
                    given = stepper.step(closure)
            else:
                given = stepper.step()
            if optimizer.steps > steps:  # it may be skipped, where the first scale is too large
                found.append((float(given), loss.item() if with_closure else float(optimizer.steps)))
    return found


@TABLE.rule(
    "PRE-228",
    "A step with finite gradients is made, and its result returned; with a closure too, which runs with gradients "
    "enabled.",
    reason="What is skipped without need isn't learnt, and scripts log the loss that a step returns.",
    advice="call step(closure) in optimizer_step, within torch.enable_grad() where you evaluate the closure yourself, "
    "and return what it returns",
)
def _makes_steps(bench: Bench) -> None:
    moved = bench.run(_steps, 1, ())[0]["moved"][0]
    if not 0 < moved < float("inf"):
        raise Broken(f"the parameters move by {moved}")
    _check_step(bench, "a closure")
    for given, expected in bench.run(_returned)[0]:
        if given != expected:
            raise Broken(f"a step returns {given:g}, and the optimizer's gave {expected:g}")


@TABLE.rule(
    "PRE-229",
    "A step whose gradients hold an infinity or a NaN, of whichever parameter, is skipped: no parameter changes.",
    reason="With a scaled loss an infinity means that the scale was too large, not that training failed.",
    advice="look at all gradients in optimizer_step before calling step()",
    needs=("loss_scaling",),
)
def _skips_steps(bench: Bench) -> None:
    for where, value in ((0, float("inf")), (-1, float("-inf")), (-1, float("nan"))):
        moved = bench.run(_steps, 1, (0,), where, value)[0]["moved"][0]
        if moved != 0:
            raise Broken(f"with {value} in the {'last' if where else 'first'} gradient parameters move by {moved}")


@TABLE.rule(
    "PRE-230",
    "A skipped step doesn't make the scale larger, however many come, and the step after it is as ever.",
    reason="Otherwise every following step is skipped too, or is of the wrong size.",
    advice="leave the scale or back off when a gradient isn't finite, and forget what was remembered of the step",
    needs=("loss_scaling",),
)
def _backs_off(bench: Bench) -> None:
    factor = bench.run(_steps, 1, (0,))[0]["factor"]
    if not 0 < factor <= 1:
        raise Broken(f"the scale is multiplied by {factor}")
    scales = bench.run(_hundred, None)[0]
    for step in _OVERFLOWS:
        if scales[step + 1] > scales[step]:
            raise Broken(f"step {step} of a hundred is skipped, and the scale grows to {scales[step + 1]:g} by it")
    _check_step(bench, "a skipped step")


@TABLE.rule(
    "PRE-231",
    "Of several optimizers those with finite gradients step, and the scale changes once.",
    reason="Two optimizers share one loss scale; two updates in one step would halve it twice.",
    advice="keep one decision for each optimizer, and update the scale once they all have stepped",
    needs=("loss_scaling",),
)
def _several_optimizers(bench: Bench) -> None:
    one = bench.run(_steps, 1, (0,))[0]["factor"]
    seen = bench.run(_steps, _TWO, (0,))[0]
    if seen["moved"][0] != 0 or seen["moved"][1] == 0:
        raise Broken(f"the first has an infinity, and the parameters move by {seen['moved']}")
    both = bench.run(_steps, _TWO, (0, 1))[0]["factor"]
    if seen["factor"] != one or both != one:
        raise Broken(f"the scale changes by {one} with one optimizer, by {seen['factor']} and {both} with two")


def _resumed(place: Place, state: bytes) -> tuple[Any, float]:
    with place.fabric() as fabric:
        fabric.precision.load_state_dict(torch.load(io.BytesIO(state), weights_only=True))
        loss = torch.ones((), device=fabric.device)
        return fabric.precision.state_dict(), fabric.precision.scale_loss(loss).item()


@TABLE.rule(
    "PRE-232",
    "Its state is of plain values, and comes back in a new object, through a file that runs no code.",
    reason="A training that continues must continue with the same scale.",
    advice="give numbers, text, lists and dicts in state_dict, no tensors, and take them all back in load_state_dict",
)
def _state(bench: Bench) -> None:
    seen = bench.run(_steps, 1, (0,) if bench.plugin().policy.loss_scaling else ())[0]
    if not _is_plain(seen["state"]):
        raise Broken(f"it holds more than plain values: {seen['state']!r}")
    file = io.BytesIO()
    torch.save(seen["state"], file)
    state, scale = bench.run(_resumed, file.getvalue())[0]
    if scale != seen["scale"] or repr(state) != repr(seen["state"]):
        raise Broken(f"{seen['state']!r} comes back as {state!r}, the scale {seen['scale']} as {scale}")


def _train(place: Place, case: cases.Training) -> tuple[cases.Weights, tuple[int, ...], list[str]]:
    """Train; give the parameters, which steps left them as they were, and which settings are changed."""
    before = snapshot.take()
    skipped = []
    with place.fabric() as fabric:
        model = cases.build(case, torch.float32)
        wrapped, stepper = fabric.setup(model, cases.optimizer_for(case, model.parameters()))
        for index, (x, y) in enumerate(cases.batches(case, torch.float32)):
            out = wrapped(x.to(fabric.device))
            fabric.backward(nn.functional.mse_loss(out, y.to(out)))
            old = cases.copied(model)
            stepper.step()
            stepper.zero_grad()
            if cases.distance(old, cases.copied(model)) == 0:
                skipped.append(index)
        trained = {name: tensor.double().cpu() for name, tensor in cases.copied(model).items()}
    return trained, tuple(skipped), snapshot.differences(before)


@TABLE.rule(
    "PRE-233",
    "A short training ends where plain PyTorch's does, to the policy's accuracy.",
    reason="It is what a precision is for: the same training in other types.",
    advice="compare gradients and steps with plain PyTorch's one by one",
    examples=cases.trainings(optimizer="sgd"),
    count=6,
)
def _trains(bench: Bench, case: cases.Training) -> None:
    trained, skipped, _ = bench.run(_train, case)[0]
    # The first scale may be too large for 16 bits; that a step is made at all is another rule.
    scales = bench.plugin().policy.loss_scaling
    off = cases.distance(trained, cases.trained_alone(case, skipped if scales else ()))
    if not off <= case.steps * _tolerance(bench.plugin().policy):
        raise Broken(f"after {case.steps} steps the parameters differ by {off:.2g}")


@TABLE.rule(
    "PRE-234",
    "After a training and its teardown the process is as before: PyTorch's settings, random numbers, hooks, variables.",
    reason="Another Fabric in the same process may ask for another precision.",
    advice="change settings inside contexts alone",
    inside=False,
)
def _leaves_settings(bench: Bench) -> None:
    _, _, left = bench.run_apart(_train, _CASE)[0]
    if left:
        raise Broken(f"{', '.join(left)} is changed")


def _scale_of_another(place: Place) -> tuple[float, float]:
    one, other = place.plugin(), place.plugin()
    with place.fabric(precision=one) as fabric:
        model = cases.build(_CASE, torch.float32)
        wrapped, stepper = fabric.setup(model, cases.optimizer_for(_CASE, model.parameters()))
        before = other.scale_loss(torch.ones(())).item()
        x, y = next(cases.batches(_CASE, torch.float32))
        out = wrapped(x.to(fabric.device))
        fabric.backward(nn.functional.mse_loss(out, y.to(out)))
        next(iter(model.parameters())).grad.view(-1)[0] = float("inf")  # type: ignore[union-attr]
        stepper.step()
    return before, other.scale_loss(torch.ones(())).item()


@TABLE.rule(
    "PRE-235",
    "Two of it keep their scales apart.",
    reason="A discriminator's infinity is none of the generator's business.",
    advice="keep the scale on self",
    needs=("loss_scaling",),
)
def _two_scales(bench: Bench) -> None:
    before, after = bench.run(_scale_of_another)[0]
    if before != after:
        raise Broken(f"a step skipped by one changes the other's scale from {before} to {after}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in {bool, int, float, str}


def _given(place: Place) -> list[str]:
    """Hand things over; name those that are others afterwards."""
    plugin, found = place.plugin(), []
    x = torch.ones(2, 3)
    batch = {"x": x, "more": [torch.zeros(1, dtype=torch.float64), (torch.tensor([1]), "text")]}
    before = repr(batch)
    plugin.convert_input(batch)
    plugin.convert_output(batch)
    if repr(batch) != before or batch["x"] is not x:
        found.append("a batch that was converted")
    plugin.scale_loss(torch.ones((), requires_grad=True))
    state = plugin.state_dict()
    before = repr(state)
    plugin.load_state_dict(state)
    if repr(state) != before:
        found.append("a state that was loaded")
    return found


@TABLE.rule(
    "PRE-237",
    "What it is given is as it was afterwards: batches that it converts, a state that it loads.",
    reason="A batch is cached by its loader, and a state is loaded into several.",
    advice="make new containers and tensors; take nothing out of what is given",
)
def _keeps_arguments(bench: Bench) -> None:
    found = bench.run(_given)[0]
    if found:
        raise Broken(f"changed: {', '.join(found)}")


def _unentered(place: Place) -> list[str]:
    plugin = place.plugin()
    before = snapshot.take()
    contexts = [plugin.forward_context("cpu"), plugin.init_context()]
    changed = snapshot.differences(before)
    contexts.clear()
    return changed


@TABLE.rule(
    "PRE-238",
    "A context that is made and not entered changes nothing.",
    reason="Whoever makes it may raise before its block begins.",
    advice="do it in __enter__",
)
def _contexts_wait(bench: Bench) -> None:
    changed = bench.run(_unentered)[0]
    if changed:
        raise Broken(f"it changes {', '.join(changed)}")


_OVERFLOWS: Final = (3, 4, 20, 50, 51, 52)
"""In which of a hundred steps a gradient is not finite."""


def _hundred(place: Place, stop: int | None) -> list[float]:
    """Take a hundred steps, some of which overflow; give each loss's scale. May go on in a new object from a state."""
    scales: list[float] = []
    state: dict[str, Any] | None = None
    for steps in [range(100)] if stop is None else [range(stop), range(stop, 100)]:
        with place.fabric() as fabric:
            fabric.precision.state_dict()  # whoever looks changes nothing
            if state is not None:
                fabric.precision.load_state_dict(state)
            model = nn.Linear(1, 1, bias=False)
            wrapped, stepper = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.0))
            x = torch.ones(1, 1, device=fabric.device)
            for step in steps:
                scales.append(fabric.precision.scale_loss(torch.ones((), device=fabric.device)).item())
                fabric.backward(wrapped(x).sum())
                if step in _OVERFLOWS:
                    _spoil(model, 0, float("inf"))
                stepper.step()
                stepper.zero_grad()
            state = fabric.precision.state_dict()
    return scales


@TABLE.rule(
    "PRE-239",
    "Restored from its state in the middle of a hundred steps, its scale goes on as if nothing had happened.",
    reason="A scale grows after a number of good steps; one that counts anew trains another training.",
    advice="put the count of good steps into state_dict beside the scale",
    needs=("loss_scaling",),
)
def _follows(bench: Bench) -> None:
    expected = bench.run(_hundred, None)[0]
    for stop in (4, 30):
        got = bench.run(_hundred, stop)[0]
        apart = [step for step, (one, other) in enumerate(zip(got, expected, strict=True)) if one != other]
        if apart:
            raise Broken(f"restored after {stop} steps, in step {apart[0]} the scale is {got[apart[0]]:g}, and "
                         f"{expected[apart[0]]:g} without")  # fmt: skip


def _spoilt_on(place: Place, which: int) -> tuple[float, float]:
    """Step on gradients that are not finite on one rank alone; give how far parameters and the scale went."""
    with place.fabric() as fabric:
        model = cases.build(_CASE, torch.float32)
        wrapped, stepper = fabric.setup(model, cases.optimizer_for(_CASE, model.parameters()))
        x, y = (one.to(fabric.device) for one in next(cases.batches(_CASE, torch.float32)))
        scale = fabric.precision.scale_loss(torch.ones((), device=fabric.device)).item()
        out = wrapped(x)
        fabric.backward(nn.functional.mse_loss(out, y.to(out)))
        if place.rank == which:
            _spoil(model, 0, float("inf"))
        before = cases.copied(model)
        stepper.step()
        stepper.zero_grad()
        after = fabric.precision.scale_loss(torch.ones((), device=fabric.device)).item()
        return cases.distance(before, cases.copied(model)), after / scale


@TABLE.rule(
    "PRE-240",
    "A gradient that is not finite on one rank, whichever, skips the step on all, and all scales stay equal.",
    reason="Ranks that skip alone train different models from then on.",
    advice="agree over the collectives that connect gives: the largest of what the ranks found counts",
    needs=("loss_scaling",),
    world_sizes=(2,),
)
def _skips_together(bench: Bench) -> None:
    for which in range(bench.world_size):
        seen = bench.run(_spoilt_on, which)
        moved = [rank for rank, (gap, _) in enumerate(seen) if gap != 0]
        if moved:
            raise Broken(f"an infinity is on rank {which}, and rank {moved[0]} steps")
        if len({factor for _, factor in seen}) > 1:
            raise Broken(f"an infinity is on rank {which}, and the scales change by {[one for _, one in seen]}")


def _train_parts(place: Place, case: cases.Training) -> cases.Weights:
    with place.fabric() as fabric:
        model = cases.build(case, torch.float32)
        wrapped, stepper = fabric.setup(model, cases.optimizer_for(case, model.parameters()))
        shard = fabric.strategy.data_shard()
        for x, y in cases.batches(case, torch.float32):
            out = wrapped(cases.part(x, shard).to(fabric.device))
            fabric.backward(nn.functional.mse_loss(out, cases.part(y, shard).to(out)))
            stepper.step()
            stepper.zero_grad()
        return {name: tensor.double().cpu() for name, tensor in cases.copied(model).items()}


@TABLE.rule(
    "PRE-241",
    "A short training on two ranks ends on both where plain PyTorch's in one process does, to the policy's accuracy.",
    reason="Most trainings in few digits are distributed.",
    advice="decide over the ranks together, and keep nothing that differs between them",
    lacks=("loss_scaling",),
    world_sizes=(2,),
)
def _trains_on_two(bench: Bench) -> None:
    case = cases.Training(steps=3, rows=2, optimizer="sgd")
    expected = cases.trained_alone(case)
    dtypes = [bench.declared.get(name) for name in _DTYPES]
    allowed = 32 * max([torch.finfo(torch.float32).eps, *(torch.finfo(dtype).eps for dtype in dtypes if dtype)])
    first, *others = bench.run(_train_parts, case)
    if not cases.distance(first, expected) <= case.steps * allowed:
        raise Broken(f"rank 0's parameters differ by {cases.distance(first, expected):.2g}")
    if any(cases.distance(first, other) != 0 for other in others):
        raise Broken("the ranks end with different parameters")


TABLE.untested(
    "PRE-236",
    "On every device type that it declares, matrix products run on the hardware's units for its types.",
    reason="Speed depends on the machine; the kit measures what is computed, not how fast.",
    advice="profile one step on that hardware",
)


_ORDERED: Final = ("pass", "pass", "clip", "clamp", "spoil", "step", "step", "clear")


def _orders() -> "SearchStrategy[cases.Script]":
    from hypothesis import strategies as st

    own = st.tuples(st.sampled_from(_ORDERED), st.sampled_from("01")).map(" ".join)
    acts = st.lists(st.one_of(own, own, own, st.sampled_from(["look", "load"])), min_size=4, max_size=12)
    return st.builds(cases.Script, st.integers(0, 99), acts.map(tuple))


def _model_and_inputs(seed: int, which: int, count: int) -> tuple[nn.Module, torch.Tensor]:
    generator = torch.Generator().manual_seed(2 * seed + which)
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, torch.randn(count, 4, 3, generator=generator)


def _small(output: torch.Tensor) -> torch.Tensor:
    """Give a loss whose gradients a large scale leaves finite in 16 bits."""
    return output.float().square().mean() / 64


def _acts(script: cases.Script) -> Iterator[tuple[int, str, int]]:
    """Give what a script does with which model, and where; what is clipped in between is spoilt no more."""
    clipped = [False] * _TWO
    for index, act in enumerate(script.acts):
        what, _, which = act.partition(" ")
        model = int(which or 0)
        if what == "spoil" and clipped[model]:
            continue
        if which:
            clipped[model] = what in {"clip", "clamp"} or (clipped[model] and what == "spoil")
        yield index, what, model


def _perform(place: Place, script: cases.Script) -> list[cases.Weights]:
    """Train two models, each with its optimizer."""
    with place.fabric() as fabric:
        made = [_model_and_inputs(script.seed, which, len(script.acts)) for which in range(_TWO)]
        pairs = [fabric.setup(model, torch.optim.SGD(model.parameters(), lr=_LARGE / 2)) for model, _ in made]
        first = fabric.precision.state_dict()
        for index, what, which in _acts(script):
            (model, inputs), (wrapped, stepper) = made[which], pairs[which]
            if what == "look":
                fabric.precision.state_dict()
            elif what == "load":
                fabric.precision.load_state_dict(first)
            elif what == "pass":
                fabric.backward(_small(wrapped(inputs[index].to(fabric.device))), model=wrapped)
            elif what == "step":
                stepper.step()
            elif model.weight.grad is not None:
                _touch(fabric, wrapped, stepper, what)
            if what in {"step", "clear"}:
                stepper.zero_grad()
        return [{name: one.float().cpu() for name, one in cases.copied(model).items()} for model, _ in made]


def _touch(fabric: Any, wrapped: Any, stepper: Any, what: str) -> None:
    """Look at gradients, or change them."""
    if what == "clip":
        fabric.clip_gradients(wrapped, stepper, max_norm=1e6)
    elif what == "clamp":
        fabric.clip_gradients(wrapped, stepper, clip_val=1e6)
    elif what == "spoil":
        _spoil(wrapped, 0, float("inf"))


def _performed_alone(script: cases.Script) -> tuple[list[cases.Weights], float]:
    """Do the same in plain PyTorch; give the parameters, and how far they went."""
    made = [_model_and_inputs(script.seed, which, len(script.acts)) for which in range(_TWO)]
    before = [cases.copied(model) for model, _ in made]
    optimizers = [torch.optim.SGD(model.parameters(), lr=_LARGE / 2) for model, _ in made]
    spoilt, went = [False] * _TWO, 0.0
    for index, what, which in _acts(script):
        model, inputs = made[which]
        if what == "pass":
            _small(model(inputs[index])).backward()
        elif what == "spoil" and model.weight.grad is not None:
            spoilt[which] = True
        elif what in {"step", "clear"}:
            if what == "step" and not spoilt[which]:
                optimizers[which].step()
                went = max(went, cases.distance(before[which], cases.copied(model)))
            optimizers[which].zero_grad()
            spoilt[which] = False
    return [cases.copied(model) for model, _ in made], went


@TABLE.rule(
    "PRE-242",
    "Any order of two models' passes, clippings, infinities, steps (without gradients too) and clearings, and of looks "
    "at the state, ends where plain PyTorch does; an infinity that clipping by value hides still skips its step.",
    reason="Gradients that wait were scaled by what the scale was, or are unscaled; those that come, by what it is.",
    advice="rescale gradients that wait to the loss's scale in scale_loss, and remember what unscaling found until the "
    "step, or until they are cleared",
    needs=("loss_scaling",),
    examples=_orders,
    count=12,
    first=(
        cases.Script(0, ("pass 0", "pass 1", "spoil 0", "step 0", "pass 1", "step 1")),
        cases.Script(1, ("pass 0", "clip 0", "pass 0", "step 0")),
        cases.Script(2, ("pass 0", "spoil 0", "step 0", "pass 0", "pass 1", "load", "pass 0", "step 0", "step 1")),
        cases.Script(3, ("pass 0", "step 1", "spoil 0", "clamp 0", "pass 0", "step 0", "step 0", "pass 0", "step 0")),
        cases.Script(3, ("pass 0", "pass 1", "clip 0", "step 1", "pass 0", "step 0")),
        cases.Script(4, ("pass 0", "spoil 0", "clip 0", "clear 0", "pass 1", "step 1", "pass 0", "step 0")),
    ),
)
def _in_any_order(bench: Bench, script: cases.Script) -> None:
    expected, went = _performed_alone(script)
    for which, got in enumerate(bench.run(_perform, script)[0]):
        off = cases.distance(got, expected[which])
        if not off <= 4 * _tolerance(bench.plugin().policy) * max(went, 1e-3):
            raise Broken(f"the parameters of model {which} differ by {off:.2g}, after going as far as {went:.2g}")


class _Twice(torch.optim.SGD):
    """Evaluates its closure twice before it steps, and keeps the first gradient's length each time."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=_LARGE)
        self.lengths: list[float] = []
        self.losses: list[float] = []

    def step(self, closure: Any = None) -> Any:
        """Step."""
        for _ in range(_TWO):
            with torch.enable_grad():
                loss = closure()
            self.losses.append(float(loss.detach()))
            self.lengths.append(self.param_groups[0]["params"][0].grad.float().norm().item())
        super().step()
        return loss


def _again_and_again(place: Place | None) -> tuple[list[float], list[float], int]:
    """Step with such a closure, in plain PyTorch where there is no place; give losses, lengths and evaluations."""
    model, inputs = _model_and_inputs(0, 0, 1)
    optimizer = _Twice(model.parameters())
    evaluations = 0
    with contextlib.nullcontext() if place is None else place.fabric() as fabric:
        wrapped, stepper = (model, optimizer) if fabric is None else fabric.setup(model, optimizer)
        x = inputs[0] if fabric is None else inputs[0].to(fabric.device)

        def closure() -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            stepper.zero_grad()
            loss = _small(wrapped(x))
            loss.backward() if fabric is None else fabric.backward(loss)
            return loss

        for _ in range(_TWO):
            stepper.step(closure)
    return optimizer.losses, optimizer.lengths, evaluations


def _or_error(place: Place, measure: Callable[[Place], Any]) -> Any:
    try:
        return measure(place)
    except Exception:  # noqa: BLE001 - whatever it is, the user is told
        return None


@TABLE.rule(
    "PRE-243",
    "An optimizer that evaluates its closure again and again sees true gradients each time, and no evaluation is lost; "
    "or an error is raised.",
    reason="L-BFGS and line searches do: they compare the gradients of one step.",
    advice="unscale after every evaluation that the step asks for, and end no iteration within it",
)
def _closures_again(bench: Bench) -> None:
    expected = _again_and_again(None)
    got = bench.run(_or_error, _again_and_again)[0]
    if got is None:
        return
    if got[2] != expected[2]:
        raise Broken(f"a closure that is asked for {expected[2]} times is evaluated {got[2]} times")
    allowed = 4 * _tolerance(bench.plugin().policy)
    for what, ones, others in (("loss", got[0], expected[0]), ("gradient", got[1], expected[1])):
        off = max(abs(one - other) / max(abs(other), 1e-6) for one, other in zip(ones, others, strict=True))
        if not off <= allowed:
            raise Broken(f"a {what} within a step is off by {off:.2g} of its size")


class _Recomputed(nn.Module):
    """A layer whose activations may be computed again in backward; it makes a tensor without saying of which type."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.layer, _ = _model_and_inputs(0, 0, 0)
        self._again = again

    def forward(self, x: torch.Tensor) -> Any:
        """Run it."""
        return checkpoint(self._run, x, use_reentrant=False) if self._again else self._run(x)

    def _run(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.layer(x)) * torch.full((2,), 0.5)


def _recomputed(place: Place, again: bool) -> list[torch.Tensor]:
    with place.fabric() as fabric:
        model = _Recomputed(again)
        wrapped = fabric.setup(model)
        _, inputs = _model_and_inputs(0, 0, 1)
        with torch.device(fabric.device):
            fabric.backward(_small(wrapped(inputs[0].to(fabric.device))))
        return [one.grad.double().cpu() for one in model.parameters() if one.grad is not None]


@TABLE.rule(
    "PRE-244",
    "Activations that a backward pass computes again are those of forward.",
    reason="Activation checkpointing runs parts of forward in backward, where types must be the same.",
    advice="let backward_context do what forward_context does to PyTorch's defaults; autocast PyTorch restores itself",
)
def _computes_again(bench: Bench) -> None:
    expected, got = (bench.run(_recomputed, again)[0] for again in (False, True))
    if len(got) != len(expected) or not _off(got, expected) <= _tolerance(bench.plugin().policy):
        raise Broken("the gradients are other ones")
