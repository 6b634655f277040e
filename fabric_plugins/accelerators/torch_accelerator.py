"""Any device type that PyTorch knows, through ``torch.accelerator``: XPU, MPS, and backends that others register."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from fabric_core.contracts import Accelerator, AcceleratorCapabilities, PluginOptions, Preset

__all__ = ["MPS", "XPU", "TorchAccelerator", "TorchAcceleratorOptions"]


class TorchAcceleratorOptions(PluginOptions):
    """The options of the accelerator ``torch``."""

    device_type: str | None = None
    """The device type; ``None`` is the one that this PyTorch is built or extended for."""
    process_group_backend: str | None = None
    """The process group's backend for these devices; ``None`` is the one that is registered for them."""


class TorchAccelerator(Accelerator):
    """The accelerator that ``torch.accelerator`` names, whatever its type."""

    Options = TorchAcceleratorOptions
    options: TorchAcceleratorOptions
    capabilities = AcceleratorCapabilities(start_methods=frozenset({"spawn", "forkserver"}))

    _before: int | None = None

    @property
    def device_type(self) -> str:
        """The option, or what PyTorch says; ``"cpu"`` where it has no accelerator."""
        current = torch.accelerator.current_accelerator()
        return self.options.device_type or ("cpu" if current is None else current.type)

    @property
    def process_group_backend(self) -> str:
        """What is registered for the devices, and gloo for the CPU."""
        own = self.options.process_group_backend
        if own is None:
            import torch.distributed as dist

            own = dist.Backend.default_device_backend_map.get(self.device_type)
        return "cpu:gloo" if own is None else f"cpu:gloo,{self.device_type}:{own}"

    def is_available(self) -> bool:
        """Whether there is such a device."""
        return self.device_count() > 0

    def device_count(self) -> int:
        """Count them; none where PyTorch's accelerator is of another type."""
        current = torch.accelerator.current_accelerator()
        if current is None or current.type != self.device_type:
            return 0
        return torch.accelerator.device_count()

    def is_started(self) -> bool:
        """What the device type's own module says; one that doesn't tell is taken not to be."""
        started = getattr(torch.get_device_module(self.device_type), "is_initialized", None)
        return self.device_count() > 0 and started is not None and bool(started())

    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        """Give the device of each index."""
        return [torch.device(self.device_type, index) for index in indices]

    def setup_device(self, device: torch.device) -> None:
        """Make it the current one."""
        self._before = torch.accelerator.current_device_index()
        torch.accelerator.set_device_index(device)

    def supports(self, dtype: torch.dtype) -> bool:
        """Assume the common types; Apple's GPUs have no float64."""
        return dtype in {torch.float32, torch.bfloat16, torch.float16} or (
            dtype == torch.float64 and self.device_type != "mps"
        )

    def synchronize(self, device: torch.device) -> None:
        """Wait for all streams of the device."""
        torch.accelerator.synchronize(device)

    def memory_stats(self, device: torch.device) -> Mapping[str, int]:
        """Give what PyTorch's allocator has handed out, now and at most, in bytes; nothing where it doesn't count."""
        try:
            return {
                "allocated": torch.accelerator.memory_allocated(device),
                "peak": torch.accelerator.max_memory_allocated(device),
            }
        except RuntimeError:
            return {}

    def teardown(self) -> None:
        """Make the device current that was."""
        if self._before is not None:
            torch.accelerator.set_device_index(self._before)
            self._before = None


MPS: Final = Preset.of(TorchAccelerator, device_type="mps")
"""The alias ``mps``: Apple's GPUs."""

XPU: Final = Preset.of(TorchAccelerator, device_type="xpu")
"""The alias ``xpu``: Intel's GPUs."""
