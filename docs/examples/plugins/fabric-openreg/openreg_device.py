# ruff: noqa: SLF001 - PyTorch has no public way yet
"""A device type that PyTorch does not ship, ``openreg``, without C++: its memory is the host's, and the host computes.

Importing it registers the type, as a vendor's package does. It takes PyTorch's one free place for such a type,
``PrivateUse1``, by the experimental way for devices in Python, so that it is for learning and for tests.
"""

import weakref
from typing import Any, Final

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

__all__ = ["TYPE"]

TYPE: Final = "openreg"

_MEMORY: Final[dict[int, torch.Tensor]] = {}
"""What lies in the device's memory, by the storage that stands for it."""


class _Module:
    """What ``torch.openreg`` offers."""

    is_available = staticmethod(lambda: True)
    is_initialized = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    synchronize = staticmethod(lambda _=None: None)
    manual_seed_all = staticmethod(lambda _: None)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


def _on_device(memory: torch.Tensor) -> torch.Tensor:
    made: torch.Tensor = torch._C._acc.create_empty_tensor(tuple(memory.shape), memory.dtype)
    storage = made.untyped_storage()
    _MEMORY[storage._cdata] = memory
    weakref.finalize(storage, _MEMORY.pop, storage._cdata, None)
    return made


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    return _MEMORY[tensor.untyped_storage()._cdata] if tensor.device.type == TYPE else tensor


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """Run any operator on the memory; what it changed in place is the tensor that was given."""
    given: dict[int, torch.Tensor] = {}

    def inside(tensor: torch.Tensor) -> torch.Tensor:
        memory = _memory(tensor)
        given[id(memory)] = tensor
        return memory

    args, kwargs = tree_map_only(torch.Tensor, inside, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    results = operator(*args, **kwargs)

    def outside(memory: torch.Tensor) -> torch.Tensor:
        tensor = given.get(id(memory))
        if (
            tensor is not None and tensor.shape != memory.shape
        ):  # an `out` that the operator made as large as it must be
            tensor.data = _on_device(memory)
        return _on_device(memory) if tensor is None else tensor

    return tree_map_only(torch.Tensor, outside, results)


def _copy(source: torch.Tensor, target: torch.Tensor, _: bool = False) -> torch.Tensor:
    _memory(target).copy_(_memory(source))
    return target


def _empty(size: Any, **how: Any) -> torch.Tensor:
    return _on_device(torch.empty(size, dtype=how.get("dtype")))


def _empty_strided(size: Any, stride: Any, **how: Any) -> torch.Tensor:
    return _on_device(torch.empty_strided(size, stride, dtype=how.get("dtype")))


_setup_privateuseone_for_python_backend(TYPE, _Module())
_EVERY = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
_EVERY.fallback(_run, "PrivateUse1")  # type: ignore[no-untyped-call]
_SOME = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
for _name, _function in (("_copy_from", _copy), ("empty.memory_format", _empty), ("empty_strided", _empty_strided)):
    _SOME.impl(_name, _function, "PrivateUse1")  # type: ignore[no-untyped-call]
