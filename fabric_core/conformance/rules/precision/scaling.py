"""Rules for precisions: what a loss is scaled by, and what becomes of the scale."""

import io
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.precision.measures import CASE, TWO, check_step, spoil, step_each

TABLE: Final = Table("precision")


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


@TABLE.rule(
    "PRE-230",
    "A skipped step doesn't make the scale larger, however many come, and the step after it is as ever.",
    reason="Otherwise every following step is skipped too, or is of the wrong size.",
    advice="leave the scale or back off when a gradient isn't finite, and forget what was remembered of the step",
    needs=("loss_scaling",),
)
def _backs_off(bench: Bench) -> None:
    factor = bench.run(step_each, 1, (0,))[0]["factor"]
    if not 0 < factor <= 1:
        raise Broken(f"the scale is multiplied by {factor}")
    scales = bench.run(_hundred, None)[0]
    for step in _OVERFLOWS:
        if scales[step + 1] > scales[step]:
            raise Broken(f"step {step} of a hundred is skipped, and the scale grows to {scales[step + 1]:g} by it")
    check_step(bench, "a skipped step")


@TABLE.rule(
    "PRE-231",
    "Of several optimizers those with finite gradients step, and the scale changes once.",
    reason="Two optimizers share one loss scale; two updates in one step would halve it twice.",
    advice="keep one decision for each optimizer, and update the scale once they all have stepped",
    needs=("loss_scaling",),
)
def _several_optimizers(bench: Bench) -> None:
    one = bench.run(step_each, 1, (0,))[0]["factor"]
    seen = bench.run(step_each, TWO, (0,))[0]
    if seen["moved"][0] != 0 or seen["moved"][1] == 0:
        raise Broken(f"the first has an infinity, and the parameters move by {seen['moved']}")
    both = bench.run(step_each, TWO, (0, 1))[0]["factor"]
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
    seen = bench.run(step_each, 1, (0,) if bench.plugin().policy.loss_scaling else ())[0]
    if not _is_plain(seen["state"]):
        raise Broken(f"it holds more than plain values: {seen['state']!r}")
    file = io.BytesIO()
    torch.save(seen["state"], file)
    state, scale = bench.run(_resumed, file.getvalue())[0]
    if scale != seen["scale"] or repr(state) != repr(seen["state"]):
        raise Broken(f"{seen['state']!r} comes back as {state!r}, the scale {seen['scale']} as {scale}")


def _scale_of_another(place: Place) -> tuple[float, float]:
    one, other = place.plugin(), place.plugin()
    with place.fabric(precision=one) as fabric:
        model = cases.build(CASE, torch.float32)
        wrapped, stepper = fabric.setup(model, cases.optimizer_for(CASE, model.parameters()))
        before = other.scale_loss(torch.ones(())).item()
        x, y = next(cases.batches(CASE, torch.float32))
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
                    spoil(model, 0, float("inf"))
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
