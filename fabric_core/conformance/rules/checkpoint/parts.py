"""Rules for checkpoint formats: what ranks write together, and what is read into place."""

from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from fabric_core.conformance.bench import Bench, Place, folder_of_its_own
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.checkpoint.measures import Unwritable, is_same, without_about
from fabric_core.contracts import ABOUT
from fabric_core.errors import CheckpointError

TABLE: Final = Table("checkpoint")


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


@TABLE.rule(
    "CHK-609",
    "Who declares sharded: what all ranks write in parts is read in parts, and whole by one process.",
    reason="A model that is never whole on any rank is saved and loaded so.",
    advice="let every rank write its own part of a DTensor, and fill those in `into`; or don't declare sharded",
    needs=("sharded",),
    world_sizes=(2,),
)
def _parts(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        for rank, (same, got) in enumerate(bench.run(_write_parts, str(folder / "state"))):
            if not same:
                raise Broken(f"rank {rank} reads another part than it wrote")
            if not is_same({"model": {"weight": _spread()}, "epoch": 7}, got):
                raise Broken(f"rank {rank}, alone, reads {got!r}")


def _write_unlike(place: Place, path: str, what: str) -> str:
    """Write where it must fail on every rank; give what was raised."""
    with place.fabric() as fabric:
        tree: dict[str, Any] = {"model": {"weight": torch.ones(2)}}
        if what == "keys" and place.rank:
            tree["model"]["odd_tensor"] = torch.ones(1)
        if what == "object" and place.rank == 0:
            tree["bad"] = Unwritable()
        try:
            place.plugin().write_sharded(Path(path), tree, fabric.strategy.collectives)
        except CheckpointError as error:
            named = what != "keys" or "odd_tensor" in str(error)
            return "refused" if named else f"raised an error that doesn't name the tensor: {error}"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the wrong one
            return f"raised {error!r}"
        return "wrote it"


@TABLE.rule(
    "CHK-614",
    "Who declares sharded: keys that differ between ranks, which are named, what can't be written and a path below a "
    "file are a CheckpointError on every rank, and nothing lies there after it.",
    reason="A rank that goes on alone waits for the others in the next call.",
    advice="compare keys over the collectives, and let all ranks know whether one failed",
    needs=("sharded",),
    world_sizes=(2,),
)
def _fails_together(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        (folder / "file").write_text("text\n", encoding="utf-8")
        for what, path in (("keys", "state"), ("object", "state"), ("path", "file/state")):
            for rank, outcome in enumerate(bench.run(_write_unlike, str(folder / path), what)):
                if outcome != "refused":
                    raise Broken(f"{_UNLIKE[what]}, and rank {rank} {outcome}")
        left = sorted(one.name for one in folder.iterdir())
    if left != ["file"]:
        raise Broken(f"beside the file there is {', '.join(one for one in left if one != 'file')}")


_UNLIKE: Final = {
    "keys": "rank 1 has a tensor more",
    "object": "rank 0 has an object that can't be written",
    "path": "the path is below a file",
}


@TABLE.rule(
    "CHK-618",
    "Who declares sharded: `read` fills the tensors of `into` in place, parameters and views too, and nothing beside "
    "them; leaves those on the meta device; and gives whole what `into` lacks. `check` fills nothing.",
    reason="A model is loaded where it lies, without room for a second one.",
    advice="copy into each tensor of into, detached, and read what it lacks",
    needs=("sharded",),
)
def _into(bench: Bench) -> None:
    plugin = bench.plugin()
    model = {"view": _spread(), "bias": torch.arange(3.0), "skipped": torch.ones(2), "more": torch.tensor([1.5, 2.5])}
    tree = {"model": model, "epoch": 7, "optimizer": {0: {"step": torch.tensor(3.0)}}}
    room, bias = torch.full((4, 6), -1.0), nn.Parameter(torch.zeros(3))
    own = {"view": room[:, ::2], "bias": bias, "skipped": torch.empty(2, device="meta"), "more": None}
    into: dict[str, Any] = {"model": own, "epoch": 1, "strange": torch.zeros(1)}
    with folder_of_its_own() as folder:
        plugin.write(folder / "state", tree)
        plugin.check(folder / "state", into)
        if bias.any() or not room.eq(-1).all():
            raise Broken("check fills the tensors")
        got = plugin.read(folder / "state", into)
        whole = plugin.read(folder / "state", {})
    if not is_same(model["view"], room[:, ::2]) or not is_same(model["bias"], bias.detach()):
        raise Broken(f"the tensors of into are {own!r}")
    if not room[:, 1::2].eq(-1).all():
        raise Broken("what lies between the places of a view is written over")
    if not got["model"]["skipped"].is_meta:
        raise Broken(f"what is on the meta device comes back as {got['model']['skipped']!r}")
    got["model"] = {**got["model"], "skipped": model["skipped"]}
    for read, what in ((got, "with the tensors of a model"), (whole, "with nothing")):
        if not is_same(tree, read):
            raise Broken(f"read {what} in into gives {read!r}")


def _write_own(place: Place, path: str) -> None:
    """Write what is another on every rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with place.fabric() as fabric:
        mesh = init_device_mesh(fabric.device.type, (place.world_size,))
        model = {f"tensor {size}": torch.full((size,), float(place.rank)) for size in (1, 5, 2, 9)}
        tree: dict[str, Any] = {
            "model": {**model, "parts": distribute_tensor(_spread().to(fabric.device), mesh, [Shard(0)])},
            "epoch": place.rank,
            "nested": {"list": [place.rank, torch.tensor(place.rank)]},
            ABOUT: {"rank": place.rank},
        }
        if place.rank:
            tree = dict(reversed(tree.items()))
            tree["model"] = dict(reversed(tree["model"].items()))
        place.plugin().write_sharded(Path(path), tree, fabric.strategy.collectives)
        fabric.barrier()


@TABLE.rule(
    "CHK-619",
    "Who declares sharded: whatever is no DTensor is written as rank 0 has it, tensors and plain values alike, in "
    "whichever order the ranks have their keys.",
    reason="Ranks differ where nothing synchronizes them, as in running averages; a mixture is of no rank.",
    advice="let rank 0 write all that isn't spread over the ranks",
    needs=("sharded",),
    world_sizes=(2,),
)
def _of_rank_zero(bench: Bench) -> None:
    with folder_of_its_own() as folder:
        bench.run(_write_own, str(folder / "state"))
        got, said = bench.run(_read_again, str(folder / "state"))[0]
    model = {f"tensor {size}": torch.zeros(size) for size in (1, 5, 2, 9)}
    wanted = {"model": {**model, "parts": _spread()}, "epoch": 0, "nested": {"list": [0, torch.tensor(0)]}}
    if not is_same(wanted, without_about(got)):
        raise Broken(f"what each rank has of its own is read as {got!r}")
    if said != {"rank": 0}:
        raise Broken(f"of what each rank says of its own, describe gives {said!r}")


def _read_again(place: Place, path: str) -> tuple[Any, Any]:
    plugin = place.plugin()
    return plugin.read(Path(path), None), plugin.describe(Path(path)).get(ABOUT)
