"""``fabric-core plugins``: what is installed, what it declares, whether it is sound, and why it would be chosen."""

from typing import Annotated, Any

import typer

from fabric_core.choosing.offers import Offer
from fabric_core.choosing.plan import Plan
from fabric_core.cli._asking import completer, find_registry, plan_of
from fabric_core.cli._describe import field_type, meanings
from fabric_core.cli._output import AsJson, Exit, print_json, print_table, print_text
from fabric_core.errors import FabricError, UnknownPluginError
from fabric_core.kinds import EXTENSION, groups

__all__ = ["examine_plugins", "list_plugins", "show_plugin", "why_plugin"]

_Name = Annotated[str, typer.Argument(help="NAME or DISTRIBUTION/NAME.", autocompletion=completer())]


def list_plugins(as_json: AsJson = False) -> None:
    """List what could be chosen; imports no plugin."""
    offers = _offers()
    if as_json:
        print_json([_as_dict(offer) for offer in offers])
        return
    print_table(
        ("kind", "name", "distribution", "where"),
        [(offer.kind, offer.name, offer.owner, offer.value) for offer in offers],
    )


def show_plugin(name: _Name, as_json: AsJson = False) -> None:
    """Show what a plugin is, what it declares, and its options; imports it."""
    shown_offers = [_described(offer) for offer in _named(name)]
    if as_json:
        print_json(shown_offers)
        return
    for one in shown_offers:
        print_text(f"{one['kind']} {one['name']}", style="bold")
        print_text(f"  {one['distribution']} {one['version']}, {one['value']}")
        if one["error"] is not None:
            print_text(one["error"], style="red")
            continue
        print_text(f"  {one['summary']}")
        if one["preset"]:
            print_text(f"  presets: {one['preset']}")
        if one["options"]:
            rows = [(key, *(str(part) for part in about)) for key, about in one["options"].items()]
            print_table(("option", "type", "default", "meaning"), rows)
        if one["declares"]:
            print_table(("declares", "value"), [(key, str(value)) for key, value in one["declares"].items()])


def examine_plugins(
    as_json: AsJson = False,
    timeout: Annotated[float, typer.Option(help="How many seconds a plugin may take to be imported.")] = 30.0,
) -> None:
    """Import every plugin, each in a process of its own, and say which are sound; exit code 1 where one isn't."""
    from dataclasses import asdict

    from fabric_core.cli._doctor import SOUND, examine

    findings = list(examine(find_registry(), timeout))
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_table(
            ("kind", "name", "distribution", "status", "seconds", "note"),
            [(one.kind, one.name, one.distribution, one.status, f"{one.seconds:.2f}", one.note) for one in findings],
        )
    if any(finding.status not in SOUND for finding in findings):
        raise typer.Exit(Exit.NO)


def why_plugin(name: _Name, as_json: AsJson = False, **asked: Any) -> None:
    """Say why a plugin would be chosen for a request, or why not."""
    offers = _named(name)
    chosen = plan_of(**asked)
    answers = [{**_as_dict(offer), **_why(chosen, offer)} for offer in offers]
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        verdict = "chosen" if answer["chosen"] else "not chosen"
        print_text(f"{answer['kind']} {answer['name']}: {verdict}, {answer['reason']}")


def _offers() -> list[Offer]:
    registry = find_registry()
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
