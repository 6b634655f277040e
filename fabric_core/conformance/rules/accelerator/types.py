"""Rules for accelerators: in which types they compute, and how fast."""

from typing import Final

import torch

from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Level, Table

TABLE: Final = Table("accelerator")

_FLOATS: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@TABLE.rule(
    "ACC-118",
    "`supports` gives a bool for every type, and True for float32.",
    reason="The plan asks it before a precision is chosen.",
    advice="return dtype in {...}",
)
def _supports(bench: Bench) -> None:
    plugin = bench.plugin()
    for dtype in (*_FLOATS, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn):
        if not isinstance(plugin.supports(dtype), bool):
            raise Broken(f"supports({dtype}) gives {plugin.supports(dtype)!r}")
    if not plugin.supports(torch.float32):
        raise Broken("it doesn't support float32")


def _multiply(place: Place, dtypes: list[torch.dtype]) -> list[str]:
    """Say which types the device can't multiply in."""
    plugin = place.plugin()
    device = plugin.devices(plugin.parse_devices(1))[0]
    plugin.setup_device(device)
    faults = []
    for dtype in dtypes:
        try:
            x = torch.full((2, 2), 2, device=device, dtype=dtype)
            right = bool(((x @ x).to(torch.complex64) == 8).all())
        except (RuntimeError, TypeError):
            right = False
        if not right:
            faults.append(str(dtype))
    plugin.teardown()
    return faults


@TABLE.rule(
    "ACC-119",
    "It computes in every type that it says it supports.",
    reason="A precision that the plan let through must not fail in the first step.",
    advice="take the types out of supports",
    needs=("available",),
)
def _supported_works(bench: Bench) -> None:
    plugin = bench.plugin()
    every = (*_FLOATS, torch.int64, torch.float8_e4m3fn, torch.complex64, torch.bool)
    faults = bench.run(_multiply, [dtype for dtype in every if plugin.supports(dtype)])[0]
    if faults:
        raise Broken(f"it says that it supports {', '.join(faults)}, and can't multiply in it")


@TABLE.rule(
    "ACC-120",
    "It supports every floating-point type of 16 bits and more in which it computes.",
    reason="What is refused for nothing is a precision that users can't have.",
    advice="add the types to supports",
    level=Level.SHOULD,
    needs=("available",),
)
def _unsupported_fails(bench: Bench) -> None:
    plugin = bench.plugin()
    refused = [dtype for dtype in _FLOATS if not plugin.supports(dtype)]
    works = set(map(str, refused)) - set(bench.run(_multiply, refused)[0])
    if works:
        raise Broken(f"it computes in {', '.join(sorted(works))}, and says that it doesn't")


def _peaks(place: Place) -> dict[str, float | None]:
    plugin = place.plugin()
    device = plugin.devices(plugin.parse_devices(1))[0]
    plugin.setup_device(device)
    peaks = {str(dtype): plugin.peak_flops(device, dtype) for dtype in (*_FLOATS, torch.int64)}
    plugin.teardown()
    return peaks


@TABLE.rule(
    "ACC-122",
    "`peak_flops` gives a positive number or None, for every type.",
    reason="It is what a measured throughput is divided by.",
    advice="give FLOP/s as a float, and None for a device or type that isn't known",
    needs=("available",),
)
def _flops(bench: Bench) -> None:
    peaks = bench.run(_peaks)[0]
    wrong = {name: peak for name, peak in peaks.items() if peak is not None and not (peak > 0 and peak < float("inf"))}
    if wrong:
        raise Broken(f"it gives {wrong!r}")
