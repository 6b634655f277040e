"""``fabric-core conformance``: whether plugins keep the contract of their kind, from the command line."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console

from fabric_core.cli._output import AsJson, Exit, print_json
from fabric_core.errors import RequestError

if TYPE_CHECKING:
    from fabric_core.conformance import Report, Subject
    from fabric_core.conformance.runner import Verdict

__all__ = ["conformance"]

_WORKERS: Final = 4
"""How many plugins are judged at once at most by default."""


def conformance(
    plugins: Annotated[
        list[str],
        typer.Argument(
            help="kind:name[:option=value,...], as in strategy:my_strategy; kind:module:Class; or kind:* for all of it."
        ),
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
    report: Annotated[
        Path | None, typer.Option(help="Write JSON here, Markdown and a badge beside it; for one plugin.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"How many plugins are judged at once; as many as there are cores by default, up to {_WORKERS}."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Judge plugins by the rules of their kind; exit code 1 where one breaks one, or none could be checked."""
    from fabric_core.conformance.many import run_many

    subjects = [found for plugin in plugins for found in _subjects(plugin)]
    if report is not None and len(subjects) > 1:
        raise RequestError("one report is for one plugin", where="--report", got=f"{len(subjects)} plugins",
                           instead="--json, which prints all reports")  # fmt: skip
    progress = _Progress() if sys.stderr.isatty() else None
    judged = run_many(
        [subject for _, subject in subjects],
        workers=workers or min(os.cpu_count() or 1, _WORKERS),
        progress=progress,
        world_sizes=world_size or (1, 2),
        device=device,
        expected=dict(map(_expected, xfail or ())),
        only=rule or None,
        seed=seed,
        report=report,
    )
    results = []
    with contextlib.closing(judged):
        for (shown, _), result in zip(subjects, judged, strict=True):
            results.append(result)
            if progress is not None:
                progress.clear()
            if not as_json:
                _print(shown, result)
    if as_json:
        print_json([result.as_dict() for result in results])
    if not all(result.passed for result in results):
        raise typer.Exit(Exit.NO)


def _subjects(plugin: str) -> "Iterator[tuple[str, Subject]]":
    """Find what is meant, and how to show it: one plugin, or by ``kind:*`` each that is installed, once.

    What can't be made without options is named on standard error, and left out.
    """
    from fabric_core.cli._asking import find_registry
    from fabric_core.conformance import Subject
    from fabric_core.errors import FabricError, OptionError

    kind, _, name = plugin.partition(":")
    if not name:
        raise RequestError(
            "what to judge can't be parsed",
            where="fabric-core conformance",
            got=plugin,
            instead="strategy:my_strategy",
        )
    if name != "*":
        yield name, Subject.of(kind, name)
        return
    seen = set()
    for offer in find_registry().offers(kind):
        subject = Subject.of(kind, f"{offer.distribution}/{offer.name}")
        try:
            preset = subject.load()
            preset.plugin.parse_options(preset.options)
        except OptionError as error:
            said = str(error).partition("\n")[0]
            named = f"{kind}:{offer.name}:NAME=VALUE"
            typer.echo(f"{kind} {offer.name}: not judged: {said}; give it what it needs, {named}", err=True)
            continue
        except FabricError:
            yield offer.name, subject  # a rule says why
            continue
        if (preset.plugin, repr(preset.options)) not in seen:
            seen.add((preset.plugin, repr(preset.options)))
            yield offer.name, subject


class _Progress:
    """Writes over one line of a terminal how far it is, and how long it may still take."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def __call__(self, subject: "Subject", verdict: "Verdict", count: int, total: int) -> None:
        left = (time.monotonic() - self._begin) / count * (total - count)
        text = f"{subject.kind} {subject.name}: {count} of {total} rules, {verdict.rule}, some {left:.0f} s left"
        sys.stderr.write(f"\r{text:<79}")
        sys.stderr.flush()

    def clear(self) -> None:
        """Make room for what is printed."""
        sys.stderr.write("\r" + " " * 79 + "\r")
        sys.stderr.flush()


def _print(shown: str, result: "Report") -> None:
    console = Console()
    for verdict in result.failures:
        console.print(verdict.message, markup=False, highlight=False, soft_wrap=True)
        console.print()
    counts = ", ".join(f"{count} {status}" for status, count in result.as_dict()["counts"].items())
    profiles = ", ".join(f"{profile} {'kept' if kept else 'broken'}" for profile, kept in result.profiles().items())
    console.print(
        f"{result.subject.kind} {shown}: {profiles or result.summary} ({counts})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _expected(given: str) -> tuple[str, str]:
    rule, _, reason = given.partition("=")
    return rule.strip(), reason
