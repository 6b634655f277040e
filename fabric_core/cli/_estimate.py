"""``fabric-core estimate``: what each rank of a training would hold in memory; nothing is made, and nothing starts."""

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final

import torch
import typer

from fabric_core._torch import fake_mode
from fabric_core.assembly import assemble
from fabric_core.choosing.parsing import parse_plugin
from fabric_core.choosing.plan import processes
from fabric_core.cli._asking import request_of
from fabric_core.cli._memory import Footprint, convert, measure, runner, train_once
from fabric_core.cli._output import AsJson, print_json, print_table, print_text
from fabric_core.contracts import MemoryEstimate, ProcessInfo
from fabric_core.errors import FabricError, RequestError

__all__ = ["estimate"]

_UNIT: Final = 2**20
_PARTS: Final = (2, 3)


def estimate(
    function: Annotated[
        str, typer.Argument(help="MODULE:FUNCTION, which returns a model, a batch, and a loss or not.")
    ],
    optimizer: Annotated[
        str, typer.Option(help="A class of torch.optim, with options: SGD:lr=0.1,momentum=0.9.")
    ] = "AdamW",
    batch: Annotated[int | None, typer.Option(help="Given to the function as its argument batch.")] = None,
    as_json: AsJson = False,
    **asked: Any,
) -> None:
    """Say what each rank of a training would hold in memory; the model is made without any, and nothing starts."""
    request, variables = request_of(**asked)
    make = _function(function, batch)
    assembly = assemble(request, variables, lambda: None)
    try:
        chosen, plan = assembly.chosen, assembly.chosen.plan
        if chosen.all("wrapper"):
            raise RequestError(
                "what a wrapper does to memory is not a part of the estimate",
                where="--wrapper",
                got=", ".join(choice.text for choice in plan.of("wrapper")),
                instead="a function that returns the transformed model",
            )
        ranks, footprint = _estimate(make, optimizer, plan, chosen.one("strategy"), chosen.one("precision"))
    finally:
        assembly.bindings.undo()
    if as_json:
        print_json({
            "plan": plan.as_dict(),
            "activations": footprint.activations,
            "ranks": [{"rank": rank, **asdict(one), "peak": footprint.peak(one)} for rank, one in enumerate(ranks)],
        })  # fmt: skip
        return
    rows = []
    for first, last, one in _alike(ranks):
        sizes = (
            one.parameters,
            one.gradients,
            one.optimizer,
            one.in_flight,
            footprint.activations,
            footprint.peak(one),
        )
        rows.append((f"{first}" if first == last else f"{first}-{last}", *(f"{size / _UNIT:,.1f}" for size in sizes)))
    print_table(("rank", "parameters", "gradients", "optimizer", "in flight", "activations", "peak"), rows)
    print_text(f"MiB; {plan.strategy.text}, {plan.precision.text}, {processes(plan.world_size)}")


def _estimate(make: Any, text: str, plan: Any, strategy: Any, precision: Any) -> tuple[list[MemoryEstimate], Footprint]:
    try:
        with fake_mode():
            model, data, *loss = _checked(make())
            model = convert(model, precision)
            optimizer = _optimizer(text, model)
            run, dtype = runner(model, data, loss[0] if loss else None, precision, strategy)
            train_once(run, optimizer)
            size, local = plan.world_size, len(plan.device_indices)
            ranks = [
                strategy.estimate_memory(
                    ProcessInfo(
                        global_rank=rank,
                        local_rank=rank % local,
                        node_rank=rank // local,
                        world_size=size,
                        local_world_size=local,
                    ),
                    precision.policy,
                    model,
                    optimizer,
                )
                for rank in range(size)
            ]
            return ranks, measure(run, model, optimizer, data, dtype)
    except FabricError:
        raise
    except Exception as error:
        raise RequestError(
            f"a step can't be computed on tensors that have no memory: {type(error).__name__}: {error}",
            where="MODULE:FUNCTION",
            instead="a model and a loss whose code asks for no values, such as .item(), and no files",
        ) from error


def _checked(made: Any) -> tuple[Any, ...]:
    """Check what the function returned.

    Raises:
        RequestError: It is no model with a batch, and a loss or not.
    """
    if isinstance(made, tuple) and len(made) in _PARTS and isinstance(made[0], torch.nn.Module):
        return made
    raise RequestError(
        "the function returns something else",
        where="MODULE:FUNCTION",
        got=type(made).__name__,
        instead="return model, batch or return model, batch, loss",
    )


def _function(text: str, batch: int | None) -> Any:
    """Import the function, from the folder the command runs in too; with the size of the batch, where one is given.

    Raises:
        RequestError: There is none, or it doesn't take a batch.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise RequestError("the function can't be parsed", where="MODULE:FUNCTION", got=text, instead="my_models:make")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = getattr(import_module(module), name)
    except Exception as error:
        raise RequestError(
            f"the function can't be imported: {type(error).__name__}: {error}", where="MODULE:FUNCTION", got=text,
            instead="a module that Python finds from this folder, and the name of a function in it",
        ) from error  # fmt: skip
    if batch is None:
        return function
    if "batch" not in inspect.signature(function).parameters:
        raise RequestError(
            "the function takes no batch", where="--batch", got=batch, instead=f"def {name}(batch=...), or no --batch"
        )
    return lambda: function(batch=batch)


def _optimizer(text: str, model: torch.nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of a model.

    Raises:
        RequestError: ``torch.optim`` has none of that name, or it doesn't take these options.
    """
    ref = parse_plugin(text, "--optimizer")
    known = {
        name.lower(): one
        for name, one in vars(torch.optim).items()
        if isinstance(one, type) and issubclass(one, torch.optim.Optimizer) and one is not torch.optim.Optimizer
    }
    if ref.name.lower() not in known:
        raise RequestError(
            "torch.optim has no such optimizer",
            where="--optimizer",
            got=ref.name,
            instead=f"one of {', '.join(sorted(one.__name__ for one in known.values()))}",
        )
    try:
        return known[ref.name.lower()](model.parameters(), **ref.options)
    except (TypeError, ValueError) as error:
        raise RequestError(f"the optimizer can't be made: {error}", where="--optimizer", got=text) from error


def _alike(ranks: Sequence[MemoryEstimate]) -> Iterator[tuple[int, int, MemoryEstimate]]:
    """Join neighbouring ranks that hold the same."""
    first = 0
    for rank, one in enumerate(ranks):
        if rank + 1 == len(ranks) or ranks[rank + 1] != one:
            yield first, rank, one
            first = rank + 1
