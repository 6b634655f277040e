"""Every private part of PyTorch that the plugins use; ``tests/plugins/test_torch_privates.py`` says when one goes."""

from typing import Any

__all__ = ["reduction_finished"]


def reduction_finished(reducer: Any) -> bool:
    """Say whether a reducer of DDP that looks for unused parameters has averaged what it waited for.

    Such a one has nothing to rebuild; asked to, it only makes sure that its last reduction came to an end.
    """
    try:
        reducer._rebuild_buckets()  # noqa: SLF001
    except RuntimeError:
        return False
    return True
