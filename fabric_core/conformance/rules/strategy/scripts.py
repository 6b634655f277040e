"""Rules for strategies: any order of calls."""

import pickle
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Script, Training, Weights, distance
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Level, Table
from fabric_core.conformance.rules.strategy.measures import ALWAYS, How, loss_of, set_up, whole

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TABLE: Final = Table("strategy", inside=False)


_RESUMING: Final = Script(
    acts=("pass", "clip", "step", "save", "pass", "step", "load", "pass", "step", "restart", "pass", "step")
)
"""Clips once; and what was gathered over steps, such as momentum, comes back."""


_ACTS: Final = ("pass", "pass", "apart", "step", "step", "clip", "save", "load", "restart")


def _scripts() -> "SearchStrategy[Script]":
    from hypothesis import strategies as st

    return st.builds(Script, st.integers(0, 99), st.lists(st.sampled_from(_ACTS), min_size=4, max_size=14).map(tuple))


def _perform(place: Place, script: Script, folder: str) -> Weights:  # noqa: C901 - one branch for each act
    case = Training(seed=script.seed, optimizer="momentum")
    path = Path(folder) / "state.pt"
    data = iter(cases.batches(case, steps=len(script.acts)))
    acts, saved, fresh = list(script.acts), False, True
    while True:
        with place.fabric() as fabric:
            model, wrapped, (stepper,) = set_up(fabric, case, How())
            state = {"model": wrapped, "optimizer": stepper}
            if not fresh and saved:
                fabric.load(path, dict(state))
            apart = gathered = False
            while acts:
                act = acts.pop(0)
                if act == "restart":
                    break
                if act in {"pass", "apart"}:
                    with fabric.no_backward_sync(wrapped, enabled=act == "apart"):
                        fabric.backward(loss_of(fabric, wrapped, How(), case, *next(data)))
                    apart, gathered = act == "apart", True
                elif apart:
                    continue
                elif act == "step":
                    stepper.step()
                    stepper.zero_grad()
                    gathered = False
                elif act == "clip" and gathered:
                    fabric.clip_gradients(wrapped, stepper, max_norm=0.05)
                elif act == "save":
                    fabric.save(path, state)
                    saved = True
                elif act == "load" and saved:
                    fabric.load(path, dict(state))
            else:
                return whole(fabric, model)
            fresh = False


def _performed_alone(script: Script) -> Weights:  # noqa: C901 - one branch for each act
    case = Training(seed=script.seed, optimizer="momentum")
    data = iter(cases.batches(case, steps=len(script.acts)))
    model, saved, apart = cases.build(case), b"", False
    optimizer = cases.optimizer_for(case, model.parameters())

    def load() -> None:
        weights, steps = pickle.loads(saved)  # noqa: S301 - written below
        model.load_state_dict(weights)
        optimizer.load_state_dict(steps)

    for act in script.acts:
        if act == "restart":
            model, apart = cases.build(case), False
            optimizer = cases.optimizer_for(case, model.parameters())
            if saved:
                load()
        elif act in {"pass", "apart"}:
            x, y = next(data)
            nn.functional.mse_loss(model(x), y).backward()
            apart = act == "apart"
        elif apart:
            continue
        elif act == "step":
            optimizer.step()
            optimizer.zero_grad()
        elif act == "clip" and any(one.grad is not None for one in model.parameters()):
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        elif act == "save":
            saved = pickle.dumps((model.state_dict(), optimizer.state_dict()))
        elif act == "load" and saved:
            load()
    return cases.copied(model)


@TABLE.rule(
    "STR-396",
    "Any order of passes, steps, clippings, savings, loadings and restarts ends where one process does.",
    reason="Mistakes hide between calls that each work alone.",
    advice="follow the shrunk script; what it does last is what goes wrong",
    level=Level.STOCHASTIC,
    world_sizes=ALWAYS,
    examples=_scripts,
    count=9,
    first=(_RESUMING,),
)
def _any_order(bench: Bench, script: Script) -> None:
    expected = _performed_alone(script)
    with tempfile.TemporaryDirectory(prefix="fabric-kit-") as folder:
        for rank, got in enumerate(bench.run(_perform, script, folder)):
            off = distance(got, expected)
            if not off <= exact():
                raise Broken(f"rank {rank}'s parameters differ by {off:.3g}")


TABLE.untested(
    "STR-397",
    "It trains over several nodes as on one.",
    reason="The kit runs on one machine; names, addresses and networks of several are not there to be tried.",
    advice="run the kit's cases under your cluster's launcher",
)
