"""Measurements that several rules for precisions share, and how far numbers may be off."""

import contextlib
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance import cases, snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken
from fabric_core.contracts import PrecisionPolicy

__all__ = [
    "CASE",
    "DTYPES",
    "LARGE",
    "TWO",
    "check_step",
    "forward",
    "model_and_inputs",
    "off_by",
    "small",
    "spoil",
    "step_each",
    "tolerance",
]

DTYPES: Final = ("param_dtype", "compute_dtype", "reduce_dtype", "input_dtype", "output_dtype")
CASE: Final = cases.Training(steps=4, rows=2, buffers=True)
TWO: Final = 2
LARGE: Final = 64.0
"""A rate so large that a step is longer than the parameters, whose rounding then doesn't hide it."""


def forward(place: Place, fails: bool) -> dict[str, Any]:
    """Run a model once through the façade; say which types were seen, and what it left behind."""
    with place.fabric() as fabric:
        model = cases.build(CASE, torch.float32)
        wrapped = fabric.setup(model)
        x, _ = next(cases.batches(CASE, torch.float32))
        x = x.to(fabric.device)
        before = snapshot.take()
        if fails:
            with contextlib.suppress(TypeError):
                wrapped(x, scale=None)
            return {"left": snapshot.differences(before)}
        y = wrapped(x)
        return {"inside": model.seen[0], "out": y.dtype, "left": snapshot.differences(before)}


def tolerance(policy: PrecisionPolicy) -> float:
    """How far numbers may be off that went through the coarsest of the policy's types."""
    dtypes = [getattr(policy, name) for name in DTYPES]
    return 32 * max([torch.finfo(torch.float32).eps, *(torch.finfo(dtype).eps for dtype in dtypes if dtype)])


def off_by(got: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Say how far tensors are off, as a part of the norm of those that are expected."""
    whole = torch.cat([one.flatten() for one in expected])
    gap: float = (torch.cat([one.flatten() for one in got]) - whole).norm().item() / whole.norm().item()
    return gap


def step_each(
    place: Place, models: int, broken: tuple[int, ...], where: int = 0, value: float = float("inf")
) -> dict[str, Any]:
    """Step once with each of some optimizers; the broken ones' gradients hold a value that isn't finite.

    Then look at the scale, which is what a loss of one becomes.
    """
    with place.fabric() as fabric:
        pairs = [
            fabric.setup(model, cases.optimizer_for(CASE, model.parameters()))
            for model in (cases.build(CASE, torch.float32) for _ in range(models))
        ]
        x, y = (one.to(fabric.device) for one in next(cases.batches(CASE, torch.float32)))
        scale = fabric.precision.scale_loss(torch.ones((), device=fabric.device)).item()
        for model, _ in pairs:
            out = model(x)
            fabric.backward(nn.functional.mse_loss(out, y.to(out)))
        before = [cases.copied(model.module) for model, _ in pairs]
        for index in broken:
            spoil(pairs[index][0], where, value)
        for _, stepper in pairs:
            stepper.step()
            stepper.zero_grad()
        after = fabric.precision.scale_loss(torch.ones((), device=fabric.device)).item()
        return {
            "moved": [
                cases.distance(old, cases.copied(new.module)) for old, (new, _) in zip(before, pairs, strict=True)
            ],
            "factor": after / scale,
            "state": fabric.precision.state_dict(),
            "scale": after,
        }


def spoil(model: nn.Module, where: int, value: float) -> None:
    """Put a value into the gradient of one parameter."""
    gradient: Any = list(model.parameters())[where].grad
    gradient.view(-1)[0] = value


def _step_after(place: Place, what: str) -> tuple[float, bool]:
    """Step after something; say how far the step is off plain PyTorch's, and whether a closure's loss came back."""
    with place.fabric() as fabric:
        model = cases.build(CASE, torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=LARGE)
        wrapped, stepper = fabric.setup(model, optimizer)
        x, y = next(cases.batches(CASE, torch.float32))

        def closure() -> torch.Tensor:
            stepper.zero_grad()
            out = wrapped(x.to(fabric.device))
            loss = nn.functional.mse_loss(out, y.to(out))
            fabric.backward(loss)
            return loss

        if what == "a skipped step":
            closure()
            spoil(model, 0, float("inf"))
            stepper.step()
        before = [one.detach().clone() for one in model.parameters()]
        if what == "a closure":
            returned = isinstance(stepper.step(closure), torch.Tensor)
        else:
            closure()
            if what == "clipping":
                fabric.clip_gradients(wrapped, stepper, max_norm=1000.0)
            stepper.step()
            returned = True
        moved = [(old - new.detach()).double().cpu() for old, new in zip(before, model.parameters(), strict=True)]
        plain = cases.build(CASE, torch.float32)
        nn.functional.mse_loss(plain(x), y).backward()
        return off_by(
            moved, [LARGE * one.grad.double() for one in plain.parameters() if one.grad is not None]
        ), returned


def check_step(bench: Bench, what: str) -> None:
    """Raise where a step after something isn't plain PyTorch's, or doesn't return what it should."""
    off, returned = bench.run(_step_after, what)[0]
    if not returned:
        raise Broken(f"a step with {what} doesn't return what it returned")
    if not off <= tolerance(bench.plugin().policy):
        raise Broken(f"a step after {what} is off by {off:.2g} of its length")


def model_and_inputs(seed: int, which: int, count: int) -> tuple[nn.Module, torch.Tensor]:
    """Give a small model, and batches for it, of 4 rows each."""
    generator = torch.Generator().manual_seed(2 * seed + which)
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, torch.randn(count, 4, 3, generator=generator)


def small(output: torch.Tensor) -> torch.Tensor:
    """Give a loss whose gradients a large scale leaves finite in 16 bits."""
    return output.float().square().mean() / 64
