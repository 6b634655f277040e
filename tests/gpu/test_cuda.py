"""On a GPU: the accelerator, each strategy with NCCL at world size 1, and two ranks that share one GPU over gloo."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric
from fabric_core.conformance.pool import RankPool
from fabric_plugins.accelerators import CUDAAccelerator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 0, reason="needs a CUDA device, and this machine has none"),
]

TOLERANCES = {"32-true": 1e-5, "64-true": 1e-10, "bf16-mixed": 5e-2, "16-mixed": 5e-2, "bf16-true": 1e-1}


class SharedGPU(CUDAAccelerator):
    """Gives one GPU to every rank."""

    def parse_devices(self, spec: Any) -> list[int]:
        return list(range(int(spec)))

    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        return [torch.device("cuda", 0) for _ in indices]


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 4))


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(8, 16, generator=generator), torch.randn(8, 4, generator=generator)


def _train(accelerator: Any, strategy: str, devices: int, precision: str) -> list[float]:
    with Fabric(accelerator=accelerator, strategy=strategy, devices=devices, precision=precision) as fabric:
        fabric.launch()
        model = _model()
        wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        x, y = fabric.to_device(tuple(one[fabric.global_rank :: devices] for one in _data()))
        losses = []
        for _ in range(10):
            out = wrapped(x)
            assert out.device == fabric.device
            loss = nn.functional.mse_loss(out.float(), y)
            fabric.backward(loss)
            fabric.clip_gradients(wrapped, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(fabric.all_reduce(loss.detach()).item())
        return losses


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("strategy", ["single_device", "ddp", "fsdp", "fsdp_cpu_offload"])
def test_trains_as_on_the_cpu(strategy: str, precision: str) -> None:
    """Ten losses on one GPU are those of one process on the CPU in 32 bits, as far as the precision goes."""
    expected = _train("cpu", "single_device", 1, "32-true")
    got = _train("cuda", strategy, 1, precision)
    tolerance = max(TOLERANCES[precision], 1e-5)  # the reference has 32 bits
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("strategy", ["ddp:process_group_backend=gloo", "fsdp:process_group_backend=gloo"])
def test_two_ranks_share_a_gpu(strategy: str, two_ranks: RankPool) -> None:
    """Two ranks on halves of the batch, on one GPU over gloo, train as one process does."""
    expected = _train("cpu", "single_device", 1, "32-true")
    for losses in two_ranks.run(_train, SharedGPU(), strategy, 2, "32-true"):
        torch.testing.assert_close(losses, expected, rtol=0, atol=1e-4)


def test_the_accelerator() -> None:
    """It counts its memory, waits for its streams, and leaves the current device as it was."""
    accelerator = CUDAAccelerator()
    before = torch.cuda.current_device()
    (device,) = accelerator.devices([torch.cuda.device_count() - 1])
    accelerator.setup_device(device)
    assert torch.cuda.current_device() == device.index
    kept = torch.zeros(1 << 20, device=device)
    accelerator.synchronize(device)
    stats = accelerator.memory_stats(device)
    assert kept.nbytes <= stats["allocated"] <= stats["peak"] <= stats["total"]
    peak = accelerator.peak_flops(device, torch.bfloat16)
    assert peak is None or peak > 1e12
    accelerator.teardown()
    assert torch.cuda.current_device() == before


def test_the_next_batch_travels_while_this_one_is_computed_with(tmp_path: Path) -> None:
    """In a profile, most of the time that batches travel for is time in which another stream computes."""
    rows, width = 2048, 8192  # 64 MiB a batch
    with Fabric(accelerator="cuda", devices=1) as fabric:
        batches = DataLoader(TensorDataset(torch.randn(8 * rows, width)), batch_size=rows, pin_memory=True)
        loader = fabric.setup_dataloaders(batches)
        weight = torch.randn(width, width, device=fabric.device)
        for (x,) in loader:  # starts the libraries and the allocator
            x @ weight
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            for (x,) in loader:
                for _ in range(20):
                    x @ weight
            fabric.accelerator.synchronize(fabric.device)
    profiled.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    copies = [one for one in events if one.get("cat") == "gpu_memcpy" and "HtoD" in one["name"] and one["dur"] > 100]
    kernels = [one for one in events if one.get("cat") == "kernel"]
    assert len(copies) == 8
    (stream,) = {one["args"]["stream"] for one in copies}
    computing = [one for one in kernels if one["args"]["stream"] != stream]
    both = sum(
        max(0.0, min(a["ts"] + a["dur"], b["ts"] + b["dur"]) - max(a["ts"], b["ts"])) for a in copies for b in computing
    )
    assert both > sum(one["dur"] for one in copies) / 2  # the first has nothing to overlap with
