"""A directory to which all ranks write their parts at once, by ``torch.distributed.checkpoint``."""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
import torch.distributed as dist

from fabric_core.contracts import Checkpoint, CheckpointCapabilities
from fabric_core.errors import CheckpointError
from fabric_plugins.checkpoints._plain import check_readable

__all__ = ["DistributedCheckpoint"]

_TREE: Final = "fabric.pt"
_METADATA: Final = ".metadata"
_Way = tuple[Any, ...]


class DistributedCheckpoint(Checkpoint):
    """A directory with every rank's parts; any number of ranks, under any strategy, reads it again.

    The tensors are ``torch.distributed.checkpoint``'s, whose own tools read them too. The tree that they are in, and
    all plain values, lie beside them in a file of their own: what that format keeps as pickled objects would run code.
    """

    capabilities = CheckpointCapabilities(sharded=True)

    def recognises(self, path: Path) -> bool:
        """A directory with both parts."""
        return (path / _TREE).is_file() and (path / _METADATA).is_file()

    def write(self, path: Path, tree: Mapping[str, Any]) -> None:
        """Write into a directory aside; once all ranks have, rank 0 renames it."""
        aside, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
        tensors, plain = _parted(tree)
        keys = _keys(tensors)

        # What rank 0 has is written, so what it has is asked; its refusal is every rank's.
        _on_rank_zero(lambda: check_readable(_joined(plain), path))

        def prepare() -> None:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

        def finish() -> None:
            torch.save({"plain": plain, "tensors": keys}, aside / _TREE)
            _flush(aside / _TREE)
            shutil.rmtree(old, ignore_errors=True)
            if path.is_dir() and not path.is_symlink():
                path.rename(old)
            aside.rename(path)
            shutil.rmtree(old, ignore_errors=True)

        try:
            _on_rank_zero(prepare)
            with _quiet():
                _dcp().save({keys[way]: tensor for way, tensor in tensors.items()}, checkpoint_id=aside)
            _on_rank_zero(finish)
        except (Exception, _dcp().CheckpointException) as error:
            if _rank() == 0:
                shutil.rmtree(aside, ignore_errors=True)
                if old.exists() and not path.exists():
                    old.rename(path)
            raise CheckpointError(
                f"the checkpoint can't be written: {_first_line(error)}",
                where=str(path),
                instead="a path that every rank can write to, with room",
            ) from error

    def outline(self, path: Path) -> dict[str, Any]:
        """Give the tree with its tensors on the meta device."""
        kept, metadata = self._described(path)
        outlined = {}
        for way, key in kept["tensors"].items():
            one = metadata.state_dict_metadata.get(key)
            if not isinstance(one, _dcp().TensorStorageMetadata):
                raise CheckpointError("the checkpoint lacks a tensor", where=str(path), got=key)
            outlined[way] = torch.empty(one.size, dtype=one.properties.dtype, device="meta")
        return _joined(kept["plain"], outlined)

    def read(self, path: Path, into: Mapping[str, Any] | None) -> dict[str, Any]:
        """Read in parallel, in place where ``into`` has a tensor of that shape, and whole tensors elsewhere."""
        kept, _ = self._described(path)
        tensors = {}
        for way, outlined in _parted(self.outline(path))[0].items():
            own = _found(into or {}, way)
            fits = isinstance(own, torch.Tensor) and own.shape == outlined.shape
            tensors[way] = own.detach() if fits else torch.empty_like(outlined, device="cpu")
        try:
            with _quiet():
                _dcp().load(
                    {kept["tensors"][way]: tensor for way, tensor in tensors.items()},
                    storage_reader=_dcp().Reader(path),
                )
        except (Exception, _dcp().CheckpointException) as error:
            raise CheckpointError("the checkpoint can't be read", where=str(path), got=_first_line(error)) from error
        return _joined(kept["plain"], tensors)

    def _described(self, path: Path) -> tuple[dict[str, Any], Any]:
        try:
            return torch.load(path / _TREE, weights_only=True), _dcp().Reader(path).read_metadata()
        except FileNotFoundError as error:
            raise CheckpointError("there is no checkpoint, or only a part of one", where=str(path)) from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                "the checkpoint is damaged, or holds objects that need code to be read",
                where=str(path),
                got=_first_line(error),
            ) from error
        except (OSError, RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError("the checkpoint can't be read", where=str(path), got=_first_line(error)) from error


def _dcp() -> ModuleType:
    """Import what writes and reads when something is written or read: it brings FSDP with it."""
    from fabric_plugins.checkpoints import _dcp as module

    return module


def _parted(tree: Mapping[Any, Any], above: _Way = ()) -> tuple[dict[_Way, torch.Tensor], dict[_Way, Any]]:
    """Part the tensors in nested dicts from everything else, each under its way through the tree."""
    tensors: dict[_Way, torch.Tensor] = {}
    plain: dict[_Way, Any] = {}
    for name, value in tree.items():
        way = (*above, name)
        if isinstance(value, torch.Tensor):
            tensors[way] = value.detach()
        elif isinstance(value, Mapping) and value:
            deeper_tensors, deeper_plain = _parted(value, way)
            tensors.update(deeper_tensors)
            plain.update(deeper_plain)
        else:
            plain[way] = value
    return tensors, plain


def _joined(*parts: Mapping[_Way, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for part in parts:
        for way, value in part.items():
            place = tree
            for name in way[:-1]:
                place = place.setdefault(name, {})
            place[way[-1]] = value
    return tree


def _found(tree: Any, way: _Way) -> Any:
    for name in way:
        tree = tree.get(name) if isinstance(tree, Mapping) else None
    return tree


def _keys(ways: Iterable[_Way]) -> dict[_Way, str]:
    """Name tensors by their ways, joined by dots; where two would read alike, the later one gets a mark."""
    keys: dict[_Way, str] = {}
    taken: set[str] = set()
    for way in ways:
        key = ".".join(map(str, way))
        while key in taken:
            key += "'"
        taken.add(key)
        keys[way] = key
    return keys


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _on_rank_zero(act: Callable[[], None]) -> None:
    """Act on rank 0, and fail on every rank where it fails; the others wait."""
    failure: list[Exception | None] = [None]
    if _rank() == 0:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - travels to the others, and is raised there and here
            failure = [error]
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(failure, 0)
    if failure[0] is not None:
        raise failure[0]


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out the warning that one process reads or writes alone, which is on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _first_line(error: BaseException) -> str:
    if isinstance(error, _dcp().CheckpointException):
        rank, (failure, _) = next(iter(error.failures.items()))
        return f"on rank {rank}: {_first_line(failure)}"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
