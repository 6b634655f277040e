"""Rules for precisions: whether it matters in which order a script does what it may."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

import torch

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.precision.measures import LARGE, TWO, model_and_inputs, small, spoil, tolerance

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TABLE: Final = Table("precision")

_ORDERED: Final = ("pass", "pass", "clip", "clamp", "spoil", "step", "step", "clear")


def _orders() -> "SearchStrategy[cases.Script]":
    from hypothesis import strategies as st

    own = st.tuples(st.sampled_from(_ORDERED), st.sampled_from("01")).map(" ".join)
    acts = st.lists(st.one_of(own, own, own, st.sampled_from(["look", "load"])), min_size=4, max_size=12)
    return st.builds(cases.Script, st.integers(0, 99), acts.map(tuple))


def _acts(script: cases.Script) -> Iterator[tuple[int, str, int]]:
    """Give what a script does with which model, and where; what is clipped in between is spoilt no more."""
    clipped = [False] * TWO
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
        made = [model_and_inputs(script.seed, which, len(script.acts)) for which in range(TWO)]
        pairs = [fabric.setup(model, torch.optim.SGD(model.parameters(), lr=LARGE / 2)) for model, _ in made]
        first = fabric.precision.state_dict()
        for index, what, which in _acts(script):
            (model, inputs), (wrapped, stepper) = made[which], pairs[which]
            if what == "look":
                fabric.precision.state_dict()
            elif what == "load":
                fabric.precision.load_state_dict(first)
            elif what == "pass":
                fabric.backward(small(wrapped(inputs[index].to(fabric.device))), model=wrapped)
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
        spoil(wrapped, 0, float("inf"))


def _performed_alone(script: cases.Script) -> tuple[list[cases.Weights], float]:
    """Do the same in plain PyTorch; give the parameters, and how far they went."""
    made = [model_and_inputs(script.seed, which, len(script.acts)) for which in range(TWO)]
    before = [cases.copied(model) for model, _ in made]
    optimizers = [torch.optim.SGD(model.parameters(), lr=LARGE / 2) for model, _ in made]
    spoilt, went = [False] * TWO, 0.0
    for index, what, which in _acts(script):
        model, inputs = made[which]
        if what == "pass":
            small(model(inputs[index])).backward()
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
        if not off <= 4 * tolerance(bench.plugin().policy) * max(went, 1e-3):
            raise Broken(f"the parameters of model {which} differ by {off:.2g}, after going as far as {went:.2g}")
