"""Rules for strategies: clipping gradients."""

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Clipping, Training
from fabric_core.conformance.numbers import exact
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import (
    ALWAYS,
    How,
    gap,
    gradients,
    local_part,
    loss_of,
    set_up,
    stepped,
    whole,
)

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TABLE: Final = Table("strategy", inside=False)


def _clippings() -> "SearchStrategy[Clipping]":
    from hypothesis import strategies as st

    return st.builds(
        Clipping, st.sampled_from([1.0, 2.0, 3.0, float("inf")]), st.sampled_from([0.01, 0.1, 1e6]), st.integers(0, 99)
    )


def _clip(place: Place, clipping: Clipping, by: str) -> dict[str, Any]:
    case = Training(seed=clipping.seed)
    with place.fabric() as fabric:
        model, wrapped, (stepper,) = set_up(fabric, case, How())
        x, y = next(cases.batches(case))
        before, spoils = whole(fabric, model), by == f"infinity {fabric.global_rank}"
        if spoils and fabric.strategy.capabilities.joint_setup:  # an engine may keep gradients elsewhere than in `grad`
            next(model.parameters()).register_hook(_spoilt)
        fabric.backward(loss_of(fabric, wrapped, How(), case, x, y))
        if spoils and not fabric.strategy.capabilities.joint_setup:
            gradient: Any = next(one.grad for one in model.parameters() if one.grad is not None)
            local_part(gradient).view(-1)[:1] = float("inf")
        norm: Any = None
        try:
            if by == "value":
                fabric.clip_gradients(wrapped, stepper, clip_val=clipping.max_norm)
            else:
                norm = fabric.clip_gradients(wrapped, stepper, max_norm=clipping.max_norm, norm_type=clipping.norm_type)
        except RuntimeError as error:
            return {"raised": str(error)}
        return {
            "raised": None,
            "norm": None if norm is None else float(norm),
            "plain": type(norm) is torch.Tensor and norm.ndim == 0,
            # What a step does with them counts, wherever they are kept.
            "gradients": {} if by.startswith("infinity") else stepped(fabric, model, stepper, before),
        }


def _spoilt(gradient: torch.Tensor) -> torch.Tensor:
    spoilt = gradient.clone()
    spoilt.view(-1)[:1] = float("inf")
    return spoilt


def _clipped_alone(clipping: Clipping, by: str) -> tuple[float, dict[str, Any]]:
    case = Training(seed=clipping.seed)
    plain = cases.build(case)
    x, y = next(cases.batches(case))
    nn.functional.mse_loss(plain(x), y).backward()
    if by == "value":
        nn.utils.clip_grad_value_(plain.parameters(), clipping.max_norm)
        return 0.0, gradients(plain)
    norm = nn.utils.clip_grad_norm_(plain.parameters(), clipping.max_norm, clipping.norm_type)
    return norm.item(), gradients(plain)


@TABLE.rule(
    "STR-340",
    "`clip_grad_norm` gives the norm of the whole model's gradients before clipping, the same on every rank.",
    reason="A norm of shards clips each rank by another factor.",
    advice="combine the ranks' norms: sum the p-th powers, or take the maximum for inf",
    world_sizes=ALWAYS,
    examples=_clippings,
    count=5,
)
def _norm(bench: Bench, clipping: Clipping) -> None:
    expected, _ = _clipped_alone(clipping, "norm")
    for rank, seen in enumerate(bench.run(_clip, clipping, "norm")):
        if seen["raised"] is not None or not abs(seen["norm"] - expected) <= exact() * max(1.0, expected):
            raise Broken(f"rank {rank}: {seen['raised'] or seen['norm']}, and the whole norm is {expected:.9g}")


@TABLE.rule(
    "STR-341",
    "`clip_grad_norm` scales every gradient as plain PyTorch does on the whole model.",
    reason="Clipping is part of the training; with other gradients it is another training.",
    advice="multiply every gradient by max_norm / norm where that is below one",
    world_sizes=ALWAYS,
    examples=_clippings,
    count=5,
)
def _clips(bench: Bench, clipping: Clipping) -> None:
    _, expected = _clipped_alone(clipping, "norm")
    for rank, seen in enumerate(bench.run(_clip, clipping, "norm")):
        if seen["raised"] is not None or not gap(seen["gradients"], expected) <= exact():
            raise Broken(f"rank {rank}: {seen['raised'] or 'the gradients are off'}")


@TABLE.rule(
    "STR-342",
    "The norm is a plain tensor without dimensions.",
    reason="Scripts log it and compare it.",
    advice="call .full_tensor() on a distributed one",
    world_sizes=ALWAYS,
)
def _plain_norm(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_clip, Clipping(), "norm")):
        if not seen.get("plain"):
            raise Broken(f"rank {rank}: {seen['raised'] or 'it is something else'}")


@TABLE.rule(
    "STR-343",
    "With `error_if_nonfinite`, an infinity on one rank raises RuntimeError on every rank.",
    reason="A rank that goes on alone hangs in the next collective.",
    advice="decide by the whole norm, which is infinite on every rank",
    world_sizes=ALWAYS,
)
def _nonfinite(bench: Bench) -> None:
    for where in range(bench.world_size):
        for rank, seen in enumerate(bench.run(_clip, Clipping(), f"infinity {where}")):
            # Of whole gradients that are there already, a rank alone knows of what is spoilt afterwards.
            if seen["raised"] is None and (bench.declared["sharded"] or rank == where):
                raise Broken(f"an infinity is on rank {where}, and rank {rank} clipped to a norm of {seen['norm']}")


@TABLE.rule(
    "STR-344",
    "`clip_grad_value` clips every element of every gradient.",
    reason="It needs no norm, and still must reach all.",
    advice="clamp the gradients in place",
    world_sizes=ALWAYS,
    examples=_clippings,
    count=3,
)
def _value(bench: Bench, clipping: Clipping) -> None:
    _, expected = _clipped_alone(clipping, "value")
    for rank, seen in enumerate(bench.run(_clip, clipping, "value")):
        if seen["raised"] is not None or not gap(seen["gradients"], expected) <= exact():
            raise Broken(f"rank {rank}: {seen['raised'] or 'the gradients are off'}")
