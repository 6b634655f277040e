"""One file with the full state, which plain PyTorch reads."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fabric_core.contracts import Checkpoint
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints._plain import check_readable

__all__ = ["SingleFileCheckpoint"]


class SingleFileCheckpoint(Checkpoint):
    """One file, written aside and renamed; ``torch.load(path, weights_only=True)`` reads it."""

    def recognises(self, path: Path) -> bool:
        """A regular file that begins as a zip archive does."""
        try:
            with path.open("rb") as file:
                return file.read(4) == b"PK\x03\x04"
        except OSError:
            return False

    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        """Write aside, flush to disk, rename."""
        check_readable(tree, path)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                torch.save(dict(tree), file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except Exception as error:
            raise CheckpointError(
                f"the checkpoint can't be written: {error}",
                where=str(path),
                instead="a path that can be written to",
            ) from error
        finally:
            aside.unlink(missing_ok=True)

    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        """Read without running code; the tensors are mapped into memory, so that a rank loads what it uses."""
        try:
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError as error:
            raise CheckpointError("there is no checkpoint", where=str(path)) from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                "the checkpoint is damaged, or holds objects that need code to be read",
                where=str(path),
                got=str(error),
            ) from error
        except (OSError, RuntimeError, EOFError) as error:
            raise CheckpointError("the checkpoint can't be read", where=str(path), got=str(error)) from error
        if not isinstance(tree, dict):
            raise CheckpointError("the file holds no state tree", where=str(path), got=type(tree).__name__)
        return tree
