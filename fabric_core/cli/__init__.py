"""The command line: ``fabric-core`` or ``python -m fabric_core``."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

import fabric_core
from fabric_core.assembly import make_plan, make_registry
from fabric_core.choosing.offers import Offer
from fabric_core.choosing.plan import Plan, processes
from fabric_core.choosing.registry import Registry
from fabric_core.choosing.request import Request, fill, read_environment, read_file
from fabric_core.cli._checkpoint import checkpoint
from fabric_core.cli._conformance import conformance
from fabric_core.cli._describe import contract_page, field_type, meanings
from fabric_core.cli._new import new
from fabric_core.cli._run import run
from fabric_core.errors import FabricError, FabricWarning, RequestError, UnknownPluginError
from fabric_core.kinds import EXTENSION, KINDS, Count, argument_defaults, groups
from fabric_core.running.launching import environment

__all__ = ["main"]

_AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_Config = Annotated[Path | None, typer.Option(help="A configuration file, TOML or YAML.")]
_WIDEST: Final = 100_000
_Listed = Annotated[list[str] | None, typer.Option(help="May be given several times.")]


def list_plugins(as_json: _AsJson = False) -> None:
    """List what could be chosen; imports no plugin."""
    offers = _offers()
    if as_json:
        _print_json([_as_dict(offer) for offer in offers])
        return
    _print_table(
        ("kind", "name", "distribution", "where"),
        [(offer.kind, offer.name, offer.owner, offer.value) for offer in offers],
    )


def show_plugin(name: str, as_json: _AsJson = False) -> None:
    """Show what a plugin is, what it declares, and its options; imports it."""
    shown_offers = [_described(offer) for offer in _named(name)]
    if as_json:
        _print_json(shown_offers)
        return
    for one in shown_offers:
        _print(f"{one['kind']} {one['name']}", style="bold")
        _print(f"  {one['distribution']} {one['version']}, {one['value']}")
        if one["error"] is not None:
            _print(one["error"], style="red")
            continue
        _print(f"  {one['summary']}")
        if one["preset"]:
            _print(f"  presets: {one['preset']}")
        if one["options"]:
            rows = [(key, *(str(part) for part in about)) for key, about in one["options"].items()]
            _print_table(("option", "type", "default", "meaning"), rows)
        if one["declares"]:
            _print_table(("declares", "value"), [(key, str(value)) for key, value in one["declares"].items()])


def examine_plugins(
    as_json: _AsJson = False,
    timeout: Annotated[float, typer.Option(help="How many seconds a plugin may take to be imported.")] = 30.0,
) -> None:
    """Import every plugin, each in a process of its own, and say which are sound; exit code 1 where one isn't."""
    from dataclasses import asdict

    from fabric_core.cli._doctor import SOUND, examine

    findings = list(examine(_registry(), timeout))
    if as_json:
        _print_json([asdict(finding) for finding in findings])
    else:
        _print_table(
            ("kind", "name", "distribution", "status", "seconds", "note"),
            [(one.kind, one.name, one.distribution, one.status, f"{one.seconds:.2f}", one.note) for one in findings],
        )
    if any(finding.status not in SOUND for finding in findings):
        raise typer.Exit(1)


def why_plugin(name: str, as_json: _AsJson = False, **asked: Any) -> None:
    """Say why a plugin would be chosen for a request, or why not."""
    offers = _named(name)
    chosen = _plan(**asked)
    answers = [{**_as_dict(offer), **_why(chosen, offer)} for offer in offers]
    if as_json:
        _print_json(answers)
        return
    for answer in answers:
        verdict = "chosen" if answer["chosen"] else "not chosen"
        _print(f"{answer['kind']} {answer['name']}: {verdict}, {answer['reason']}")


def explain(as_json: _AsJson = False, **asked: Any) -> None:
    """Show what ``Fabric(...)`` would choose, and why."""
    chosen = _plan(**asked)
    if as_json:
        _print_json(chosen.as_dict())
        return
    rows = []
    for choice in chosen.choices:
        rejected = "\n".join(f"{name}: {reason}" for name, reason in choice.rejected)
        rows.append((choice.kind, choice.text, choice.distribution, choice.reason, rejected))
    _print_table(("kind", "choice", "from", "because", "instead of"), rows)
    _print(f"{processes(chosen.world_size)}, devices {list(chosen.device_indices)}")


def contract(kind: str) -> None:
    """Print the reference of a contract as Markdown: what a plugin of a kind, or an extension, must and may have."""
    if kind not in groups():
        raise RequestError("there is no such kind", got=kind, instead=f"one of {', '.join(groups())}")
    typer.echo(contract_page(kind).rstrip())


def schema() -> None:
    """Print the JSON Schema of a configuration file, with the options of the plugins that are installed."""
    from fabric_core.cli._schema import make_schema

    _print_json(make_schema(_registry()))


def _asking(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command an option for each argument of ``Fabric``, and one for a configuration file."""

    def run(**given: Any) -> None:
        command(**given)

    own = [one for one in inspect.signature(command).parameters.values() if one.kind is not one.VAR_KEYWORD]
    more = [
        inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)
        for option, (_, annotation, default) in _options().items()
    ]
    more.append(inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, annotation=_Config, default=None))
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in (*own, *more)]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def _options() -> dict[str, tuple[str, Any, Any]]:
    """Give the options that stand for arguments of ``Fabric``: each with the argument, its type and its default."""
    several = {kind.argument: kind.name for kind in KINDS.values() if kind.count is Count.MANY}
    found: dict[str, tuple[str, Any, Any]] = {}
    for name, default in argument_defaults().items():
        if name in several or name == "plugins":
            found[several.get(name, "plugin")] = (name, _Listed, None)
        elif name not in {"callbacks", "check", "warn_after"}:  # those choose nothing
            found[name] = (name, int if name == "num_nodes" else str if default else str | None, default)
    return found


def _plan(config: Path | None = None, **asked: Any) -> Plan:
    variables = environment()
    code = {argument: asked[option] for option, (argument, _, _) in _options().items()}
    file = {} if config is None else read_file(config)
    return make_plan(Request.of(**fill(code, read_environment(variables), file)), variables)


def _registry() -> Registry:
    return make_registry(environment())


def _offers() -> list[Offer]:
    registry = _registry()
    return [offer for kind in groups() for offer in registry.offers(kind)]


def _named(name: str) -> list[Offer]:
    """Find the offers of a name, with or without the distribution before it, whatever the kind."""
    owner, _, bare = name.rpartition("/")
    offers = _offers()
    found = [
        offer
        for offer in offers
        if offer.name.casefold() == bare.casefold() and owner.casefold() in {"", offer.distribution.casefold()}
    ]
    if found:
        return found
    from difflib import get_close_matches

    near = get_close_matches(bare, sorted({offer.name for offer in offers}), n=3)
    raise UnknownPluginError(
        f"there is no plugin {name!r}",
        instead=(f"did you mean {' or '.join(map(repr, near))}? " if near else "")
        + "`fabric-core plugins list` shows all",
    )


def _as_dict(offer: Offer) -> dict[str, Any]:
    return {field: getattr(offer, field) for field in ("kind", "name", "distribution", "version", "value")}


def _described(offer: Offer) -> dict[str, Any]:
    about: dict[str, Any] = {
        **_as_dict(offer),
        "error": None,
        "summary": "",
        "preset": {},
        "options": {},
        "declares": {},
    }
    try:
        loaded: Any = type(offer.make_extension()) if offer.kind == EXTENSION else offer.load()
    except FabricError as error:
        about["error"] = str(error)
        return about
    plugin = loaded if offer.kind == EXTENSION else loaded.plugin
    about["summary"] = (plugin.__doc__ or "").strip().partition("\n")[0]
    if offer.kind == EXTENSION:
        return about
    about["preset"] = {key: str(value) for key, value in loaded.options.items()}
    meaning = meanings(plugin.Options)
    for key, info in plugin.Options.model_fields.items():
        default = "required" if info.is_required() else repr(info.get_default(call_default_factory=True))
        about["options"][key] = (field_type(info.annotation), default, meaning.get(key, ""))
    declared = getattr(plugin, "capabilities", None)
    about["declares"] = {} if declared is None else declared.model_dump(mode="json")
    return about


def _why(chosen: Plan, offer: Offer) -> dict[str, Any]:
    of_kind = [choice for choice in chosen.choices if choice.kind == offer.kind]
    for choice in of_kind:
        if choice.name == offer.name and choice.distribution == offer.owner:
            return {"chosen": True, "reason": choice.reason}
    for choice in of_kind:
        for name, reason in choice.rejected:
            if name == offer.name:
                return {"chosen": False, "reason": reason}
    try:
        if offer.kind != EXTENSION and offer.is_alias:
            return {"chosen": False, "reason": "it is another name for a plugin, never chosen unless it is named"}
        if offer.auto is None and not any(choice.reason.startswith("named") for choice in of_kind):
            return {"chosen": False, "reason": "it isn't offered to the automatic choice, so it must be named"}
    except FabricError as error:
        return {"chosen": False, "reason": error.what}
    names = ", ".join(choice.name for choice in of_kind) or "none"
    return {"chosen": False, "reason": f"the request leaves it out: {names}"}


def _print_json(data: Any) -> None:
    Console().print_json(data=data)


def _print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
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


def _print(text: str, *, style: str | None = None, error: bool = False) -> None:
    """Print text as it is, without wrapping it."""
    Console(stderr=error).print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fabric-core {fabric_core.__version__}")
        raise typer.Exit


def _versioned(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Look into plugins and plans."""


def _make_app() -> typer.Typer:
    """Put the commands together; those that ask for a plan have the options that the table of kinds gives now."""
    app = typer.Typer(no_args_is_help=True, help="Look into plugins and plans.", add_completion=False)
    app.callback()(_versioned)
    plugins = typer.Typer(no_args_is_help=True, help="The plugins that are installed.")
    app.add_typer(plugins, name="plugins")
    app.add_typer(checkpoint, name="checkpoint")
    plugins.command("list")(list_plugins)
    plugins.command("show")(show_plugin)
    plugins.command("doctor")(examine_plugins)
    plugins.command("why")(_asking(why_plugin))
    for command in (conformance, new, _asking(explain), contract, schema):
        app.command()(command)
    app.command(context_settings={"allow_interspersed_args": False})(run)
    return app


def main() -> None:
    """Run the command line; an error of the project is a message and exit code 2."""
    warnings.simplefilter("always", FabricWarning)
    try:
        _make_app()()
    except FabricError as error:
        _print(f"{error}", style="red", error=True)
        raise SystemExit(2) from None
