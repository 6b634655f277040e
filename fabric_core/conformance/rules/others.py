"""Rules for launchers, checkpoint formats and loggers."""

import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

import torch

from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.pool import VARIABLES
from fabric_core.conformance.rule import Broken, Table
from fabric_core.contracts import LaunchOrder, ProcessInfo
from fabric_core.errors import CheckpointError, LaunchError

LAUNCHER: Final = Table("launcher")
CHECKPOINT: Final = Table("checkpoint")
LOGGER: Final = Table("logger")

_FOREIGN: Final[tuple[Mapping[str, str], ...]] = (
    {},
    {"PATH": "/bin", "HOME": "/root"},
    {"LANG": "C", "TERM": "dumb", "SHLVL": "1"},
)


# Launchers


@LAUNCHER.rule(
    "LAU-501",
    "`detect` says nothing where its system did not start the process.",
    reason="Every launcher is asked, in every process.",
    advice="return None where your system's variables are absent",
)
def _foreign(bench: Bench) -> None:
    for environment in _FOREIGN:
        found = bench.plugin().detect(dict(environment))
        if found is not None:
            raise Broken(f"in {environment} it finds {found}")


@LAUNCHER.rule(
    "LAU-502",
    "`detect` reads the environment that it is given, and changes neither that nor the process's own.",
    reason="Asking must have no effect.",
    advice="read from the argument, and set nothing",
)
def _detect_is_pure(bench: Bench) -> None:
    for environment in (*_FOREIGN, dict(os.environ)):
        given, before = dict(environment), dict(os.environ)
        try:
            bench.plugin().detect(given)
        except LaunchError:
            continue
        if given != environment or dict(os.environ) != before:
            raise Broken("it changes the environment")


def _detect(place: Place) -> ProcessInfo | None:
    found: ProcessInfo | None = place.plugin().detect(dict(os.environ))
    return found


@LAUNCHER.rule(
    "LAU-503",
    "The ranks of one job are numbered from 0, each once, and know how many there are: one is the global zero.",
    reason="Two rank zeros write one checkpoint.",
    advice="read the global rank, not the local one",
    needs=("detects",),
    world_sizes=(1, 2),
)
def _ranks(bench: Bench) -> None:
    found = bench.run(_detect)
    ranks = [None if one is None else (one.global_rank, one.world_size) for one in found]
    if ranks != [(rank, bench.world_size) for rank in range(bench.world_size)]:
        raise Broken(f"the ranks see themselves as {ranks}")


@LAUNCHER.rule(
    "LAU-504",
    "Variables of its own system that contradict each other, or are missing, raise LaunchError and nothing else.",
    reason="A job that was started half-way must say so.",
    advice="raise LaunchError for what can't be read",
    needs=("detects",),
    world_sizes=(1,),
)
def _incomplete(bench: Bench) -> None:
    fault = bench.run(_detect_damaged)[0]
    if fault:
        raise Broken(fault)


def _detect_damaged(place: Place) -> str | None:
    plugin, whole = place.plugin(), dict(os.environ)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        for damaged in ({**whole, name: "x"}, {key: value for key, value in whole.items() if key != name}):
            try:
                plugin.detect(damaged)
            except LaunchError:
                continue
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the wrong one
                return f"with {name} damaged it raises {error!r}"
    return None


def _answer(one: int, other: int) -> int:
    return one + other


def _fail() -> None:
    raise ZeroDivisionError("the kit's own")


def _start(place: Place, function: Callable[..., Any], *args: Any) -> Any:
    """Start a function as a script does that nothing has launched."""
    for name in VARIABLES:
        del os.environ[name]
    try:
        return place.plugin().start(LaunchOrder(processes=1, function=function, args=args))
    except Exception as error:  # noqa: BLE001 - what it raises is what is asked
        return f"raised {type(error).__name__}"


@LAUNCHER.rule(
    "LAU-505",
    "`start` runs the function with its arguments, and gives what it returned on rank 0.",
    reason="Notebooks get their trained model back by it.",
    advice="pass order.args on, and return rank 0's result",
    inside=False,
)
def _returns(bench: Bench) -> None:
    result = bench.fresh(_start, _answer, 40, 2)
    if result != 42:
        raise Broken(f"it gives {result!r}, and the function returned 42")


@LAUNCHER.rule(
    "LAU-506",
    "`start` raises where the function raised.",
    reason="A failed training must not look like one that ended.",
    advice="raise RankFailedError with the rank's traceback",
    inside=False,
)
def _raises(bench: Bench) -> None:
    result = bench.fresh(_start, _fail)
    if not str(result).startswith("raised"):
        raise Broken(f"it gives {result!r}")


@LAUNCHER.rule(
    "LAU-507",
    "`teardown` may be called without `setup_process`, and twice.",
    reason="What failed half-way is torn down too.",
    advice="let teardown look at what there is to give back",
)
def _teardown(bench: Bench) -> None:
    plugin = bench.plugin()
    plugin.teardown()
    plugin.teardown()


# Checkpoints


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fabric-kit-") as folder:
        yield Path(folder)


def _tree(factor: float = 1.0) -> dict[str, Any]:
    return {
        "model": {
            "weight": factor * torch.arange(6, dtype=torch.float32).reshape(2, 3),
            "half": torch.full((2,), factor, dtype=torch.bfloat16),
            "count": torch.tensor([3, 5]),
            "empty": torch.zeros(0, 2),
            "scalar": torch.tensor(factor),
        },
        "epoch": 7,
        "rate": 0.5,
        "name": "text",
        "done": True,
        "nothing": None,
        "nested": {"list": [1, 2.5, "x"], "tuple": (0.9, ("a", None)), "empty": {}},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}, 11: {"average": torch.full((2, 3), factor)}},
            "param_groups": [{"betas": (0.9, 0.999), "params": [0, 11]}],
        },
    }


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and set(one) == set(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


@CHECKPOINT.rule(
    "CHK-601",
    "What is written is read: tensors with their types and shapes, empty ones too, and plain values with theirs; a key "
    "that is a number stays one, and a tuple a tuple.",
    reason="A training that continues must continue with the same numbers; an optimizer's state has numbers for keys.",
    advice="store types and shapes, nested dicts with keys of any type, lists and tuples",
)
def _round_trip(bench: Bench) -> None:
    with _folder() as folder:
        bench.plugin().write(folder / "state", _tree())
        got = bench.plugin().read(folder / "state", None)
    if not _same(_tree(), got):
        raise Broken(f"{_tree()!r} comes back as {got!r}")


def _refused(plugin: Any, path: Path, what: str) -> None:
    try:
        got = plugin.read(path, None)
    except CheckpointError:
        return
    except Exception as error:
        raise Broken(f"{what} raises {error!r}, and no CheckpointError") from error
    raise Broken(f"{what} is read as {got!r}")


@CHECKPOINT.rule(
    "CHK-602",
    "Reading what isn't there raises CheckpointError.",
    reason="A wrong path is the most frequent mistake.",
    advice="raise CheckpointError from what the file system raises",
)
def _absent(bench: Bench) -> None:
    with _folder() as folder:
        _refused(bench.plugin(), folder / "state", "what isn't there")


@CHECKPOINT.rule(
    "CHK-603",
    "Reading a checkpoint that was cut off raises CheckpointError.",
    reason="Half a model must not be trained on.",
    advice="let the format have a length or a checksum, and raise CheckpointError from what reading raises",
)
def _damaged(bench: Bench) -> None:
    with _folder() as folder:
        path = folder / "state"
        bench.plugin().write(path, _tree())
        for file in [path] if path.is_file() else [one for one in path.rglob("*") if one.is_file()]:
            data = file.read_bytes()
            file.write_bytes(data[: len(data) // 2])
        _refused(bench.plugin(), path, "half a checkpoint")


@CHECKPOINT.rule(
    "CHK-604",
    "`recognises` knows its own checkpoints, and no others: nothing, an empty file, an empty folder, text.",
    reason="The format of a checkpoint is found by asking every format.",
    advice="look for what only your format has, such as its first bytes",
)
def _recognises(bench: Bench) -> None:
    plugin = bench.plugin()
    with _folder() as folder:
        (folder / "empty").touch()
        (folder / "folder").mkdir()
        (folder / "text").write_text("text\n", encoding="utf-8")
        plugin.write(folder / "state", _tree())
        if plugin.recognises(folder / "state") is not True:
            raise Broken("it doesn't know its own")
        taken = [name for name in ("absent", "empty", "folder", "text") if plugin.recognises(folder / name)]
    if taken:
        raise Broken(f"it takes for its own: {', '.join(taken)}")


class _Unwritable:
    def __reduce__(self) -> Any:
        raise RuntimeError("the kit's own: this can't be written")


@CHECKPOINT.rule(
    "CHK-605",
    "A write that fails raises CheckpointError, and what was there before is still there, whole.",
    reason="A full disk must not cost the last good checkpoint.",
    advice="write aside, and rename at the end",
)
def _fails_whole(bench: Bench) -> None:
    plugin = bench.plugin()
    with _folder() as folder:
        path = folder / "state"
        plugin.write(path, _tree())
        try:
            plugin.write(path, {**_tree(2.0), "bad": _Unwritable()})
        except CheckpointError:
            pass
        except Exception as error:
            raise Broken(f"a failed write raises {error!r}, and no CheckpointError") from error
        else:
            raise Broken("an object that can't be written is written")
        try:
            got = plugin.read(path, None)
        except CheckpointError as error:
            raise Broken(f"after a failed write the old checkpoint can't be read: {error}") from error
        if not _same(_tree(), got):
            raise Broken("after a failed write something else is there")


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@CHECKPOINT.rule(
    "CHK-606",
    "Reading runs no code that lies in the file.",
    reason="Checkpoints are downloaded.",
    advice="use torch.load(weights_only=True), or a format without code",
)
def _runs_nothing(bench: Bench) -> None:
    plugin = bench.plugin()
    with _folder() as folder:
        proof = folder / "proof"
        for name, write in (
            ("torch", lambda path: torch.save({"bomb": _Bomb(proof)}, path)),
            ("pickle", lambda path: path.write_bytes(pickle.dumps({"bomb": _Bomb(proof)}))),
        ):
            write(folder / name)
            _refused(plugin, folder / name, f"a file of {name} with code in it")
            if proof.exists():
                raise Broken(f"reading a file of {name} ran the code in it")


@CHECKPOINT.rule(
    "CHK-607",
    "Writing where a checkpoint lies replaces it.",
    reason="`last.pt` is written again and again.",
    advice="rename over the old one",
)
def _replaces(bench: Bench) -> None:
    with _folder() as folder:
        for factor in (1.0, 2.0):
            bench.plugin().write(folder / "state", _tree(factor))
        got = bench.plugin().read(folder / "state", None)
    if not _same(_tree(2.0), got):
        raise Broken("the old values are still there, or a mixture")


@CHECKPOINT.rule(
    "CHK-608",
    "Beside the checkpoint nothing is left, after a failure too.",
    reason="Folders of checkpoints are listed, and copied.",
    advice="remove what was written aside in `finally`",
)
def _leaves_nothing(bench: Bench) -> None:
    with _folder() as folder:
        bench.plugin().write(folder / "state", _tree())
        with suppress(Exception):  # which one is another rule
            bench.plugin().write(folder / "state", {"bad": _Unwritable()})
        beside = sorted(one.name for one in folder.iterdir() if one.name != "state")
    if beside:
        raise Broken(f"there is {', '.join(beside)}")


def _write_parts(place: Place, path: str) -> tuple[bool, Any]:
    """Write a tensor of which each rank has a part; say whether the parts come back, and read it whole and alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with place.fabric() as fabric:
        mesh = init_device_mesh(fabric.device.type, (place.world_size,))
        parts = distribute_tensor(_spread().to(fabric.device), mesh, [Shard(0)])
        plugin = place.plugin()
        plugin.write_sharded(Path(path), {"model": {"weight": parts}, "epoch": 7}, fabric.strategy.collectives)
        fabric.barrier()
        room: Any = torch.zeros_like(parts)
        plugin.read(Path(path), {"model": {"weight": room}})
        same = torch.equal(room.to_local(), parts.to_local())
    return same, place.plugin().read(Path(path), None)


def _spread() -> torch.Tensor:
    return torch.arange(12, dtype=torch.float32).reshape(4, 3)


@CHECKPOINT.rule(
    "CHK-609",
    "Who declares sharded: what all ranks write in parts is read in parts, and whole by one process.",
    reason="A model that is never whole on any rank is saved and loaded so.",
    advice="let every rank write its own part of a DTensor, and fill those in `into`; or don't declare sharded",
    needs=("sharded",),
    world_sizes=(2,),
)
def _parts(bench: Bench) -> None:
    with _folder() as folder:
        for rank, (same, got) in enumerate(bench.run(_write_parts, str(folder / "state"))):
            if not same:
                raise Broken(f"rank {rank} reads another part than it wrote")
            if not _same({"model": {"weight": _spread()}, "epoch": 7}, got):
                raise Broken(f"rank {rank}, alone, reads {got!r}")


def _outlines(outlined: Any, whole: Any) -> bool:
    if isinstance(whole, torch.Tensor):
        return isinstance(outlined, torch.Tensor) and (outlined.shape, outlined.dtype) == (whole.shape, whole.dtype)
    if isinstance(whole, dict):
        return (
            isinstance(outlined, dict)
            and set(outlined) == set(whole)
            and all(_outlines(outlined[key], whole[key]) for key in whole)
        )
    return _same(outlined, whole)


@CHECKPOINT.rule(
    "CHK-610",
    "`outline` says what `read` gives: the same tree, its tensors with their types and shapes.",
    reason="Room is made by it before anything is read.",
    advice="leave outline as the contract has it, or describe every entry",
)
def _outline(bench: Bench) -> None:
    with _folder() as folder:
        bench.plugin().write(folder / "state", _tree())
        got = bench.plugin().outline(folder / "state")
    if not _outlines(got, _tree()):
        raise Broken(f"it says {got!r}")


# Loggers


def _log(place: Place) -> None:
    with _folder() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            plugin = place.plugin()
            plugin.log_hyperparams({"rate": 0.5, "layers": [1, 2], "name": "text", "nested": {"a": None}})
            plugin.log_metrics({"loss": 1.5}, 0)
            plugin.log_metrics({"loss": 1.25, "accuracy": 0.5}, None)
            plugin.log_metrics({}, 2)
            plugin.log_metrics({"loss": float("nan"), "other": float("inf")}, 3)
            plugin.finalize("success")
            plugin.finalize("success")
        finally:
            os.chdir(before)


@LOGGER.rule(
    "LOG-701",
    "It takes metrics with and without a step, new names, none at all, and numbers that are not finite.",
    reason="A training must not end because of what it logs; a loss that diverged is worth seeing.",
    advice="write what comes; count steps yourself where there is none",
)
def _takes(bench: Bench) -> None:
    bench.run(_log)


def _finalize(place: Place, times: int) -> None:
    with _folder() as folder:
        before = Path.cwd()
        os.chdir(folder)
        try:
            plugin = place.plugin()
            for _ in range(times):
                plugin.finalize("failed")
        finally:
            os.chdir(before)


@LOGGER.rule(
    "LOG-702",
    "`finalize` may be called without any metric, and twice.",
    reason="A training that fails at once is torn down too.",
    advice="close what is open, and forget it",
)
def _finalizes(bench: Bench) -> None:
    bench.run(_finalize, 2)


LOGGER.untested(
    "LOG-703",
    "What was logged is found where the logger says that it writes.",
    reason="Every service and file format keeps it elsewhere; the kit can't read them all.",
    advice="log a number in your own tests, and read it back",
)
