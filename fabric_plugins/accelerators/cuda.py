"""NVIDIA GPUs, and AMD GPUs where PyTorch is built for ROCm, which it names the same."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch

from fabric_core.contracts import Accelerator, AcceleratorCapabilities

__all__ = ["CUDAAccelerator"]

_TERA: Final = 1e12
_HALF: Final = (torch.bfloat16, torch.float16)

# Dense peaks in TFLOP/s from NVIDIA's and AMD's data sheets of each product, without sparsity, and for GeForce from the
# architectures' white papers (16 bits added up in 32): matrix units in 16 bits, and float32 outside of them. The first
# fragment that the device's name contains counts, so the longer names come first.
_PEAKS: Final[Mapping[str, tuple[float, float]]] = {
    "B200": (2250.0, 75.0),
    "GH200": (989.5, 67.0),
    "H200": (989.5, 67.0),
    "H100 NVL": (835.5, 60.0),
    "H100 PCIe": (756.5, 51.0),
    "H100": (989.5, 67.0),
    "H20": (148.0, 44.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "A10G": (70.0, 35.0),
    "A10": (125.0, 31.2),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 6000 Ada": (364.2, 91.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "MI300X": (1307.4, 163.4),
    "MI250X": (383.0, 47.9),
}
_NO_BFLOAT16: Final = ("V100", "T4")
"""Their matrix units compute in float16, and not in bfloat16."""


class CUDAAccelerator(Accelerator):
    """GPUs through ``torch.cuda``; processes talk over NCCL, and over gloo about what is on the CPU."""

    capabilities = AcceleratorCapabilities(start_methods=frozenset({"spawn", "forkserver"}))

    _before: int | None = None

    @property
    def device_type(self) -> str:
        """Always ``"cuda"``."""
        return "cuda"

    @property
    def process_group_backend(self) -> str:
        """NCCL, and gloo for the CPU."""
        return "cpu:gloo,cuda:nccl"

    def is_available(self) -> bool:
        """Whether there is a GPU."""
        return self.device_count() > 0

    def device_count(self) -> int:
        """Count the GPUs that ``CUDA_VISIBLE_DEVICES`` lets this process see; asks the driver's library alone."""
        return torch.cuda.device_count()

    def is_started(self) -> bool:
        """Whether this process has a CUDA context."""
        return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]

    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        """Give the GPU of each index."""
        return [torch.device("cuda", index) for index in indices]

    def setup_device(self, device: torch.device) -> None:
        """Make it the current one."""
        self._before = torch.cuda.current_device()
        torch.cuda.set_device(device)

    def supports(self, dtype: torch.dtype) -> bool:
        """Every GPU computes in these; one without units for bfloat16 does it slowly."""
        return dtype in {torch.float64, torch.float32, *_HALF}

    def synchronize(self, device: torch.device) -> None:
        """Wait for all streams of the device."""
        torch.cuda.synchronize(device)

    def memory_stats(self, device: torch.device) -> Mapping[str, int]:
        """Give what PyTorch's allocator has handed out, now and at most, and the device's total, in bytes."""
        return {
            "allocated": torch.cuda.memory_allocated(device),
            "peak": torch.cuda.max_memory_allocated(device),
            "total": torch.cuda.mem_get_info(device)[1],
        }

    def peak_flops(self, device: torch.device, dtype: torch.dtype) -> float | None:
        """Look the device up in the manufacturer's data sheets; float32 without tensor cores."""
        name = torch.cuda.get_device_name(device)
        half, single = next((peaks for part, peaks in _PEAKS.items() if part in name), (None, None))
        if half is None or single is None or (dtype == torch.bfloat16 and any(part in name for part in _NO_BFLOAT16)):
            return None
        return half * _TERA if dtype in _HALF else single * _TERA if dtype == torch.float32 else None

    def teardown(self) -> None:
        """Give unused memory back, and make the device current that was."""
        if self._before is not None:
            torch.cuda.empty_cache()
            torch.cuda.set_device(self._before)
            self._before = None
