"""The CPU."""

import os
from collections.abc import Mapping, Sequence

import torch

from fabric_core.contracts import (
    Accelerator,
    DeviceSpec,
    parse_device_indices,
)

__all__ = ["CPUAccelerator"]


class CPUAccelerator(Accelerator):
    """The CPU: as many "devices" as one asks for, each a process of its own on the same hardware."""

    @property
    def device_type(self) -> str:
        """Always ``"cpu"``."""
        return "cpu"

    @property
    def process_group_backend(self) -> str:
        """Always ``"gloo"``."""
        return "gloo"

    def is_available(self) -> bool:
        """There is always a CPU."""
        return True

    def device_count(self) -> int:
        """One: a process uses all cores, so that is what ``"auto"`` means."""
        return 1

    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        """Take a number of processes; indices only number them."""
        return parse_device_indices(spec, 1, where="devices of the accelerator cpu", unbounded=True)

    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        """Give the CPU, once for each process."""
        return [torch.device("cpu") for _ in indices]

    def supports(self, dtype: torch.dtype) -> bool:
        """Every type that PyTorch computes in works on the CPU, if slowly."""
        return dtype in {torch.float64, torch.float32, torch.bfloat16, torch.float16}

    def memory_stats(self, device: torch.device) -> Mapping[str, int]:
        """Give this process's peak resident memory and the machine's total, in bytes."""
        import resource

        return {
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        }
