"""Modules that went through ``torch.compile``."""

import sys
from typing import Any, cast

from torch import nn

__all__ = ["compile_again", "uncompiled"]


def _optimized_module() -> type[nn.Module] | None:
    """Give the class of compiled modules; where the compiler is not even imported, there is none of them."""
    dynamo = sys.modules.get("torch._dynamo")
    return None if dynamo is None else cast("type[nn.Module]", dynamo.OptimizedModule)


def uncompiled(module: Any) -> Any:
    """Give the module inside ``torch.compile``; anything else as it is."""
    kind = _optimized_module()
    return module._orig_mod if kind is not None and isinstance(module, kind) else module  # noqa: SLF001 - its only name


def compile_again(compiled: Any, module: nn.Module) -> nn.Module:
    """Compile another module as a compiled one was, with the same arguments."""
    return cast("nn.Module", compiled.dynamo_ctx(module))
