"""Rules for strategies: what the ranks exchange."""

import time
from typing import TYPE_CHECKING, Any, Final

import torch

from fabric_core.conformance import cases
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.cases import Message
from fabric_core.conformance.rule import Broken, Table
from fabric_core.conformance.rules.strategy.measures import ALWAYS, SEVERAL

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

TABLE: Final = Table("strategy", inside=False)


_OPERATIONS: Final = ("sum", "mean", "max", "min", "product")


_SEVERAL_ELEMENTS: Final = (
    cases.Tensors(shape=(2, 3), dtype="float64", transposed=True),
    cases.Tensors(shape=(3, 1, 2), dtype="int32"),
    cases.Tensors(shape=(0, 3)),
)


_UNEVEN: Final = (
    cases.Tensors(shape=(2, 3), dtype="float64", transposed=True, uneven=True),
    cases.Tensors(shape=(0, 3), dtype="int32", uneven=True),
)


def _reduce(place: Place, example: cases.Tensors) -> dict[str, dict[str, Any]]:
    """Reduce by every operation through the plugin, and through the kit's own group."""
    with place.fabric() as fabric, place.oracle() as group:
        return {operation: _reduce_by(place, fabric, group, example, operation) for operation in _OPERATIONS}


def _reduce_by(place: Place, fabric: Any, group: Any, example: cases.Tensors, operation: str) -> dict[str, Any]:
    import torch.distributed as dist

    mine = example.make(place.rank).to(fabric.device)
    before = mine.clone()
    got = fabric.strategy.all_reduce(mine, None, operation)
    expected = before.clone(memory_format=torch.contiguous_format).cpu()
    options: Any = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.SUM if operation == "mean" else getattr(dist.ReduceOp, operation.upper())
    if expected.numel():
        group.allreduce([expected], options).wait()
    if operation == "mean":
        expected = expected / place.world_size
    aliased = got.untyped_storage().data_ptr() == mine.untyped_storage().data_ptr() and mine.numel() > 0
    return {"got": got.cpu(), "expected": expected, "kept": torch.equal(mine, before), "aliased": aliased}


@TABLE.rule(
    "STR-350",
    "`all_reduce` gives what raw torch.distributed gives, for sum, mean, max, min and product.",
    reason="Metrics and decisions are reduced by it.",
    advice="reduce over all ranks with the operation that is named; a mean divides by their number",
    world_sizes=ALWAYS,
    examples=cases.tensors(),
    count=3,
    first=_SEVERAL_ELEMENTS,
)
def _all_reduce(bench: Bench, example: cases.Tensors) -> None:
    for rank, seen in enumerate(bench.run(_reduce, example)):
        for operation, one in seen.items():
            got, expected = one["got"], one["expected"]
            if got.shape == expected.shape and not torch.equal(got.to(expected.dtype), expected):
                raise Broken(f"rank {rank}: {operation} gives {got.tolist()}, and raw torch.distributed "
                             f"{expected.tolist()}")  # fmt: skip


@TABLE.rule(
    "STR-351",
    "`all_reduce` leaves its argument alone and gives a new tensor.",
    reason="A loss that is logged is still differentiated.",
    advice="reduce a clone",
    world_sizes=ALWAYS,
    examples=cases.tensors(),
    count=2,
    first=_SEVERAL_ELEMENTS[:1],
)
def _reduces_a_copy(bench: Bench, example: cases.Tensors) -> None:
    for rank, seen in enumerate(bench.run(_reduce, example)):
        for operation, one in seen.items():
            if not one["kept"] or one["aliased"]:
                raise Broken(f"rank {rank}: {operation} changed its argument, or returned it")


def _counts() -> "SearchStrategy[cases.Tensors]":
    from hypothesis import strategies as st

    return cases.tensors(dtype=st.sampled_from(["int64", "int32", "float64", "bfloat16"]), shape=st.just((2, 3)))()


@TABLE.rule(
    "STR-352",
    "`all_reduce` keeps shape and type, but for a mean of integers, which is of the default floating-point type.",
    reason="A count stays a count, and an average of counts is not cut to a whole number.",
    advice="divide integers with torch.true_divide",
    world_sizes=ALWAYS,
    examples=_counts,
    count=6,
    first=(cases.Tensors(dtype="float64"), cases.Tensors(dtype="int64")),
)
def _keeps_types(bench: Bench, example: cases.Tensors) -> None:
    for rank, seen in enumerate(bench.run(_reduce, example)):
        for operation, one in seen.items():
            if one["got"].dtype != one["expected"].dtype or one["got"].shape != one["expected"].shape:
                raise Broken(f"rank {rank}: {operation} gives {one['got'].dtype} {tuple(one['got'].shape)}")


def _misuse(place: Place, what: str) -> str:
    with place.fabric() as fabric:
        try:
            if what == "reduce_op":
                fabric.strategy.all_reduce(torch.ones(1, device=fabric.device), None, "no such")
            else:
                fabric.strategy.broadcast("text", place.world_size)
        except ValueError:
            return "refused"
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the wrong one
            return f"raised {error!r}"
        return "took it"


def _check_refused(bench: Bench, what: str) -> None:
    for rank, outcome in enumerate(bench.run(_misuse, what)):
        if outcome != "refused":
            raise Broken(f"rank {rank} {outcome}")


@TABLE.rule(
    "STR-353",
    "`all_reduce` refuses an operation that there isn't, with a ValueError.",
    reason="A misspelt operation must not become a sum.",
    advice="raise RequestError",
    world_sizes=ALWAYS,
)
def _no_such_operation(bench: Bench) -> None:
    _check_refused(bench, "reduce_op")


def _gather(place: Place, example: cases.Tensors) -> list[torch.Tensor]:
    with place.fabric() as fabric:
        parts = fabric.strategy.all_gather(example.make(place.rank).to(fabric.device), None, False)
        return [one.cpu() for one in parts]


def _check_gather(bench: Bench, example: cases.Tensors) -> None:
    expected = [example.make(rank) for rank in range(bench.world_size)]
    for rank, parts in enumerate(bench.run(_gather, example)):
        if len(parts) != len(expected) or any(
            one.dtype != other.dtype or not torch.equal(one, other) for one, other in zip(parts, expected, strict=True)
        ):
            raise Broken(f"rank {rank} has {parts}, and the ranks gave {expected}")


@TABLE.rule(
    "STR-354",
    "`all_gather` gives every rank's tensor, in the order of the ranks.",
    reason="Predictions are put back in order by it.",
    advice="gather, and keep the order",
    world_sizes=ALWAYS,
    examples=cases.tensors(),
    count=3,
    first=_SEVERAL_ELEMENTS,
)
def _all_gather(bench: Bench, example: cases.Tensors) -> None:
    _check_gather(bench, example)


@TABLE.rule(
    "STR-355",
    "`all_gather` takes tensors whose shapes differ between ranks.",
    reason="The last batch is smaller on some ranks.",
    advice="exchange the shapes, pad, and cut",
    world_sizes=SEVERAL,
    examples=cases.tensors(uneven=True),
    count=3,
    first=_UNEVEN,
)
def _uneven(bench: Bench, example: cases.Tensors) -> None:
    _check_gather(bench, example)


def _gather_gradients(place: Place) -> list[list[float]]:
    """Give the gradients after each of two passes."""
    found = []
    with place.fabric() as fabric:
        for _ in range(2):
            mine = torch.full((2,), float(place.rank + 1), device=fabric.device, requires_grad=True)
            parts = fabric.strategy.all_gather(mine, None, True)
            torch.stack([(index + 1) * one.sum() for index, one in enumerate(parts)]).sum().backward()
            found.append([] if mine.grad is None else mine.grad.tolist())
    return found


@TABLE.rule(
    "STR-356",
    "`all_gather(sync_grads=True)` lets gradients flow back to the rank that a tensor came from.",
    reason="Contrastive losses compare every rank's features.",
    advice="use torch.distributed.nn.functional.all_gather",
    world_sizes=ALWAYS,
)
def _gradients_flow(bench: Bench) -> None:
    size = bench.world_size
    for rank, got in enumerate(bench.run(_gather_gradients)):
        # Each of `size` ranks computed the same sum, in which this rank's tensor has the factor rank + 1.
        if got != [[float(size * (rank + 1))] * 2] * 2:
            raise Broken(f"rank {rank} has the gradients {got}, and each is {size * (rank + 1)}")


def _messages() -> "SearchStrategy[Message]":
    from hypothesis import strategies as st

    leaf = (
        st.none()
        | st.booleans()
        | st.integers()
        | st.text("ab", max_size=3)
        | st.binary(max_size=3)
        | st.floats(allow_nan=False)
    )

    def grow(inner: "SearchStrategy[Any]") -> "SearchStrategy[Any]":
        keys = st.text("k") | st.integers(0, 3) | st.tuples(st.booleans())
        return st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2) | st.tuples(inner, inner)

    content = st.recursive(leaf, grow, max_leaves=3)
    return st.builds(Message, content, st.integers(0, 1))


def _broadcast(place: Place, message: Message) -> Any:
    with place.fabric() as fabric:
        src = message.src % place.world_size
        tensor = fabric.strategy.broadcast(torch.full((2,), float(place.rank)), src)
        mine = message.content if place.rank == src else f"rank {place.rank}'s own"
        return fabric.strategy.broadcast(mine, src), tensor.tolist()


@TABLE.rule(
    "STR-357",
    "`broadcast` gives every rank the object of the rank that is named.",
    reason="Paths, seeds and decisions are agreed on by it.",
    advice="send from src, a global rank; return what arrived",
    world_sizes=ALWAYS,
    examples=_messages,
    count=4,
    first=(
        Message({"key": [1, None, b"x"]}, 1),
        Message({1: (2**70, -0.1), (True,): "y" * 100_000}, 0),
    ),
)
def _broadcasts(bench: Bench, message: Message) -> None:
    src = message.src % bench.world_size
    for rank, (got, tensor) in enumerate(bench.run(_broadcast, message)):
        if repr(got) != repr(message.content) or tensor != [float(src)] * 2:
            raise Broken(f"rank {rank} has {got!r} and {tensor}, and rank {src} sent {message.content!r}")


@TABLE.rule(
    "STR-358",
    "`broadcast` refuses a rank that there isn't on every rank, with a ValueError.",
    reason="Otherwise some ranks wait for ever.",
    advice="compare src with the world size before anything is sent",
    world_sizes=ALWAYS,
)
def _no_such_rank(bench: Bench) -> None:
    _check_refused(bench, "src")


def _wait(place: Place) -> list[tuple[float, float]]:
    """Let each rank be late once; give for each time when this one came, and when it went on."""
    seen = []
    with place.fabric() as fabric:
        for late in range(place.world_size):
            fabric.strategy.barrier(None)
            time.sleep(0.3 * (place.rank == late))
            arrived = time.monotonic()
            fabric.strategy.barrier("the kit's")
            seen.append((arrived, time.monotonic()))
    return seen


@TABLE.rule(
    "STR-359",
    "`barrier` lets no rank on before every rank is there.",
    reason="One rank downloads, the others wait.",
    advice="use torch.distributed.barrier",
    world_sizes=SEVERAL,
)
def _barrier(bench: Bench) -> None:
    for late, seen in enumerate(zip(*bench.run(_wait), strict=True)):
        last = max(arrived for arrived, _ in seen)
        early = [rank for rank, (_, left) in enumerate(seen) if left < last]
        if early:
            raise Broken(f"rank {early[0]} went on before rank {late} came")


def _in_group(place: Place) -> tuple[float, int] | None:
    import torch.distributed as dist

    with place.fabric() as fabric:
        if not dist.is_initialized():
            return None
        groups = [dist.new_group([rank]) for rank in range(place.world_size)]
        mine = torch.full((1,), float(place.rank + 1), device=fabric.device)
        reduced = fabric.strategy.all_reduce(mine, groups[place.rank], "sum")
        gathered = fabric.strategy.all_gather(mine, groups[place.rank], False)
        return reduced.item(), len(gathered)


@TABLE.rule(
    "STR-360",
    "`all_reduce` and `all_gather` stay inside the group that they are given.",
    reason="Pipelines and experts reduce among a few ranks.",
    advice="pass group on",
    needs=("distributed",),
    world_sizes=SEVERAL,
)
def _groups(bench: Bench) -> None:
    for rank, seen in enumerate(bench.run(_in_group)):
        if seen not in (None, (float(rank + 1), 1)):
            raise Broken(f"rank {rank}, alone in its group, has the sum {seen[0]} of {seen[1]} tensors")


def _shard_of(place: Place) -> tuple[tuple[int, int], float]:
    with place.fabric() as fabric:
        joined = fabric.strategy.all_reduce(torch.ones(1, device=fabric.device), None, "sum").item()
        return tuple(fabric.strategy.data_shard()), joined  # type: ignore[return-value]


@TABLE.rule(
    "STR-361",
    "`data_shard` divides the data: every part is read, by equally many ranks.",
    reason="A part that nobody reads isn't learnt; one that is read twice counts twice.",
    advice="give (global rank, world size), or the place in the mesh's data dimensions",
    world_sizes=ALWAYS,
)
def _data_shard(bench: Bench) -> None:
    parts = [one for one, _ in bench.run(_shard_of)]
    counts = {count for _, count in parts}
    read = [index for index, _ in parts]
    if len(counts) != 1 or {read.count(index) for index in range(counts.pop())} != {len(read) // len(set(read))}:
        raise Broken(f"the ranks read {parts}")


@TABLE.rule(
    "STR-362",
    "Who declares to be distributed joins all ranks.",
    reason="The plan gives it several processes because of it.",
    advice="join the world in connect",
    needs=("distributed",),
    world_sizes=ALWAYS,
)
def _joins(bench: Bench) -> None:
    for rank, (_, joined) in enumerate(bench.run(_shard_of)):
        if joined != bench.world_size:
            raise Broken(f"rank {rank} sees {joined:g} of {bench.world_size} ranks")


@TABLE.rule(
    "STR-363",
    "Who doesn't declare to be distributed declares one process at most.",
    reason="Several processes that don't know each other train several models.",
    advice="set max_world_size=1, or declare distributed",
    lacks=("distributed",),
    world_sizes=ALWAYS,
)
def _one_process(bench: Bench) -> None:
    if bench.declared["max_world_size"] != 1:
        raise Broken(f"max_world_size is {bench.declared['max_world_size']}")
