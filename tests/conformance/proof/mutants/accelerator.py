"""Wrong accelerators."""

from collections.abc import Mapping, Sequence
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch

from fabric_core.conformance.references import Host
from fabric_core.contracts import AcceleratorCapabilities, DeviceSpec
from fabric_core.errors import DeviceError
from proof.mutants import Mutants

MUTANTS = Mutants()
mutant = MUTANTS.mutant


@mutant("gives a number where it is asked whether it is available", "ACC-101")
class Numbered(Host):
    def is_available(self) -> bool:
        return 1  # type: ignore[return-value]


@mutant("makes a tensor to count devices", "ACC-102")
class Eager(Host):
    def device_count(self) -> int:
        return int(torch.ones(1).item())


@mutant("counts another number of devices each time", "ACC-103")
class Fickle(Host):
    counted = 0

    def device_count(self) -> int:
        self.counted += 1
        return self.counted


@mutant("is available without a device", "ACC-104", "ACC-109")
class Deviceless(Host):
    def device_count(self) -> int:
        return 0


@mutant(
    "raises what it likes for devices that it doesn't understand", "ACC-105", "ACC-106", "ACC-107", "ACC-108", "ACC-110"
)
class Blunt(Host):
    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        try:
            return super().parse_devices(spec)
        except DeviceError as error:
            raise KeyError(spec) from error


@mutant("gives the same device to every process", "ACC-106", "ACC-107", "ACC-111")
class Doubling(Host):
    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        return [0] * len(super().parse_devices(spec))


@mutant("counts devices from one", "ACC-107", "ACC-109", "ACC-111")
class Shifted(Host):
    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        return [index + 1 for index in super().parse_devices(spec)]


@mutant("doesn't read lists of indices from text", "ACC-108")
class Illiterate(Host):
    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        if isinstance(spec, str) and "," in spec:
            raise DeviceError("no text")
        return super().parse_devices(spec)


@mutant('means one more device than there is by "auto"', "ACC-108", "ACC-109")
class Generous(Host):
    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        return super().parse_devices(2 if spec in ("auto", -1) else spec)


@mutant("takes no devices for one", "ACC-110")
class Lenient(Host):
    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        return super().parse_devices(1 if spec in (0, "0") and spec is not False else spec)


@mutant("sorts indices", "ACC-111")
class Sorting(Host):
    def parse_devices(self, spec: DeviceSpec) -> list[int]:
        return sorted(super().parse_devices(spec))


@mutant("gives devices of another type", "ACC-112", "ACC-114", "ACC-119")
class Abstracted(Host):
    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        return [torch.device("meta") for _ in indices]


@mutant("gives a device where its type is asked", "ACC-112", "ACC-113")
class Indexed(Host):
    @property
    def device_type(self) -> str:
        return "cpu:0"


@mutant("can't wait for its device", "ACC-114", "ACC-116")
class Cold(Host):
    def synchronize(self, device: torch.device) -> None:
        raise RuntimeError("the device has gone")


@mutant("can't be torn down before it was set up", "ACC-115")
class Clinging(Host):
    ready = False

    def setup_device(self, device: torch.device) -> None:
        self.ready = True

    def teardown(self) -> None:
        if not self.ready:
            raise RuntimeError("not set up")


@mutant("can't be torn down twice", "ACC-116")
class Brittle(Host):
    torn = False

    def teardown(self) -> None:
        if self.torn:
            raise RuntimeError("torn down before")
        self.torn = True


@mutant("names a backend that there isn't", "ACC-117")
class Cutoff(Host):
    @property
    def process_group_backend(self) -> str:
        return "no-such-backend"


@mutant("says None for a type that it doesn't know", "ACC-118")
class Vague(Host):
    def supports(self, dtype: torch.dtype) -> bool:
        return super().supports(dtype) or None  # type: ignore[return-value]


@mutant("says that it supports every type", "ACC-119")
class Boasting(Host):
    def supports(self, dtype: torch.dtype) -> bool:
        return True


@mutant("says that it only supports 32 bits", "ACC-120")
class Modest(Host):
    def supports(self, dtype: torch.dtype) -> bool:
        return dtype == torch.float32


@mutant("gives memory in gigabytes", "ACC-121")
class Rounding(Host):
    def memory_stats(self, device: torch.device) -> Mapping[str, int]:
        return {"total": 1.5}  # type: ignore[dict-item]


@mutant("gives the peak of its first call for ever", "ACC-121")
class Still(Host):
    def memory_stats(self, device: torch.device) -> Mapping[str, int]:
        peak = self.__dict__.setdefault("first", getrusage(RUSAGE_SELF).ru_maxrss * 1024)
        return {**super().memory_stats(device), "peak": peak}


@mutant("has used more memory than there is", "ACC-121")
class Overfull(Host):
    def memory_stats(self, device: torch.device) -> Mapping[str, int]:
        return {"allocated": 5, "total": 1}


@mutant("says zero for a peak that it doesn't know", "ACC-122")
class Powerless(Host):
    def peak_flops(self, device: torch.device, dtype: torch.dtype) -> float | None:
        return 0.0


@mutant("sets the default type when its device is set up", "ACC-123")
class Meddling(Host):
    def setup_device(self, device: torch.device) -> None:
        torch.set_default_dtype(torch.float64)


@mutant("declares a start method that there isn't", "ACC-124")
class Fancy(Host):
    capabilities = AcceleratorCapabilities(start_methods=frozenset({"teleport"}))


@mutant("raises when its availability is asked", "ACC-101", "ACC-102", "ACC-104")
class Panicking(Host):
    def is_available(self) -> Any:
        raise RuntimeError("no driver")
