"""NVIDIA GPUs, and AMD GPUs where PyTorch is built for ROCm, which it names the same."""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Final

import torch

from fabric_core.contracts import Accelerator, AcceleratorCapabilities

__all__ = ["CUDAAccelerator", "find_usable_cuda_devices"]

_TERA: Final = 1e12
_HALF: Final = (torch.bfloat16, torch.float16)

# Peaks in TFLOP/s without sparsity: of the matrix units in 16 bits, added up in 32, and of float32 outside of them;
# `None` where the sheet was not at hand. What a sheet gives with sparsity is halved here. The pattern is looked for in
# what the driver calls the device; the first that is found counts. The vendors' pages are named above their rows; the
# numbers were taken from copies of them and compared with other projects' tables.
_PEAKS: Final[Mapping[str, tuple[float, float | None]]] = {
    # https://nvdam.widen.net/s/wwnsxrhm2w/blackwell-datasheet-3384703
    r"\bGB200\b": (2500.0, 80.0),
    r"\bB200\b": (2250.0, 75.0),
    # https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446
    r"\bH200 NVL\b": (835.5, 60.0),
    r"\bH200\b": (989.5, 67.0),
    # https://www.nvidia.com/en-us/data-center/h100/
    r"\bH100 NVL\b": (835.5, None),
    r"\bH100 PCIe\b": (756.0, 51.2),
    r"\bH100\b": (989.4, 66.9),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf
    r"\bA100\b": (312.0, 19.5),
    # https://resources.nvidia.com/en-us-l40s/l40s-datasheet-28413
    r"\bL40S\b": (362.0, 91.6),
    # https://images.nvidia.com/aem-dam/Solutions/Data-Center/l4/nvidia-ada-gpu-architecture-whitepaper-v2.1.pdf
    r"\bL40\b": (181.0, 90.5),
    r"\bL4\b": (121.0, 30.3),
    r"\bRTX 4090$": (165.2, 82.6),
    # https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf
    r"\bRTX 3090$": (71.0, 35.6),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf
    r"\bA10\b": (125.0, 31.2),
    # https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
    r"\bV100-SXM2\b": (125.0, 15.7),
    r"\bV100-PCIE\b": (112.0, 14.0),
    # https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf
    r"\bT4\b": (65.0, 8.1),
    # https://www.amd.com/en/products/accelerators/instinct/mi300/mi300x.html
    r"\bMI300X\b": (1307.4, None),
    # https://www.amd.com/en/products/accelerators/instinct/mi200/mi250x.html: of one of its two dies, each a device
    r"\bMI250X\b": (191.5, 23.9),
}
_NO_BFLOAT16: Final = re.compile(r"\b(V100|T4)\b")
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
        half, single = next((peaks for part, peaks in _PEAKS.items() if re.search(part, name)), (None, None))
        if dtype == torch.bfloat16 and _NO_BFLOAT16.search(name):
            half = None
        peak = half if dtype in _HALF else single if dtype == torch.float32 else None
        return None if peak is None else peak * _TERA

    def teardown(self) -> None:
        """Give unused memory back, and make the device current that was."""
        if self._before is not None:
            torch.cuda.empty_cache()
            torch.cuda.set_device(self._before)
            self._before = None


def find_usable_cuda_devices(num_devices: int = -1) -> list[int]:
    """Find GPUs that this process can use: those in a mode for one process may be taken by another.

    Args:
        num_devices: How many; -1 is all.

    Returns:
        Their indices.

    Raises:
        ValueError: There are not so many.
        RuntimeError: So many can't be used.
    """
    if num_devices > torch.cuda.device_count():
        raise ValueError(f"{num_devices} GPUs were asked for, and this machine has {torch.cuda.device_count()}")
    found: list[int] = []
    for index in range(torch.cuda.device_count()):
        if len(found) == num_devices:
            break
        with suppress(RuntimeError):
            torch.tensor(0.0, device=torch.device("cuda", index))
            found.append(index)
    if len(found) < num_devices:
        raise RuntimeError(f"{num_devices} GPUs were asked for, and those that can be used are {found}")
    return found
