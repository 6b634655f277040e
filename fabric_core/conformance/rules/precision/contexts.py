"""Rules for precisions: what their contexts do, and that they leave nothing behind."""

import contextlib
from functools import partial
from typing import Any, Final

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fabric_core.conformance import snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.precision.measures import forward, model_and_inputs, off_by, small, tolerance

TABLE: Final = Table("precision")


@TABLE.rule(
    "PRE-215",
    "A run of the model leaves default type, autocast and modes as they were.",
    reason="The script's own computations between runs must not change their type.",
    advice="put it into a context, and undo it in its end",
)
def _leaves_nothing(bench: Bench) -> None:
    left = bench.run(forward, False)[0]["left"]
    if left:
        raise Broken(f"it leaves {', '.join(left)} changed")


@TABLE.rule(
    "PRE-216",
    "A run that raises leaves default type, autocast and modes as they were.",
    reason="A user may catch the error and go on.",
    advice="undo in `finally`",
)
def _leaves_nothing_on_errors(bench: Bench) -> None:
    left = bench.run(forward, True)[0]["left"]
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


class _Recomputed(nn.Module):
    """A layer whose activations may be computed again in backward; it makes a tensor without saying of which type."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.layer, _ = model_and_inputs(0, 0, 0)
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
        _, inputs = model_and_inputs(0, 0, 1)
        with torch.device(fabric.device):
            fabric.backward(small(wrapped(inputs[0].to(fabric.device))))
        return [one.grad.double().cpu() for one in model.parameters() if one.grad is not None]


@TABLE.rule(
    "PRE-244",
    "Activations that a backward pass computes again are those of forward.",
    reason="Activation checkpointing runs parts of forward in backward, where types must be the same.",
    advice="let backward_context do what forward_context does to PyTorch's defaults; autocast PyTorch restores itself",
)
def _computes_again(bench: Bench) -> None:
    expected, got = (bench.run(_recomputed, again)[0] for again in (False, True))
    if len(got) != len(expected) or not off_by(got, expected) <= tolerance(bench.plugin().policy):
        raise Broken("the gradients are other ones")
