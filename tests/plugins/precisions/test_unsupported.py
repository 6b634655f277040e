"""A precision that can't work here is refused when the `Fabric` is made, with what would work."""

from collections.abc import Iterator

import pytest
import torch

from fabric_core import Fabric
from fabric_core.choosing.registry import registered
from fabric_core.errors import PlanError
from fabric_plugins.accelerators import CPUAccelerator
from fabric_plugins.strategies import SingleDeviceStrategy


class OldAccelerator(CPUAccelerator):
    """Hardware that computes in 32 bits and in bfloat16."""

    def supports(self, dtype: torch.dtype) -> bool:
        """Two types."""
        return dtype in {torch.float32, torch.bfloat16}


class UnscaledStrategy(SingleDeviceStrategy):
    """A strategy whose engine has no place for loss scaling."""

    capabilities = SingleDeviceStrategy.capabilities.model_copy(update={"loss_scaling": False})


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    with registered("accelerator", "old", OldAccelerator), registered("strategy", "unscaled", UnscaledStrategy):
        yield


@pytest.mark.parametrize("precision", ["16-mixed", "16-true", "64-true"])
def test_hardware_without_the_type_is_an_error_with_alternatives(precision: str) -> None:
    """The error names the type, and a precision that this hardware has; bfloat16 is not taken instead."""
    with pytest.raises(PlanError, match=r"computes in torch\.float(16|64), which .* doesn't support") as caught:
        Fabric(accelerator="old", devices=1, strategy="single_device", precision=precision)
    assert 'precision="32-true"' in str(caught.value)


def test_hardware_with_the_type_is_no_error() -> None:
    """What it has, it takes."""
    for precision in ("32-true", "bf16-mixed", "bf16-true"):
        Fabric(accelerator="old", devices=1, strategy="single_device", precision=precision)


def test_a_strategy_without_loss_scaling_is_an_error_with_alternatives() -> None:
    """The error names both, a strategy that would do, and a precision that would."""
    with pytest.raises(PlanError, match="scales the loss, which the strategy unscaled declares not to") as caught:
        Fabric(accelerator="cpu", devices=1, strategy="unscaled", precision="16-mixed")
    assert 'strategy="single_device"' in str(caught.value)
    assert 'precision="32-true"' in str(caught.value)
