"""What every command prints, and how it ends.

[Note: exit codes] 0: done, and the answer is yes. 1: done, and the answer is no: a plugin is unsound, two checkpoints
differ. 2: it can't be done: a mistake in what was asked for, or something is missing here. 3: a bug, in this package or
in a plugin; its traceback is on the error stream. 130: interrupted.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from enum import IntEnum
from threading import Timer
from typing import Annotated, Any, Final, TextIO

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from fabric_core.errors import FabricError

__all__ = [
    "AsJson",
    "Exit",
    "as_dict",
    "handing_on",
    "print_json",
    "print_table",
    "print_text",
    "progress",
    "run_to_the_end",
]

_WIDEST: Final = 100_000
_PATIENCE: Final = 2.0
"""After how many seconds a bar is worth its place."""

_CLICK_ERROR: Final[type[Exception]] = next(
    one for one in typer.BadParameter.__mro__ if issubclass(one, Exception) and one.__name__ == "ClickException"
)
"""The base of the errors in words; typer has a click of its own, or uses the one that is installed."""


class Exit(IntEnum):
    """How a command ends ([Note: exit codes])."""

    YES = 0
    NO = 1
    MISTAKE = 2
    BUG = 3
    INTERRUPTED = 130


_output: TextIO | None = None
"""What was standard output, where JSON was asked for: only what ``print_json`` prints goes there."""


def print_json(data: Any, *, plain: bool = False) -> None:
    """Print data as JSON, with colours on a terminal unless it is to be plain."""
    console = Console(file=_output)
    if console.is_terminal and not plain:
        console.print_json(data=data)
    else:
        typer.echo(json.dumps(data, indent=2, ensure_ascii=False), file=_output)


@contextmanager
def _data_alone() -> Iterator[None]:
    """Let what else is printed, by plugins, what they import and the ranks that they start, go to the error stream."""
    global _output  # noqa: PLW0603 - the process has one
    before, encoding = sys.stdout, sys.stdout.encoding
    before.flush()
    kept = os.dup(1)
    _output = os.fdopen(os.dup(1), "w", encoding=encoding) if before is sys.__stdout__ else before
    sys.stdout = sys.stderr
    os.dup2(2, 1)
    try:
        yield
    finally:
        if _output is not before:
            with suppress(BrokenPipeError):  # whoever read it has seen enough
                _output.close()
        sys.stdout, _output = before, None
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def handing_on() -> Iterator[None]:
    """Let processes that run this command too have the standard output: one of them prints the data."""
    if _output is None:
        yield
        return
    os.dup2(_output.fileno(), 1)
    try:
        yield
    finally:
        os.dup2(2, 1)


def _keep_data_alone(context: typer.Context, value: bool) -> bool:
    if value and not context.resilient_parsing:
        context.with_resource(_data_alone())
    return value


_JSON: Final[Any] = typer.Option(
    "--json",
    help="Print JSON, errors too, and nothing else on standard output.",
    callback=_keep_data_alone,
    is_eager=True,  # before other options, whose values may load plugins
)
AsJson = Annotated[bool, _JSON]


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; where the output is no terminal, nothing of it is cut."""
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console()
    if not console.is_terminal:
        # For a file or a pipe every row is as wide as it is: nothing is cut, and a path can be searched for.
        console = Console(
            width=max(console.width, Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum)
        )
    console.print(table)


def print_text(text: str, *, style: str | None = None, error: bool = False) -> None:
    """Print text as it is, without wrapping it."""
    Console(stderr=error).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress(what: str, total: float, *, in_bytes: bool = False) -> Iterator[Callable[[float, str], None]]:
    """Show on a terminal how far a command is, once it has taken two seconds.

    Args:
        what: What it does, in a word or two.
        total: How much there is to do.
        in_bytes: It is a number of bytes, of which the speed is worth showing.

    Yields:
        A function to call with how much more is done, and with what is under way now.
    """
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    text = "{task.description} {task.fields[now]}"
    counted = (DownloadColumn(), Speed()) if in_bytes else (MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(TextColumn(text, markup=False), BarColumn(), *counted, console=console, transient=True)
    task = bar.add_task(what, total=total, now="")
    late = Timer(_PATIENCE, bar.start)
    late.daemon = True
    if console.is_terminal:
        late.start()

    def advance(done: float, now: str) -> None:
        bar.update(task, advance=done, now=now)

    try:
        yield advance
    finally:
        late.cancel()
        bar.stop()


def as_dict(error: Exception) -> dict[str, Any]:
    """Give an error as data: its class, and what, where, got and instead, as far as it says them."""
    if isinstance(error, FabricError):
        parts = {"what": error.what, "where": error.where, "got": error.got, "instead": error.instead}
    else:
        message = error.format_message() if isinstance(error, _CLICK_ERROR) else str(error)  # type: ignore[attr-defined]
        parts = {"what": message, "where": None, "got": None, "instead": None}
    shown = {name: one if one is None or isinstance(one, str) else repr(one) for name, one in parts.items()}
    return {"error": {"type": type(error).__name__, **shown}}


def run_to_the_end(app: typer.Typer) -> None:
    """Run a command line, and end the process: a mistake is a message, or JSON where JSON was asked for.

    Raises:
        SystemExit: Always.
    """
    in_json = "--json" in sys.argv[1:]
    try:
        code = typer.main.get_command(app).main(prog_name="fabric-core", standalone_mode=not in_json)
    except KeyboardInterrupt:
        code = Exit.INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has seen enough; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = Exit.NO
    except (FabricError, OSError, _CLICK_ERROR) as error:
        if in_json:
            print_json(as_dict(error))
        else:
            print_text(f"{error}", style="red", error=True)
        code = Exit.MISTAKE
    except Exception as error:  # noqa: BLE001 - a bug, or what a plugin raised
        if in_json:
            print_json(as_dict(error))
        traceback.print_exc()
        code = Exit.BUG
    raise SystemExit(int(code or Exit.YES))
