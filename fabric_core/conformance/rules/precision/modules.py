"""Rules for precisions: how modules are converted, and made."""

import contextlib
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases, snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Table

TABLE: Final = Table("precision")


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
