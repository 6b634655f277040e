"""Modules that went through ``torch.compile``."""

from fabric_core._torch import compile_like as compile_again
from fabric_core._torch import original_of as uncompiled

__all__ = ["compile_again", "uncompiled"]
