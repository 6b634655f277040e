"""The command line: ``fabric-core`` or ``python -m fabric_core``."""

import warnings
from collections.abc import Callable
from typing import Annotated, Any, Final

import typer

import fabric_core
from fabric_core.choosing.plan import processes
from fabric_core.cli._asking import asking, plan_of
from fabric_core.cli._checkpoint import checkpoint
from fabric_core.cli._cluster import doctor
from fabric_core.cli._config import check_config, make_config, print_schema
from fabric_core.cli._conformance import conformance
from fabric_core.cli._describe import contract_page
from fabric_core.cli._estimate import estimate
from fabric_core.cli._lock import lock_plugins
from fabric_core.cli._matrix import matrix
from fabric_core.cli._new import new
from fabric_core.cli._output import AsJson, print_json, print_table, print_text, run_to_the_end
from fabric_core.cli._plugins import examine_plugins, list_plugins, show_plugin, why_plugin
from fabric_core.cli._run import run
from fabric_core.errors import FabricWarning, RequestError
from fabric_core.kinds import groups

__all__ = ["main"]

_Version = Annotated[bool, typer.Option("--version", help="Print the version.")]

_ENDS: Final = "Exit codes: 0 yes, 1 no, 2 it can't be done as asked, 3 a bug, 130 interrupted."


def explain(as_json: AsJson = False, **asked: Any) -> None:
    """Show what ``Fabric(...)`` would choose, and why."""
    chosen = plan_of(**asked)
    if as_json:
        print_json(chosen.as_dict())
        return
    rows = []
    for choice in chosen.choices:
        rejected = "\n".join(f"{name}: {reason}" for name, reason in choice.rejected)
        rows.append((choice.kind, choice.text, choice.distribution, choice.reason, rejected))
    print_table(("kind", "choice", "from", "because", "instead of"), rows)
    print_text(f"{processes(chosen.world_size)}, devices {list(chosen.device_indices)}")


def contract(
    kind: Annotated[str, typer.Argument(help="A kind, or extension.", autocompletion=lambda: list(groups()))],
    as_json: AsJson = False,
) -> None:
    """Print the reference of a contract as Markdown: what a plugin of a kind, or an extension, must and may have."""
    if kind not in groups():
        raise RequestError("there is no such kind", got=kind, instead=f"one of {', '.join(groups())}")
    page = contract_page(kind).rstrip()
    if as_json:
        print_json({"kind": kind, "page": page})
    else:
        typer.echo(page)


def _start(context: typer.Context, version: _Version = False) -> None:
    if version:
        typer.echo(f"fabric-core {fabric_core.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


def _add(app: typer.Typer, name: str, command: Callable[..., None], example: str, **settings: Any) -> None:
    """Add a command, with an example in its help."""
    app.command(name, epilog=f"Example: fabric-core {example}", **settings)(command)


def _make_app() -> typer.Typer:
    """Put the commands together; those that ask for a plan have the options that the table of kinds gives now."""
    app = typer.Typer(help="Look into plugins and plans.", epilog=_ENDS, pretty_exceptions_enable=False)
    app.callback(invoke_without_command=True)(_start)
    plugins = typer.Typer(no_args_is_help=True, help="The plugins that are installed.")
    app.add_typer(plugins, name="plugins")
    _add(plugins, "list", list_plugins, "plugins list")
    _add(plugins, "show", show_plugin, "plugins show ddp")
    _add(plugins, "doctor", examine_plugins, "plugins doctor --json")
    _add(plugins, "lock", lock_plugins, "plugins lock fabric.lock --check")
    _add(plugins, "matrix", matrix, "plugins matrix --accelerator cpu --devices 2 --tried")
    _add(plugins, "why", asking(why_plugin), "plugins why ddp --accelerator cpu --devices 2")
    app.add_typer(checkpoint, name="checkpoint")
    config = typer.Typer(no_args_is_help=True, help="Configuration files: make one, check one, and their schema.")
    app.add_typer(config, name="config")
    _add(config, "make", asking(make_config), "config make run.toml --strategy ddp --devices 2")
    _add(config, "check", check_config, "config check run.toml --elsewhere")
    _add(config, "schema", print_schema, "config schema > fabric.schema.json")
    _add(app, "conformance", conformance, "conformance accelerator:cpu --rule ACC-101")
    _add(app, "new", new, "new strategy my_strategy --author Ada")
    _add(app, "explain", asking(explain), "explain --strategy ddp --devices 2")
    _add(app, "doctor", asking(doctor), "doctor --accelerator cpu --strategy ddp --devices 2")
    _add(app, "estimate", asking(estimate), "estimate my_models:make --strategy fsdp --devices 2")
    _add(app, "contract", contract, "contract strategy")
    options = {"allow_interspersed_args": False}
    _add(app, "run", run, "run --devices 4 --strategy fsdp train.py --lr 0.1", context_settings=options)
    return app


def main() -> None:
    """Run the command line; a user's mistake is a message, and JSON where ``--json`` was given."""
    warnings.simplefilter("always", FabricWarning)
    run_to_the_end(_make_app())
