"""How much a training does in a second, and how much of what the device could do that is."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["Throughput", "ThroughputMonitor", "measure_flops"]


class Throughput:
    """Computes rates over a window of the last updates.

    Args:
        available_flops: What one device can do, in floating-point operations a second.
        world_size: The number of devices; with one there are no global rates.
        window_size: Over how many updates rates are taken; until there are so many, there are none.
        separator: Stands between ``device`` and the name of a rate of one device.

    Raises:
        ValueError: ``world_size`` is less than 1, or ``window_size`` less than 2.
    """

    def __init__(
        self, available_flops: float | None = None, world_size: int = 1, window_size: int = 100, separator: str = "/"
    ) -> None:
        if world_size < 1 or window_size < 2:  # noqa: PLR2004 - a rate has a beginning and an end
            raise ValueError(
                f"world_size must be at least 1 and window_size at least 2: got {world_size} and {window_size}"
            )
        self.available_flops = available_flops
        self.world_size = world_size
        self.separator = separator
        self._window: dict[str, deque[float]] = {
            name: deque(maxlen=window_size) for name in ("time", "batches", "samples", "lengths", "flops")
        }

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: int | None = None
    ) -> None:
        """Take how far the training is; all but ``flops`` are totals since its beginning, on this device.

        Args:
            time: Seconds.
            batches: How many batches were trained on.
            samples: How many samples were trained on.
            lengths: How many items the samples had, such as tokens.
            flops: How many floating-point operations the last batch took on this device; see ``measure_flops``.

        Raises:
            ValueError: A total is less than before, or there are fewer samples than batches, or items than samples.
            RuntimeError: ``lengths`` were given at some updates only.
        """
        if samples < batches:
            raise ValueError(f"there must be as many samples as batches: got samples={samples}, batches={batches}")
        if lengths is not None and lengths < samples:
            raise ValueError(f"there must be as many items as samples: got lengths={lengths}, samples={samples}")
        totals: dict[str, float | None] = {"time": time, "batches": batches, "samples": samples, "lengths": lengths}
        for name, value in totals.items():
            window = self._window[name]
            if value is not None and window and value < window[-1]:
                raise ValueError(f"{name} counts from the beginning, so it can't fall from {window[-1]} to {value}")
        if lengths is not None and len(self._window["lengths"]) != len(self._window["samples"]):
            raise RuntimeError("lengths must be given at every update, or at none")
        for name, value in totals.items():
            if value is not None:
                self._window[name].append(value)
        if flops is not None:
            self._window["flops"].append(flops * self.world_size)

    def compute(self) -> dict[str, int | float]:
        """Give the totals, and once the window is full the rates: of a device, and of all where there are several."""
        window = self._window
        metrics: dict[str, int | float] = {name: window[name][-1] for name in ("time", "batches", "samples")}
        if window["lengths"]:
            metrics["lengths"] = window["lengths"][-1]
        seconds = window["time"][-1] - window["time"][0]
        for name, rate in (("batches", "batches"), ("samples", "samples"), ("lengths", "items")):
            if self._full(name) and seconds > 0:
                of_device = (window[name][-1] - window[name][0]) / seconds
                self._add(metrics, f"{rate}_per_sec", of_device, of_device * self.world_size)
        if self._full("flops") and seconds > 0:
            # The first of the window was done before its time began.
            of_all = (sum(window["flops"]) - window["flops"][0]) / seconds
            self._add(metrics, "flops_per_sec", of_all / self.world_size, of_all)
            if self.available_flops:
                metrics[f"device{self.separator}mfu"] = of_all / self.world_size / self.available_flops
        return metrics

    def _full(self, name: str) -> bool:
        return len(self._window[name]) == self._window[name].maxlen

    def _add(self, metrics: dict[str, int | float], name: str, of_device: float, of_all: float) -> None:
        metrics[f"device{self.separator}{name}"] = of_device
        if self.world_size > 1:
            metrics[name] = of_all

    def reset(self) -> None:
        """Begin anew."""
        for window in self._window.values():
            window.clear()


class ThroughputMonitor(Throughput):
    """Computes rates for a ``Fabric``, on rank 0, and logs them; on other ranks it does nothing.

    What the device can do comes from the accelerator's ``peak_flops``, for the type that the precision computes in.

    Args:
        fabric: The ``Fabric``, after ``launch``.
        kwargs: Further arguments of ``Throughput``.
    """

    def __init__(self, fabric: Any, **kwargs: Any) -> None:
        policy = fabric.precision.policy
        dtype = policy.compute_dtype or policy.param_dtype or torch.float32
        kwargs.setdefault("available_flops", fabric.accelerator.peak_flops(fabric.device, dtype))
        super().__init__(world_size=fabric.world_size, **kwargs)
        self._fabric = fabric
        self.step = -1

    def update(
        self, *, time: float, batches: int, samples: int, lengths: int | None = None, flops: int | None = None
    ) -> None:
        """Take how far the training is, as ``Throughput.update``."""
        if self._fabric.is_global_zero:
            super().update(time=time, batches=batches, samples=samples, lengths=lengths, flops=flops)

    def compute(self) -> dict[str, int | float]:
        """Give totals and rates, as ``Throughput.compute``; nothing on other ranks than the first."""
        return super().compute() if self._fabric.is_global_zero else {}

    def compute_and_log(self, step: int | None = None, **kwargs: Any) -> dict[str, int | float]:
        """Compute, and give the result to ``fabric.log_dict``.

        Args:
            step: The step to log under; by default the number of calls.
            kwargs: Further arguments of ``compute``.
        """
        if not self._fabric.is_global_zero:
            return {}
        self.step = self.step + 1 if step is None else step
        metrics = self.compute(**kwargs)
        self._fabric.log_dict(metrics, self.step)
        return metrics


def measure_flops(
    model: nn.Module,
    forward_fn: Callable[[], torch.Tensor],
    loss_fn: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> int:
    """Count the floating-point operations of a forward pass, and of the backward pass where there is a loss.

    They are counted by ``torch.utils.flop_counter``: matrix products, convolutions and attention. A model on the meta
    device is counted without being computed.

    Args:
        model: The model; its gradients are left as they are.
        forward_fn: Runs the forward pass, and gives its output.
        loss_fn: Makes a loss of the output; the backward pass is counted too.
    """
    from torch.utils.flop_counter import FlopCounterMode

    before = [parameter.grad for parameter in model.parameters()]
    counter = FlopCounterMode(display=False)
    try:
        with counter:
            output = forward_fn()
            if loss_fn is not None:
                for parameter in model.parameters():
                    parameter.grad = None
                loss_fn(output).backward()  # type: ignore[no-untyped-call]
    finally:
        for parameter, gradient in zip(model.parameters(), before, strict=True):
            parameter.grad = gradient
    return int(counter.get_total_flops())
