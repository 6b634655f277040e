"""How a user's words become devices, and that nothing outside an accelerator plugin knows a device type."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.utils.backend_registration

import fabric_core
import fabric_plugins
from fabric_core import Accelerator, Fabric
from fabric_core.errors import DeviceError, UnavailableError
from fabric_plugins.accelerators import CPUAccelerator, CUDAAccelerator, TorchAccelerator


class Standin(Accelerator):
    """Four devices of a type that no plugin in the tree knows."""

    device_type = "meta"
    process_group_backend = "gloo"

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 4

    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        return [torch.device("meta") for _ in indices]

    def supports(self, dtype: torch.dtype) -> bool:
        return True


@pytest.mark.parametrize(
    ("spec", "indices"),
    [
        ("auto", [0, 1, 2, 3]), (-1, [0, 1, 2, 3]), ("-1", [0, 1, 2, 3]), (2, [0, 1]), ("2", [0, 1]), ([0, 2], [0, 2]),
        ("0,2", [0, 2]), ("2, 0", [2, 0]), ([3], [3]), ("3,", [3]), ((1, 2), [1, 2]),
    ],
)  # fmt: skip
def test_words_for_devices(spec: Any, indices: list[int]) -> None:
    """A count takes the first ones, indices take those, and all are ``"auto"`` and -1."""
    assert Standin().parse_devices(spec) == indices


@pytest.mark.parametrize(
    "spec", [0, "0", -2, 5, "5", [], "", [0, 0], "1,1", [4], [-1, 0], "0,-1", "two", "0,two", None, True, [True], 1.5]
)
def test_devices_that_are_not_there(spec: Any) -> None:
    """Doubled, absent, negative, zero and senseless devices are errors that say what there is."""
    with pytest.raises(DeviceError, match="there are 4"):
        Standin().parse_devices(spec)


def test_the_cpu_has_as_many_devices_as_processes_are_asked_for() -> None:
    """Any count is fine on the CPU, and ``"auto"`` is one."""
    cpu = CPUAccelerator()
    assert cpu.parse_devices("auto") == [0]
    assert len(cpu.parse_devices(3)) == 3
    with pytest.raises(DeviceError):
        cpu.parse_devices(0)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize("name", ["cuda", "gpu", "mps", "xpu", "torch"])
def test_absent_hardware_says_so(name: str) -> None:
    """An accelerator whose devices are absent is no crash but an error that names what is there."""
    with pytest.raises(UnavailableError, match="can't be used on this machine"):
        Fabric(accelerator=name)


@pytest.mark.parametrize("accelerator", [CUDAAccelerator(), TorchAccelerator(), TorchAccelerator(device_type="xpu")])
def test_asking_starts_no_device(accelerator: Accelerator) -> None:
    """What may be asked on any machine answers on this one, and no device is started."""
    before = torch.cuda.is_initialized()  # another test may have used one
    accelerator.is_available()
    assert accelerator.device_count() >= 0
    for indices in ([1], [0, 2]):
        assert accelerator.devices(indices) == [torch.device(accelerator.device_type, index) for index in indices]
    assert "gloo" in accelerator.process_group_backend
    assert accelerator.supports(torch.float32)
    accelerator.teardown()
    assert torch.cuda.is_initialized() == before


@pytest.mark.parametrize(
    ("accelerator", "module", "current", "choose"),
    [
        (CUDAAccelerator(), torch.cuda, "current_device", "set_device"),
        (TorchAccelerator(device_type="xpu"), torch.accelerator, "current_device_index", "set_device_index"),
    ],
    ids=["cuda", "torch"],
)
def test_what_is_asked_of_a_device(
    accelerator: Accelerator, module: Any, current: str, choose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many there are, each time anew; to make one current, to wait for it, what its memory has; the one before."""
    now: list[Any] = [2]
    asked: list[tuple[str, torch.device]] = []

    def answers(name: str, answer: Any) -> None:
        def ask(device: torch.device) -> Any:
            asked.append((name, device))
            return answer

        monkeypatch.setattr(module, name, ask)

    monkeypatch.setattr(module, current, lambda: now[-1])
    monkeypatch.setattr(module, choose, now.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for name, answer in {"synchronize": None, "memory_allocated": 10, "max_memory_allocated": 20}.items():
        answers(name, answer)
    total = {"total": 30} if module is torch.cuda else {}
    if total:
        answers("mem_get_info", (5, 30))
    device = torch.device(accelerator.device_type, 3)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(device.type))
    for count in (2, 0, 4):
        monkeypatch.setattr(module, "device_count", lambda count=count: count)
        assert accelerator.device_count() == count
        assert accelerator.is_available() == (count > 0)
    accelerator.setup_device(device)
    assert now == [2, device]
    accelerator.synchronize(device)
    assert asked == [("synchronize", device)]
    assert accelerator.memory_stats(device) == {"allocated": 10, "peak": 20, **total}
    assert {one for _, one in asked} == {device}
    accelerator.teardown()
    assert now == [2, device, 2]


def test_training_on_a_device_type_that_nobody_knows() -> None:
    """On a stand-in device type, each precision trains as on the CPU, and no tensor is anywhere else."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this PyTorch takes no backend that is written in Python")
    precisions = ["32-true", "64-true", "bf16-true"]
    result = subprocess.run(
        [sys.executable, "-W", "error", Path(__file__).with_name("standin.py"), *precisions],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [f"{name} trains on standin" for name in precisions]


def test_only_accelerators_name_device_types() -> None:
    """No line outside the accelerator plugins and the conformance kit names a device type or its backend."""
    words = re.compile(r"[\"'.](cuda|nccl|xpu|xccl|mps|hpu|npu)\b")
    found = [
        f"{path}: {line.strip()}"
        for package in (fabric_core, fabric_plugins)
        for path in Path(next(iter(package.__path__))).rglob("*.py")
        if not {"accelerators", "conformance"} & set(path.parts)
        for line in path.read_text().splitlines()
        if words.search(line)
    ]
    assert found == []
