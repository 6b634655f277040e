"""Rules for strategies: what goes round their collectives."""

from collections.abc import Generator
from typing import Any, Final

import torch

from fabric_core.binding import around
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import SEVERAL

TABLE: Final = Table("strategy", inside=False)


class _Listener:
    """Hears which collectives are called."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    @around.collectives
    def all_reduce(self) -> Generator[None, Any, Any]:
        self.heard.append("all_reduce")
        return (yield)

    @around.collectives
    def all_gather(self) -> Generator[None, Any, Any]:
        self.heard.append("all_gather")
        return (yield)

    @around.collectives
    def broadcast(self) -> Generator[None, Any, Any]:
        self.heard.append("broadcast")
        return (yield)

    @around.collectives
    def barrier(self) -> Generator[None, Any, Any]:
        self.heard.append("barrier")
        return (yield)


def _listen(place: Place) -> list[list[str]]:
    """Call each collective of two that live at once; give what their extensions heard."""
    listeners = _Listener(), _Listener()
    seen = []
    with place.fabric(extension=listeners[0]) as one, place.fabric(extension=listeners[1]) as other:
        for fabric, listener in ((one, listeners[0]), (other, listeners[1])):
            listener.heard.clear()
            fabric.all_reduce(torch.ones(1, device=fabric.device), reduce_op="sum")
            fabric.all_gather(torch.ones(1, device=fabric.device))
            fabric.broadcast(place.rank)
            fabric.barrier()
            seen.append(listener.heard)
    return seen


@TABLE.rule(
    "STR-404",
    "Extensions go round each collective, of each of two that live at once.",
    reason="Whoever traces, checks or watches a training does it by them; Fabric's own `warn_after` is one.",
    advice="give new collectives from connect and from fork, whose methods are looked up on the instance",
    needs=("distributed",),
    world_sizes=SEVERAL,
)
def _extended(bench: Bench) -> None:
    for rank, fabrics in enumerate(bench.run(_listen)):
        for heard in fabrics:
            missing = {"all_reduce", "all_gather", "broadcast", "barrier"} - set(heard)
            if missing:
                raise Broken(f"on rank {rank} an extension does not hear {', '.join(sorted(missing))}")
