"""The command line: ``fabric`` or ``python -m fabric_core``."""

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fabric_core.errors import FabricError
from fabric_core.registry import GROUPS, Registry

__all__ = ["main"]

app = typer.Typer(no_args_is_help=True, help="Look into plugins and plans.", add_completion=False)
plugins = typer.Typer(no_args_is_help=True, help="The plugins that are installed.")
app.add_typer(plugins, name="plugins")

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@plugins.command("list")
def list_plugins(as_json: _AsJson = False) -> None:
    """List what could be chosen; imports no plugin."""
    registry = Registry()
    offers = [offer for kind in GROUPS for offer in registry.offers(kind)]
    if as_json:
        _print_json(
            [
                {name: getattr(offer, name) for name in ("kind", "name", "distribution", "version", "value")}
                for offer in offers
            ]
        )
        return
    table = Table("kind", "name", "distribution", "where")
    for offer in offers:
        table.add_row(offer.kind, offer.name, f"{offer.distribution} {offer.version}", offer.value)
    Console().print(table)


@app.command()
def explain(
    accelerator: str = "auto",
    strategy: str = "auto",
    devices: str = "auto",
    num_nodes: int = 1,
    precision: str = "auto",
    wrapper: Annotated[list[str] | None, typer.Option(help="May be given several times.")] = None,
    as_json: _AsJson = False,
) -> None:
    """Show what ``Fabric(...)`` would choose, and why."""
    from fabric_core.fabric import Fabric

    fabric = Fabric(
        accelerator=accelerator,
        strategy=strategy,
        devices=devices,
        num_nodes=num_nodes,
        precision=precision,
        wrappers=wrapper,
    )
    if as_json:
        _print_json(fabric.plan.as_dict())
        return
    table = Table("kind", "choice", "from", "because", "instead of")
    for choice in fabric.plan.choices:
        rejected = "\n".join(f"{name}: {reason}" for name, reason in choice.rejected)
        table.add_row(choice.kind, choice.name, choice.distribution, choice.reason, rejected)
    console = Console()
    console.print(table)
    console.print(f"{fabric.plan.world_size} process(es), devices {list(fabric.plan.device_indices)}")


def _print_json(data: Any) -> None:
    Console().print_json(data=data)


def main() -> None:
    """Run the command line; an error of the project is a message and exit code 2."""
    try:
        app()
    except FabricError as error:
        Console(stderr=True).print(f"{error}", style="red", markup=False)
        raise SystemExit(2) from None
