"""Rules for precisions: whether gradients are those of plain PyTorch."""

import contextlib
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.precision.measures import (
    CASE,
    LARGE,
    TWO,
    check_step,
    model_and_inputs,
    off_by,
    small,
    tolerance,
)
from fabric_core.wrapping import unwrap

TABLE: Final = Table("precision")


def _gradients(place: Place, clip: float | None = None, unscale: int = 1) -> dict[str, Any]:
    """Run one backward pass; give the gradients as they come out of unscaling, and as plain PyTorch has them."""
    with place.fabric() as fabric:
        model = cases.build(CASE, torch.float32)
        optimizer = cases.optimizer_for(CASE, model.parameters())
        wrapped, stepper = fabric.setup(model, optimizer)
        x, y = next(cases.batches(CASE, torch.float32))
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
        plain = cases.build(CASE, torch.float32)
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


@TABLE.rule(
    "PRE-222",
    "After `unscale_gradients` the gradients are those of plain PyTorch, to the policy's accuracy.",
    reason="Whoever looks at gradients must see their true size.",
    advice="divide by exactly what scale_loss multiplied by",
)
def _true_gradients(bench: Bench) -> None:
    seen = bench.run(_gradients)[0]
    off = off_by(seen["got"], seen["expected"])
    if not off <= tolerance(bench.plugin().policy):
        raise Broken(f"they are off by {off:.2g} of their norm")


@TABLE.rule(
    "PRE-223",
    "A second `unscale_gradients` in the same step changes nothing, and neither does clipping before the step.",
    reason="Clipping unscales, and so does the step.",
    advice="remember for which optimizers it was done in this step",
)
def _unscale_twice(bench: Bench) -> None:
    seen = bench.run(_gradients, None, 2)[0]
    off = off_by(seen["got"], seen["expected"])
    if not off <= tolerance(bench.plugin().policy):
        raise Broken(f"after two calls they are off by {off:.2g} of their norm")
    check_step(bench, "clipping")


@TABLE.rule(
    "PRE-224",
    "Clipping sees unscaled gradients: `fabric.clip_gradients` gives the norm that plain PyTorch has.",
    reason="A threshold of 1.0 must mean 1.0.",
    advice="do the unscaling in unscale_gradients, not only in optimizer_step",
)
def _clip(bench: Bench) -> None:
    seen = bench.run(_gradients, 1000.0)[0]
    expected = torch.cat([one.flatten() for one in seen["expected"]]).norm().item()
    if not abs(seen["norm"] - expected) <= tolerance(bench.plugin().policy) * expected:
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


class _Twice(torch.optim.SGD):
    """Evaluates its closure twice before it steps, and keeps the first gradient's length each time."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=LARGE)
        self.lengths: list[float] = []
        self.losses: list[float] = []

    def step(self, closure: Any = None) -> Any:
        """Step."""
        for _ in range(TWO):
            with torch.enable_grad():
                loss = closure()
            self.losses.append(float(loss.detach()))
            self.lengths.append(self.param_groups[0]["params"][0].grad.float().norm().item())
        super().step()
        return loss


def _again_and_again(place: Place | None) -> tuple[list[float], list[float], int]:
    """Step with such a closure, in plain PyTorch where there is no place; give losses, lengths and evaluations."""
    model, inputs = model_and_inputs(0, 0, 1)
    optimizer = _Twice(model.parameters())
    evaluations = 0
    with contextlib.nullcontext() if place is None else place.fabric() as fabric:
        wrapped, stepper = (model, optimizer) if fabric is None else fabric.setup(model, optimizer)
        x = inputs[0] if fabric is None else inputs[0].to(fabric.device)

        def closure() -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            stepper.zero_grad()
            loss = small(wrapped(x))
            loss.backward() if fabric is None else fabric.backward(loss)
            return loss

        for _ in range(TWO):
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
    allowed = 4 * tolerance(bench.plugin().policy)
    for what, ones, others in (("loss", got[0], expected[0]), ("gradient", got[1], expected[1])):
        off = max(abs(one - other) / max(abs(other), 1e-6) for one, other in zip(ones, others, strict=True))
        if not off <= allowed:
            raise Broken(f"a {what} within a step is off by {off:.2g} of its size")
