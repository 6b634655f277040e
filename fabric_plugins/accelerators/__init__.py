"""Accelerators: kinds of hardware."""

from typing import TYPE_CHECKING

from fabric_core.lazy import lazy

if TYPE_CHECKING:
    from fabric_plugins.accelerators.cpu import CPUAccelerator
    from fabric_plugins.accelerators.cuda import CUDAAccelerator, find_usable_cuda_devices
    from fabric_plugins.accelerators.torch_accelerator import TorchAccelerator

__all__ = ["CPUAccelerator", "CUDAAccelerator", "TorchAccelerator", "find_usable_cuda_devices"]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "CPUAccelerator": "cpu",
        "CUDAAccelerator": "cuda",
        "TorchAccelerator": "torch_accelerator",
        "find_usable_cuda_devices": "cuda",
    },
)
