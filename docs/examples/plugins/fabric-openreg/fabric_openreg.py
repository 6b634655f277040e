"""The accelerator ``openreg``: a device type that PyTorch does not ship, and the core has never heard of."""

from collections.abc import Sequence

import torch

from fabric_core.contracts import Accelerator


class OpenRegAccelerator(Accelerator):
    """One device of the type ``openreg``, which another package of this distribution registers with PyTorch."""

    @property
    def device_type(self) -> str:
        """The type of its devices."""
        return "openreg"

    @property
    def process_group_backend(self) -> str:
        """What lies on the host travels by Gloo; the device has nothing of its own."""
        return "cpu:gloo"

    def is_available(self) -> bool:
        """Say whether PyTorch's one place for such a type is free, or this type's."""
        return torch._C._get_privateuse1_backend_name() in {"privateuseone", self.device_type}  # noqa: SLF001

    def device_count(self) -> int:
        """There is one, wherever there is any."""
        return int(self.is_available())

    def devices(self, indices: Sequence[int]) -> list[torch.device]:
        """Give devices, once the type is known to PyTorch."""
        import openreg_device

        return [torch.device(openreg_device.TYPE, index) for index in indices]

    def supports(self, dtype: torch.dtype) -> bool:
        """Say in which types the host computes."""
        return dtype in {torch.float64, torch.float32, torch.bfloat16, torch.float16}
