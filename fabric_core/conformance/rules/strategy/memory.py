"""Rules for strategies: what they say that a rank will hold in memory."""

from collections.abc import Iterable
from typing import Any, Final

import torch

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Training
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import ALWAYS, How, local_part, loss_of, set_up
from fabric_core.contracts import MemoryEstimate, ProcessInfo
from fabric_core.errors import MisuseError

TABLE: Final = Table("strategy", inside=False)

_COMPARED: Final = ("parameters", "gradients", "optimizer")


def _said(place: Place, case: Training) -> list[MemoryEstimate] | None:
    """Ask a strategy that isn't connected what each rank will hold; ``None`` where it refuses to say."""
    from fabric_core.conformance.references import Full

    model = cases.build(case)
    optimizer = cases.optimizer_for(case, model.parameters())
    x, y = next(cases.batches(case))
    torch.nn.functional.mse_loss(model(x), y).backward()
    optimizer.step()
    size, strategy = place.world_size, place.plugin()
    try:
        return [
            strategy.estimate_memory(
                ProcessInfo(global_rank=rank, local_rank=rank, world_size=size, local_world_size=size),
                Full().policy,
                model,
                optimizer,
            )
            for rank in range(size)
        ]
    except MisuseError:
        return None


def _step(place: Place, case: Training) -> tuple[list[MemoryEstimate] | None, dict[str, int]]:
    """Ask, then train a step; give what was said of every rank, and what this one holds."""
    said = _said(place, case)
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, case, How())
        x, y = next(cases.batches(case))
        fabric.backward(loss_of(fabric, wrapped, How(), case, x, y))
        gradients = _bytes(one.grad for one in model.parameters())
        stepper.step()
        held = {
            "parameters": _bytes((*model.parameters(), *model.buffers())),
            "gradients": gradients,
            "optimizer": _bytes(value for state in stepper.state.values() for value in state.values()),
        }
        return said, held


def _bytes(values: Iterable[Any]) -> int:
    own = [local_part(one) for one in values if isinstance(one, torch.Tensor)]
    return sum(one.numel() * one.element_size() for one in own)


@TABLE.rule(
    "STR-399",
    "What `estimate_memory` says of parameters, gradients and optimizer state is what each rank holds after a step, "
    "to the byte where they divide evenly; or it raises `MisuseError`.",
    reason="Machines are bought by it, before a training runs.",
    advice="return MemoryEstimate.of(module, optimizer, part) with the bytes of a parameter that a rank holds, or "
    "raise MisuseError",
    lacks=("joint_setup",),
    world_sizes=ALWAYS,
    examples=cases.trainings(width=4, steps=1),
    count=3,
    first=(Training(optimizer="adam", steps=1, frozen=True, buffers=True),),
)
def _says_what_it_holds(bench: Bench, case: Training) -> None:
    for rank, (said, held) in enumerate(bench.run(_step, case)):
        for name in _COMPARED if said is not None else ():
            expected = getattr(said[rank], name)
            if expected != held[name]:
                raise Broken(f"rank {rank} holds {held[name]} bytes of {name}, and {expected} were said")
