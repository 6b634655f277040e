"""What `cuda` says of the peaks of GPUs, by the names that the driver gives them."""

import pytest
import torch

from fabric_plugins.accelerators import CUDAAccelerator

HALF, SINGLE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", HALF, 312e12),
        ("NVIDIA H100 80GB HBM3", HALF, 989.4e12),
        ("NVIDIA H100 PCIe", HALF, 756e12),
        ("NVIDIA H100 NVL", HALF, 835.5e12),
        ("NVIDIA H100 NVL", SINGLE, None),
        ("NVIDIA H200", SINGLE, 67e12),
        ("NVIDIA GB200", HALF, 2500e12),
        ("NVIDIA B200", HALF, 2250e12),
        ("NVIDIA L4", HALF, 121e12),
        ("NVIDIA L40", HALF, 181e12),
        ("NVIDIA L40S", HALF, 362e12),
        ("NVIDIA A10", HALF, 125e12),
        ("NVIDIA A10G", HALF, None),
        ("Tesla V100-SXM2-32GB", torch.float16, 125e12),
        ("Tesla V100-SXM2-32GB", HALF, None),
        ("Tesla V100-PCIE-16GB", SINGLE, 14e12),
        ("Tesla T4", HALF, None),
        ("NVIDIA GeForce RTX 4090", HALF, 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", HALF, None),
        ("NVIDIA GeForce RTX 3090 Ti", HALF, None),
        ("AMD Instinct MI300X", torch.float16, 1307.4e12),
        ("NVIDIA A100-SXM4-80GB", torch.float64, None),
        ("NVIDIA H20", HALF, None),
    ],
)
def test_a_device_has_the_peak_of_its_data_sheet(
    name: str, dtype: torch.dtype, peak: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names that begin alike are not mixed up, and of what is not known nothing is said."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    found = CUDAAccelerator().peak_flops(torch.device("cuda", 0), dtype)
    assert found == (None if peak is None else pytest.approx(peak))
