"""Rules for precisions: which steps are made, and which skipped."""

from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.precision.measures import CASE, check_step, model_and_inputs, small, spoil, step_each

TABLE: Final = Table("precision")


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
        model, inputs = model_and_inputs(0, 0, 4)
        optimizer = _Telling(model.parameters(), lr=1e-2)
        wrapped, stepper = fabric.setup(model, optimizer)

        def closure() -> torch.Tensor:
            stepper.zero_grad()
            loss = small(wrapped(inputs[len(found)].to(fabric.device)))
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
    moved = bench.run(step_each, 1, ())[0]["moved"][0]
    if not 0 < moved < float("inf"):
        raise Broken(f"the parameters move by {moved}")
    check_step(bench, "a closure")
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
        moved = bench.run(step_each, 1, (0,), where, value)[0]["moved"][0]
        if moved != 0:
            raise Broken(f"with {value} in the {'last' if where else 'first'} gradient parameters move by {moved}")


def _spoilt_on(place: Place, which: int) -> tuple[float, float]:
    """Step on gradients that are not finite on one rank alone; give how far parameters and the scale went."""
    with place.fabric() as fabric:
        model = cases.build(CASE, torch.float32)
        wrapped, stepper = fabric.setup(model, cases.optimizer_for(CASE, model.parameters()))
        x, y = (one.to(fabric.device) for one in next(cases.batches(CASE, torch.float32)))
        scale = fabric.precision.scale_loss(torch.ones((), device=fabric.device)).item()
        out = wrapped(x)
        fabric.backward(nn.functional.mse_loss(out, y.to(out)))
        if place.rank == which:
            spoil(model, 0, float("inf"))
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
