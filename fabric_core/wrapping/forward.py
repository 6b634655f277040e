"""What goes round a run of a model: the route through the strategy, conversions, contexts and guards, chosen once."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import nn

from fabric_core.contracts import Precision, Wrapper, converter
from fabric_core.wrapping.backward_guard import BackwardGuard
from fabric_core.wrapping.gradient_sync import GradientSync
from fabric_core.wrapping.step_guard import StepGuard

__all__ = ["Around", "Route", "Run"]

Run = Callable[..., Any]


class Route(nn.Module):
    """What a strategy wraps in place of the user's module, so that other methods than ``forward`` pass through it too.

    ``route("forward", x)`` is ``module(x)``, and ``route("generate", x)`` is ``module.generate(x)``.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, /, *args: Any, **kwargs: Any) -> Any:
        """Run the module, or a method of it."""
        if method == "forward":
            return self.module(*args, **kwargs)
        return getattr(self.module, method)(*args, **kwargs)


@dataclass(frozen=True, kw_only=True)
class Around:
    """What goes round every run of a model.

    Args:
        precision: The bound precision.
        carried: The strategy carries the precision's types itself, so inputs stay and nothing autocasts.
        wrappers: The bound wrappers, each of which may give a context.
        guard: Refuses a raw ``loss.backward()``, where that is needed.
        sync: Knows which gradients were not averaged, where that is needed.
        steps: Is told when gradients are cleared, where that is needed.
    """

    precision: Precision
    carried: bool = False
    wrappers: tuple[Wrapper, ...] = ()
    guard: BackwardGuard | None = None
    sync: GradientSync | None = None
    steps: StepGuard | None = None

    def bind(self, module: nn.Module, inner: nn.Module, device: torch.device) -> Callable[[Run], Run]:
        """Choose, once, what a run needs; what it doesn't need costs nothing.

        Returns:
            A function that puts it round a run. Where nothing is needed it returns the very same run.
        """
        contexts: list[Callable[[], AbstractContextManager[Any] | None]] = [
            wrapper.forward_context for wrapper in self.wrappers
        ]
        if not self.carried:
            contexts.append(partial(self.precision.forward_context, device.type))
        needed = [make for make in contexts if make() is not None]
        policy = self.precision.policy
        convert_input, kept_in = _conversion(self.precision, "convert_input", policy.input_dtype)
        convert_output, kept_out = _conversion(self.precision, "convert_output", policy.output_dtype)
        if self.carried:
            convert_input = None
        if self.guard is not None:
            self.guard.watch_module(module)
        synchronized = None if self.sync is None else self.sync.watch(module, inner)

        def around(run: Run) -> Run:
            for make in reversed(needed[1:]):
                run = _within(make, run)
            outermost: Callable[[], Any] = needed[0] if needed else nullcontext
            if convert_input is not None or convert_output is not None:
                conversions = (convert_input or _as_it_is, kept_in, convert_output or _as_it_is, kept_out)
                run = _converted(outermost, run, *conversions)
            elif needed:
                run = _within(outermost, run)
            if synchronized is not None:
                run = synchronized.around(run)
            return run if self.guard is None else self.guard.around(run, module, device)

        return around


def _conversion(
    precision: Precision, name: str, dtype: torch.dtype | None
) -> tuple[Run | None, frozenset[torch.dtype]]:
    """Give a conversion, or ``None`` where there is none, and the types that it leaves alone for certain.

    The contract's own is taken apart: its type is looked up once, and most tensors are seen to need nothing.
    """
    bound: Run = getattr(precision, name)
    if getattr(bound, "__func__", None) is not getattr(Precision, name):
        return bound, frozenset()
    if dtype is None:
        return None, frozenset()
    return converter(dtype), _EXACT | {dtype}


_EXACT: Final = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
"""Types of numbers that no precision rounds."""


def _as_it_is(data: Any) -> Any:
    return data


def _within(make: Callable[[], Any], run: Run) -> Run:
    def in_context(*args: Any, **kwargs: Any) -> Any:
        with make():
            return run(*args, **kwargs)

    return in_context


def _converted(
    make: Callable[[], Any],
    run: Run,
    convert_input: Run,
    kept_in: frozenset[torch.dtype],
    convert_output: Run,
    kept_out: frozenset[torch.dtype],
) -> Run:
    plain = torch.Tensor

    def converted(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            args, kwargs = convert_input((args, kwargs))
        elif kept_in and len(args) == 1:
            # Looked at here, because a walk takes a microsecond to find that there is nothing to do.
            one = args[0]
            if one.__class__ is not plain or one.dtype not in kept_in:
                args = (convert_input(one),)
        else:
            for one in args:
                if one.__class__ is not plain or one.dtype not in kept_in:
                    args, kwargs = convert_input((args, kwargs))
                    break
        with make():
            result = run(*args, **kwargs)
        return result if result.__class__ is plain and result.dtype in kept_out else convert_output(result)

    return converted
