"""Mixed precision: parameters in 32 bits, matrix work in 16.

[Note: outstanding gradients] A gradient is outstanding from the backward pass that adds to it until its optimizer
steps. The law that makes every order of calls right: whenever a loss is scaled, every outstanding gradient is, or is
brought, at the scale of that loss. So gradients accumulate over several backward passes although they were looked at,
or another optimizer ended an iteration, in between. The factors are powers of two by default, so nothing is rounded.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Final
from weakref import WeakKeyDictionary

import torch
from pydantic import Field
from torch.amp import GradScaler
from torch.optim import Optimizer

from fabric_core.contracts import Collectives, PluginOptions, Precision, PrecisionPolicy, Preset
from fabric_core.errors import MisuseError
from fabric_plugins._torch import (
    LocalGradScaler,
    found_inf,
    growth_tracker,
    iterations_since_change,
    local_gradients,
    loss_scale,
    set_found_inf,
)

__all__ = [
    "BFLOAT16_ALIAS",
    "FLOAT16_ALIAS",
    "BFloat16MixedPrecision",
    "Float16MixedOptions",
    "Float16MixedPrecision",
    "MixedOptions",
    "MixedPrecision",
]


class MixedOptions(PluginOptions):
    """The options of mixed precisions."""

    cast_inputs: bool = True
    """Convert floating-point inputs to the type that is computed in; otherwise they are left to autocast."""


class _MixedPrecision(Precision):
    """Parameters in 32 bits, matrix work in 16 through autocast, outputs in 32 bits."""

    Options = MixedOptions
    options: MixedOptions
    dtype: ClassVar[torch.dtype]
    loss_scaling: ClassVar[bool]

    @property
    def policy(self) -> PrecisionPolicy:
        """Autocast; gradients are reduced in 32 bits, outputs come back in 32 bits."""
        return PrecisionPolicy(
            compute_dtype=self.dtype,
            reduce_dtype=torch.float32,
            input_dtype=self.dtype if self.options.cast_inputs else None,
            output_dtype=torch.float32,
            autocast=True,
            loss_scaling=self.loss_scaling,
        )

    def forward_context(self, device_type: str) -> AbstractContextManager[Any] | None:
        """Autocast."""
        return torch.autocast(device_type, self.dtype)


class BFloat16MixedPrecision(_MixedPrecision):
    """Parameters in 32 bits, matrix work in bfloat16; the loss needs no scaling."""

    dtype = torch.bfloat16
    loss_scaling = False


class Float16MixedOptions(MixedOptions):
    """The options of ``16-mixed``; the scaling's are ``torch.amp.GradScaler``'s under their own names."""

    init_scale: float = Field(default=2.0**16, gt=0)
    """The scale at the start."""
    growth_factor: float = Field(default=2.0, gt=1)
    """What the scale is multiplied by after ``growth_interval`` iterations without an overflow."""
    backoff_factor: float = Field(default=0.5, gt=0, lt=1)
    """What the scale is multiplied by after an iteration with an overflow."""
    growth_interval: int = Field(default=2000, ge=1)
    """How many iterations without an overflow let the scale grow."""


_OVERFLOW: Final = 1.0
_NO_GRADIENTS: Final = -1.0
"""What a rank found in its gradients, beside 0 for finite ones; over the ranks, the largest counts."""


class Float16MixedPrecision(_MixedPrecision):
    """Parameters in 32 bits, matrix work in float16, with dynamic loss scaling by ``torch.amp.GradScaler``.

    An iteration is one or more calls of ``fabric.backward`` and the steps of optimizers that follow. The next
    ``fabric.backward``, or asking for the state, ends it: the scale is updated once, however many optimizers stepped.
    An overflow on one rank skips the step on all. What holds in between tells [Note: outstanding gradients].
    """

    Options = Float16MixedOptions
    options: Float16MixedOptions
    dtype = torch.float16
    loss_scaling = True

    def __init__(self, options: PluginOptions | None = None, /, **given: Any) -> None:
        super().__init__(options, **given)
        # Whatever device it is told here, it keeps its numbers where the first loss is.
        scaling = {"init_scale", "growth_factor", "backoff_factor", "growth_interval"}
        self._scaler = _Scaler("cpu", **self.options.model_dump(include=scaling))
        self._collectives: Collectives | None = None
        self._losses = 0
        """How many losses were scaled."""
        self._states: WeakKeyDictionary[Optimizer, _OptimizerState] = WeakKeyDictionary()
        self._unscaled = False
        """Whether outstanding gradients may have their true size."""
        self._overflowed: bool | None = None
        """Whether a step of this iteration was skipped; ``None`` before the first step with gradients."""

    def connect(self, collectives: Collectives) -> None:
        """Keep the collectives, to agree on whether a step overflowed."""
        self._collectives = collectives

    def setup_optimizer(self, optimizer: Optimizer) -> None:
        """Know it before its first step, because its gradients may be outstanding by then."""
        self._state_of(optimizer)

    def _state_of(self, optimizer: Optimizer) -> "_OptimizerState":
        """Give the loss-scaling state of an optimizer."""
        state = self._states.get(optimizer)
        if state is None:
            state = self._states[optimizer] = _OptimizerState()
        return state

    def scale_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """End the iteration whose steps were taken, and scale the loss."""
        if self._overflowed is not None:
            self._end_iteration()
        elif self._unscaled:
            self._rescale(None)
        self._losses += 1
        return self._scaler.scale(loss)

    def unscale_gradients(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, once, and look for an overflow."""
        self._unscale(optimizer, self._state_of(optimizer))

    def _unscale(self, optimizer: Optimizer, state: "_OptimizerState") -> None:
        if state.unscaled or state.losses == self._losses:
            return
        found = self._scaler.unscale_and_check(optimizer)
        state.found = found if state.found is None else torch.maximum(found, state.found)
        state.unscaled = self._unscaled = True

    def optimizer_step(
        self,
        optimizer: Optimizer,
        step: Callable[[Callable[[], Any] | None], Any],
        closure: Callable[[], Any] | None,
    ) -> Any:
        """Step, unless a gradient overflowed on any rank.

        A closure is evaluated before the step, which begins with what that gave. An optimizer that evaluates it again
        and again within a step is given unscaled gradients each time.

        Raises:
            MisuseError: The gradients come from no scaled loss, or overflowed in a later evaluation of the closure.
        """
        if closure is None:
            return step(None) if self._may_step(optimizer) else None
        evaluate = closure
        with torch.enable_grad():
            first = [evaluate()]
        if not self._may_step(optimizer):
            return None

        def evaluated() -> Any:
            if first:
                return first.pop()
            loss = evaluate()
            if not self._may_step(optimizer):
                raise MisuseError(
                    "gradients overflowed after the optimizer had begun its step",
                    where=f"the closure of {type(optimizer).__name__}.step",
                    got=f"the loss scale {self._scaler.get_scale()}",
                    instead="a precision without loss scaling, or a smaller init_scale",
                )
            self._overflowed = None
            return loss

        # Further evaluations belong to this iteration: as long as no step counts as taken, none ends it.
        self._overflowed = None
        try:
            return step(evaluated)
        finally:
            self._overflowed = bool(self._overflowed)

    def state_dict(self) -> dict[str, Any]:
        """End the iteration, and give the state in the form of ``torch.amp.GradScaler.state_dict``."""
        if self._overflowed is not None:
            self._end_iteration()
        return self._scaler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the scale, and how long it has been growing; factors and interval are this object's own options."""
        own = self.options.model_dump(include={"growth_factor", "backoff_factor", "growth_interval"})
        self._rescale(lambda: self._scaler.load_state_dict({**state, **own}))
        self._overflowed = None

    def _may_step(self, optimizer: Optimizer) -> bool:
        """Say whether no gradient overflowed, on any rank; count the step as taken."""
        state = self._state_of(optimizer)
        self._unscale(optimizer, state)
        if state.losses == self._losses:
            if next(local_gradients(optimizer), None) is not None:
                raise MisuseError(
                    "the gradients don't come from a scaled loss, or the optimizer has stepped on them before",
                    where=f"{type(optimizer).__name__}.step",
                    instead="fabric.backward(loss) before each step, in the place of loss.backward()",
                )
            return True
        found = state.found
        if found is None:
            raise AssertionError("gradients were unscaled, and nobody looked at them")
        if self._collectives is not None and self._collectives.world_size > 1:
            found = self._collectives.all_reduce(found, None, "max")
        verdict = found.item()
        state.losses, state.unscaled, state.found = self._losses, False, None
        if verdict != _NO_GRADIENTS:
            self._overflowed = bool(self._overflowed) or verdict >= _OVERFLOW
        return verdict < _OVERFLOW

    def _end_iteration(self) -> None:
        overflowed = bool(self._overflowed)
        self._overflowed = None
        if not overflowed and self._scaler.skips_update():
            if self._unscaled:
                self._rescale(None)
            return
        self._rescale(lambda: self._scaler.update_scale(overflowed=overflowed))

    def _rescale(self, change: Callable[[], None] | None) -> None:
        """Change the scale, and rescale outstanding gradients to the new one ([Note: outstanding gradients]).

        Args:
            change: Changes it; ``None`` leaves it.
        """
        outstanding = []
        for optimizer, state in self._states.items():
            if state.losses != self._losses:
                gradients = list(local_gradients(optimizer))
                if gradients:
                    outstanding.append((state, gradients))
                else:
                    state.unscaled, state.found = False, None
        before = self._scaler.current_scale() if outstanding else None
        if change is not None:
            change()
        after = self._scaler.current_scale() if outstanding else None
        if before is not None and after is not None:
            for state, gradients in outstanding:
                factor = after if state.unscaled else after / before
                for gradient in gradients:
                    gradient.mul_(factor.to(gradient.device))
                state.unscaled = False
        self._unscaled = False


def MixedPrecision(  # noqa: N802 - as in Lightning Fabric
    precision: str,
    device: str,  # noqa: ARG001 - the accelerator's counts
    scaler: GradScaler | None = None,
) -> BFloat16MixedPrecision | Float16MixedPrecision:
    """Make a mixed precision by its name, ``"16-mixed"`` or ``"bf16-mixed"``.

    Args:
        precision: The name.
        device: A device type, which nothing depends on.
        scaler: A ``torch.amp.GradScaler``, whose scale and factors are taken; for ``"16-mixed"``.

    Raises:
        ValueError: It has another name, or a scaler that it doesn't need.
    """
    if precision == "16-mixed":
        return Float16MixedPrecision() if scaler is None else Float16MixedPrecision(
            init_scale=scaler.get_scale(), growth_factor=scaler.get_growth_factor(),
            backoff_factor=scaler.get_backoff_factor(), growth_interval=scaler.get_growth_interval(),
        )  # fmt: skip
    if precision != "bf16-mixed" or scaler is not None:
        raise ValueError(
            f"MixedPrecision takes 16-mixed, or bf16-mixed without a scaler, and got {precision!r}, {scaler}"
        )
    return BFloat16MixedPrecision()


@dataclass
class _OptimizerState:
    """The loss-scaling state of an optimizer.

    Args:
        losses: How many losses were scaled when it last stepped; its gradients are outstanding while there are more.
        unscaled: Its outstanding gradients have their true size.
        found: What was found in them on this rank, since its last step; clipping by value may have hidden it by now.
    """

    losses: int = 0
    unscaled: bool = False
    found: torch.Tensor | None = None


class _Scaler(LocalGradScaler):
    """PyTorch's scaler; it looks at a rank's own part of each gradient, whatever mesh the whole is spread over.

    Most updates only count an iteration without an overflow. Those are counted here, and told to PyTorch's tensors when
    somebody looks at them or the scale changes.
    """

    _uncounted = 0
    _before_growth: int | None = None
    """After how many more iterations without an overflow the scale grows; ``None`` is to be looked up."""

    def unscale_and_check(self, optimizer: Optimizer) -> torch.Tensor:
        """Divide the gradients by the scale, and give what was found in them, as a scalar."""
        set_found_inf(self, None)
        self.unscale_(optimizer)
        scale = self._scale_tensor()
        # Where the scale is, whatever this rank's gradients are: the ranks must agree on the device to compare.
        found: list[torch.Tensor] = [one.to(scale.device) for one in found_inf(self, optimizer)]
        return found[0] if len(found) == 1 else torch.stack([torch.full_like(scale, _NO_GRADIENTS), *found]).amax()

    def skips_update(self) -> bool:
        """Count an iteration without an overflow, where that is all that an update would do."""
        if self._before_growth is None:
            self._before_growth = self.get_growth_interval() - iterations_since_change(self)
        if self._before_growth <= 1:
            return False
        self._before_growth -= 1
        self._uncounted += 1
        return True

    def update_scale(self, *, overflowed: bool) -> None:
        """Update the scale after an iteration."""
        self._count()
        scale = self._scale_tensor()
        set_found_inf(self, torch.full_like(scale, float(overflowed)))
        self.update()
        self._before_growth = None

    def state_dict(self) -> dict[str, Any]:
        """As PyTorch's, with every iteration counted."""
        self._count()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As PyTorch's."""
        self._uncounted, self._before_growth = 0, None
        super().load_state_dict(state_dict)

    def _count(self) -> None:
        if self._uncounted:
            tracker = growth_tracker(self)
            if tracker is not None:
                tracker.add_(self._uncounted)
            self._uncounted = 0

    def current_scale(self) -> torch.Tensor | None:
        """Give the scale as a scalar of its own; ``None`` before the first loss."""
        scale = loss_scale(self)
        return None if scale is None else scale.clone()

    def _scale_tensor(self) -> torch.Tensor:
        scale = loss_scale(self)
        if scale is None:
            raise AssertionError("no loss was scaled yet")
        return scale


BFLOAT16_ALIAS: Final = Preset.of(BFloat16MixedPrecision)
"""What the name ``bf16`` means."""

FLOAT16_ALIAS: Final = Preset.of(Float16MixedPrecision)
"""What the name ``16`` means."""
