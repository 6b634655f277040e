"""``fabric-core conformance``: whether a plugin keeps the contract of its kind, from the command line."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fabric_core.errors import RequestError

__all__ = ["conformance"]


def conformance(
    plugin: Annotated[
        str, typer.Argument(help="kind:name[:option=value,...], as in strategy:my_strategy; or kind:module:Class.")
    ],
    device: Annotated[str | None, typer.Option(help="The accelerator to run on; the CPU by default.")] = None,
    world_size: Annotated[
        list[int] | None, typer.Option(help="May be given several times; 1 and 2 by default.")
    ] = None,
    rule: Annotated[
        list[str] | None, typer.Option(help="Judge by this rule alone; may be given several times.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the examples; the same ones always by default.")] = None,
    xfail: Annotated[
        list[str] | None, typer.Option(help='A rule that it is known to break, as "ID=reason"; several times.')
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write JSON here, Markdown and a badge beside it.")] = None,
) -> None:
    """Judge a plugin by the rules of its kind; exit code 1 where it breaks one, or none could be checked."""
    from fabric_core.conformance import Subject, run_rules

    kind, _, name = plugin.partition(":")
    if not name:
        raise RequestError(
            "what to judge can't be parsed",
            where="fabric-core conformance",
            got=plugin,
            instead="strategy:my_strategy",
        )
    result = run_rules(
        Subject.of(kind, name),
        world_sizes=world_size or (1, 2),
        device=device,
        expected=dict(map(_expected, xfail or ())),
        only=rule or None,
        seed=seed,
        report=report,
    )
    console = Console()
    for verdict in result.failures:
        console.print(verdict.message, markup=False, highlight=False, soft_wrap=True)
        console.print()
    counts = ", ".join(f"{count} {status}" for status, count in result.as_dict()["counts"].items())
    profiles = ", ".join(f"{profile} {'kept' if kept else 'broken'}" for profile, kept in result.profiles().items())
    console.print(
        f"{kind} {name}: {profiles or result.summary} ({counts})", markup=False, highlight=False, soft_wrap=True
    )
    if not result.passed:
        raise typer.Exit(1)


def _expected(given: str) -> tuple[str, str]:
    rule, _, reason = given.partition("=")
    return rule.strip(), reason
