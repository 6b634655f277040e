"""``fabric-core plugins matrix``: which accelerators, strategies and precisions work together here, and why not."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console

from fabric_core.assembly import make_plan, make_registry
from fabric_core.choosing.offers import Offer
from fabric_core.choosing.parsing import parse_plugin
from fabric_core.choosing.registry import Registry
from fabric_core.choosing.request import Request
from fabric_core.cli._asking import Config, completer, request_of
from fabric_core.cli._output import AsJson, Exit, as_dict, print_json, print_table, print_text, progress
from fabric_core.errors import FabricError, RequestError, UnknownPluginError

__all__ = ["Cell", "make_matrix", "matrix", "plugin_texts", "try_cells"]

WORKS, REFUSED, NOT_TRIED = "works", "refused", "not tried"

_ALL: Final = "*"


@dataclass(frozen=True)
class Cell:
    """One combination.

    Args:
        accelerator: How a request names it.
        strategy: Likewise.
        precision: Likewise.
        wrapper: Likewise; ``None`` is none.
        status: ``works``, ``refused``, or ``not tried``.
        reason: Why it is refused, or wasn't tried.
        request: What was asked for.
        error: What ``Fabric(...)`` raises, where it is refused.
        processes: How many processes it would have.
        tried: Why the training failed; empty where it went well, ``None`` where there was none.
    """

    accelerator: str
    strategy: str
    precision: str
    wrapper: str | None
    status: str
    reason: str = ""
    request: Request | None = field(default=None, repr=False)
    error: FabricError | None = field(default=None, repr=False)
    processes: int = 0
    tried: str | None = None

    @property
    def shown(self) -> str:
        """What a table says."""
        if self.tried is None:
            return self.status
        return "trained" if not self.tried else "failed"

    def as_dict(self) -> dict[str, Any]:
        """Give it as plain data."""
        names = ("accelerator", "strategy", "precision", "wrapper", "status", "reason", "processes", "tried")
        error = None if self.error is None else as_dict(self.error)["error"]
        return {**{name: getattr(self, name) for name in names}, "error": error}


_Accelerators = Annotated[
    list[str] | None,
    typer.Option(help="Only this; several times for several.", autocompletion=completer("accelerator")),
]
_Strategies = Annotated[
    list[str] | None,
    typer.Option(help="Only this, with options if you like; likewise.", autocompletion=completer("strategy")),
]
_Precisions = Annotated[
    list[str] | None, typer.Option(help="Only this; likewise.", autocompletion=completer("precision"))
]
_Wrappers = Annotated[
    list[str] | None,
    typer.Option(help='With this one too; likewise, and "*" for each.', autocompletion=completer("wrapper")),
]


def matrix(
    accelerator: _Accelerators = None,
    strategy: _Strategies = None,
    precision: _Precisions = None,
    wrapper: _Wrappers = None,
    devices: Annotated[str, typer.Option(help="A count, or indices, of each node.")] = "auto",
    num_nodes: Annotated[int, typer.Option(help="How many nodes.")] = 1,
    config: Config = None,
    tried: Annotated[
        bool, typer.Option("--tried", help="Train where it should work; exit code 1 where it doesn't.")
    ] = False,
    png: Annotated[Path | None, typer.Option(help="Draw a picture, and write it here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which accelerator, strategy and precision work together here, and why others don't; starts nothing."""
    if png is not None and not png.parent.is_dir():
        raise RequestError("there is no folder for the picture", where="--png", got=str(png), instead="an existing one")
    base, variables = request_of(config, devices=devices, num_nodes=num_nodes)
    named = {"accelerator": accelerator, "strategy": strategy, "precision": precision, "wrapper": wrapper}
    cells = list(make_matrix(make_registry(variables, base.lock), base, variables, named))
    if tried:
        cells = list(try_cells(cells))
    if png is not None:
        from fabric_core.cli._picture import draw

        draw(cells, png)
    if as_json:
        print_json({"devices": devices, "num_nodes": num_nodes, "cells": [cell.as_dict() for cell in cells]})
    else:
        _print(cells)
    if any(cell.tried for cell in cells):
        raise typer.Exit(Exit.NO)


def make_matrix(
    registry: Registry, base: Request, variables: Mapping[str, str], named: Mapping[str, Sequence[str] | None]
) -> Iterator[Cell]:
    """Resolve every combination, as ``Fabric(...)`` would, and start nothing.

    Args:
        registry: What is installed.
        base: Everything else of the request.
        variables: The environment variables.
        named: For each of the kinds what to combine; ``None`` is all that is installed, but no wrapper.
    """
    kinds = ("accelerator", "strategy", "precision")
    axes = [list(named[kind] or plugin_texts(registry, kind)) for kind in kinds]
    given = named["wrapper"] or ()
    wrappers = plugin_texts(registry, "wrapper") if _ALL in given else list(given)
    missing = {
        (kind, text): option
        for kind, texts in zip((*kinds, "wrapper"), (*axes, wrappers), strict=True)
        for text in texts
        for option in _missing(registry, kind, text)
    }
    rest = {name: one for name, one in base.arguments().items() if name not in kinds}
    with progress("combining", math.prod(map(len, axes)) * (len(wrappers) + 1)) as advance:
        beside: list[str | None] = [None, *wrappers]
        for (accelerator, wrapper), strategy, precision in itertools.product(
            itertools.product(axes[0], beside), axes[1], axes[2]
        ):
            cell = Cell(accelerator, strategy, precision, wrapper, NOT_TRIED)
            needs = [
                f"the {kind} {getattr(cell, kind)!r} needs {missing[kind, getattr(cell, kind)]}"
                for kind in (*kinds, "wrapper")
                if (kind, getattr(cell, kind)) in missing
            ]
            yield (
                replace(cell, reason=f"{needs[0]}, an option without a default")
                if needs
                else _asked(cell, rest, variables)
            )
            advance(1, f"{accelerator} {strategy} {precision}")


def _asked(cell: Cell, rest: Mapping[str, Any], variables: Mapping[str, str]) -> Cell:
    wrappers = [*rest.get("wrappers", ()), *([] if cell.wrapper is None else [cell.wrapper])]
    given = {"accelerator": cell.accelerator, "strategy": cell.strategy, "precision": cell.precision}
    try:
        request = Request.of(**{**rest, **given, "wrappers": wrappers or None})
        plan = make_plan(request, variables)
    except FabricError as error:
        return replace(cell, status=REFUSED, reason=_reason(error), error=error)
    return replace(cell, status=WORKS, request=request, processes=plan.world_size)


def _reason(error: FabricError) -> str:
    """Give the reason alone, for a table: what was got says it where choices don't fit together."""
    name, colon, reason = error.got.partition(": ") if isinstance(error.got, str) else ("", "", "")
    return reason if colon and f"{name!r}" in error.what else error.what


def plugin_texts(registry: Registry, kind: str) -> list[str]:
    """Name every plugin of a kind once, by its first name; with each way in which its options are preset."""
    offers = registry.offers(kind)
    texts: dict[Any, str] = {}
    for offer in sorted(offers, key=_is_alias):
        twins = sum(one.name == offer.name for one in offers) > 1
        text = f"{offer.distribution}/{offer.name}" if twins else offer.name
        texts.setdefault(_identity(offer), text)
    return sorted(texts.values())


def _is_alias(offer: Offer) -> bool:
    try:
        return offer.is_alias
    except FabricError:
        return False


def _identity(offer: Offer) -> Any:
    try:
        preset = offer.load()
    except FabricError:
        return offer
    return preset.plugin, repr(preset.options)


def _missing(registry: Registry, kind: str, text: str) -> list[str]:
    """Give the options without a default that a text leaves out.

    Raises:
        RequestError: The text can't be parsed.
        UnknownPluginError: Nobody offers that name.
    """
    try:
        ref = parse_plugin(text, kind)
        if ref.is_auto:
            return []
        preset = registry.find(kind, ref.name, ref.distribution).load()
    except (RequestError, UnknownPluginError):
        raise
    except FabricError:
        return []  # the resolve says what is wrong
    given = {**preset.options, **ref.options}
    return [name for name, one in preset.plugin.Options.model_fields.items() if one.is_required() and name not in given]


def try_cells(cells: Sequence[Cell]) -> Iterator[Cell]:
    """Train in each cell that should work, on as many processes as it would have, on this node."""
    from fabric_core.conformance.pool import RankHang, RankPool, RankRaised
    from fabric_core.conformance.smallest import train

    with ExitStack() as stack, progress("training", len(cells)) as advance:
        pools: dict[int, RankPool] = {}
        for cell in cells:
            advance(1, f"{cell.accelerator} {cell.strategy} {cell.precision}")
            failure = ""
            if cell.request is None:
                yield cell
                continue
            if cell.request.num_nodes > 1:
                yield replace(cell, status=NOT_TRIED, reason="it needs several nodes")
                continue
            if cell.processes not in pools:
                pools[cell.processes] = stack.enter_context(RankPool(cell.processes))
            try:
                pools[cell.processes].run(train, cell.request.arguments())
            except RankRaised as error:
                failure = f"rank {error.rank}: {_last_line(error.trace)}"
            except RankHang as error:
                failure = str(error).partition("\n")[0]
            yield replace(cell, tried=failure)


def _last_line(trace: str) -> str:
    """Give the exception of a traceback: its last line that isn't indented."""
    lines = [line for line in trace.splitlines() if line and not line.startswith(" ")]
    return lines[-1] if lines else trace


def _print(cells: Sequence[Cell]) -> None:
    """Print a table for each accelerator and wrapper, with the reasons below it."""
    for (accelerator, wrapper), group in itertools.groupby(cells, lambda one: (one.accelerator, one.wrapper)):
        own = list(group)
        title = accelerator if wrapper is None else f"{accelerator} with {wrapper}"
        refusals = {one.reason for one in own if one.status == REFUSED}
        if len(refusals) == 1 and not any(one.status == WORKS for one in own):
            print_text(f"{title}: {REFUSED}: {refusals.pop()}\n")
            continue
        reasons = list(dict.fromkeys(filter(None, (one.tried or one.reason for one in own))))
        strategies = list(dict.fromkeys(one.strategy for one in own))
        precisions = list(dict.fromkeys(one.precision for one in own))
        texts = {(one.strategy, one.precision): one.shown for one in own}
        for one in own:
            if one.tried or one.reason:
                texts[one.strategy, one.precision] += f" {reasons.index(one.tried or one.reason) + 1}"
        print_text(title, style="bold")
        for columns in _fitting(strategies, precisions, texts):
            rows = [(strategy, *(texts[strategy, one] for one in columns)) for strategy in strategies]
            print_table(("strategy", *columns), rows)
        for number, reason in enumerate(reasons, 1):
            print_text(f"  {number}  {reason}")
        print_text("")


def _fitting(
    strategies: Sequence[str], precisions: Sequence[str], texts: Mapping[tuple[str, str], str]
) -> Iterator[list[str]]:
    """Part the columns where a terminal is too narrow for all of them."""
    console = Console()
    room = console.width if console.is_terminal else math.inf
    columns: list[str] = []
    first = max(map(len, ("strategy", *strategies))) + 4
    width = first
    for precision in precisions:
        own = max(len(precision), *(len(texts[one, precision]) for one in strategies)) + 3
        if columns and width + own > room:
            yield columns
            columns, width = [], first
        columns.append(precision)
        width += own
    yield columns
