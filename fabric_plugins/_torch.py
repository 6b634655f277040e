"""Every part of PyTorch that is private or undocumented and that the plugins use."""

from typing import Any

__all__ = ["storage_info"]


def storage_info() -> Any:
    """Give the class by which the metadata of ``torch.distributed.checkpoint`` says where a record is.

    Only PyTorch's own reader needs it; our checkpoints are read without. It would be replaced by a public class, or
    PyTorch's tools would no longer read our folders.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo
