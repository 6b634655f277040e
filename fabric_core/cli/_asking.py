"""How a command is asked for a plan: an option for each argument of ``Fabric``, and one for a configuration file."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fabric_core.assembly import make_plan, make_registry
from fabric_core.choosing.plan import Plan
from fabric_core.choosing.registry import Registry
from fabric_core.choosing.request import Request, fill, read_outside
from fabric_core.kinds import KINDS, Count, argument_defaults, groups
from fabric_core.running.launching import environment

__all__ = ["Config", "arguments_of", "asking", "completer", "find_registry", "plan_of", "request_of"]

Config = Annotated[Path | None, typer.Option(help="A configuration file, TOML or YAML.")]


def asking(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each argument of ``Fabric``, and one for a configuration file.

    The command takes them as keywords, which it passes to ``plan_of`` or ``request_of``.
    """

    def run(**given: Any) -> None:
        command(**given)

    own = [one for one in inspect.signature(command).parameters.values() if one.kind is not one.VAR_KEYWORD]
    more = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for option, (_, annotation, default) in _options().items()
        if option not in inspect.signature(command).parameters
    ]
    more.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, annotation=Config, default=None))
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, *more)]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _options() -> dict[str, tuple[str, Any, Any]]:
    """Give the options that stand for arguments of ``Fabric``: each with the argument, its type and its default."""
    kinds = {kind.argument: kind for kind in KINDS.values()}
    found: dict[str, tuple[str, Any, Any]] = {}
    for name, default in argument_defaults().items():
        kind = kinds.get(name)
        complete = None if kind is None else completer(kind.name)
        if name == "plugins" or (kind is not None and kind.count is Count.MANY):
            several = typer.Option(help="May be given several times.", autocompletion=complete)
            option = "plugin" if kind is None else kind.name
            found[option] = (name, Annotated[list[str] | None, several], None)
        elif name not in {"callbacks", "check", "warn_after"}:  # those choose nothing
            plain = int if name == "num_nodes" else str if default else str | None
            found[name] = (name, Annotated[plain, typer.Option(autocompletion=complete)], default)
    return found


def completer(*kinds: str) -> Callable[[str], list[str]]:
    """Make the function that gives a shell the names of plugins; of all kinds where none is given."""

    def complete(incomplete: str) -> list[str]:
        names = {offer.name for kind in kinds or groups() for offer in find_registry().offers(kind)}
        return sorted(name for name in names if name.startswith(incomplete))

    return complete


def arguments_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Give the arguments of ``Fabric`` that a command's options stand for."""
    return {argument: asked[option] for option, (argument, _, _) in _options().items() if option in asked}


def request_of(config: Path | None = None, **asked: Any) -> tuple[Request, Mapping[str, str]]:
    """Make the request of a command's options, the variables and the configuration file; and give the variables."""
    variables = environment()
    return Request.of(
        **fill(arguments_of(asked), read_outside(variables, *(() if config is None else (config,))))
    ), variables


def plan_of(**asked: Any) -> Plan:
    """Make the plan of a command's options, the variables and the configuration file."""
    return make_plan(*request_of(**asked))


def find_registry() -> Registry:
    """Give what is installed, but for what the variables switch off, or lock out."""
    variables = environment()
    return make_registry(variables, variables.get("FABRIC_LOCK") or None)
