"""``fabric-core config``: makes a configuration file by a few questions, checks one, and gives editors its schema."""

import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fabric_core.assembly import make_plan, make_registry
from fabric_core.choosing.request import Request, fill, read_file
from fabric_core.cli._asking import arguments_of, find_registry
from fabric_core.cli._matrix import plugin_texts
from fabric_core.cli._output import AsJson, print_json, print_text
from fabric_core.errors import FabricError, RequestError
from fabric_core.kinds import AUTO, EXTENSION, KINDS, Count, groups
from fabric_core.running.launching import environment

__all__ = ["check_config", "make_config", "print_schema"]

_File = Annotated[Path, typer.Argument(help="TOML (.toml) or YAML (.yaml, .yml).")]

_NONE: Final = "none"

_DIGITS: Final = 9
"""What has more digits is no number of devices."""


def make_config(
    file: _File,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    as_json: AsJson = False,
    **asked: Any,
) -> None:
    """Make a configuration file: asks on a terminal for what no option says, and offers what works here.

    Raises:
        RequestError: There is such a file already.
        FabricError: What was asked for doesn't work here.
    """
    if file.exists() and not force:
        raise RequestError(
            "there is such a file already, which is left as it is", where=str(file), instead="--force, or another name"
        )
    if file.suffix not in {".toml", ".yaml", ".yml"}:
        raise RequestError(
            "a configuration file has no such ending", where=str(file), got=file.suffix or "none",
            instead="a name that ends in .toml, .yaml or .yml",
        )  # fmt: skip
    if _on_terminal() and not as_json:
        asked = _ask(asked)
    request = _request(asked)
    plan = make_plan(request, environment())
    arguments = request.arguments()
    aside = file.with_name(f".new-{file.name}")
    try:
        aside.write_text(_written(arguments, file.suffix), encoding="utf-8")
        again = Request.of(**read_file(aside)).arguments()
        if again != arguments:
            raise AssertionError(f"the file says {again}, and was to say {arguments}")
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)
    if as_json:
        print_json({"file": str(file), "arguments": arguments, "plan": plan.as_dict()})
    else:
        print_text(f"{file}: written. It chooses, here:\n{plan}")


def check_config(
    file: _File,
    elsewhere: Annotated[
        bool, typer.Option("--elsewhere", help="It is for another machine: names and options alone, not the plan here.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check a configuration file: its arguments, the plugins' names and options, and the plan that it makes here.

    Raises:
        FabricError: Something is wrong; it says what, and where.
    """
    request = Request.of(**read_file(file))
    if elsewhere:
        _check_names(request)
    plan = None if elsewhere else make_plan(request, environment())
    if as_json:
        shown = None if plan is None else plan.as_dict()
        print_json({"file": str(file), "sound": True, "arguments": request.arguments(), "plan": shown})
    else:
        print_text(f"{file}: sound" + ("" if plan is None else f". It chooses, here:\n{plan}"))


def print_schema(_as_json: AsJson = True) -> None:
    """Print the JSON Schema of a configuration file, with the options of the plugins that are installed."""
    from fabric_core.cli._schema import make_schema

    print_json(make_schema(find_registry()))


def _check_names(request: Request) -> None:
    """Check the names and options of a request, whatever is here to run it on."""
    registry = make_registry(environment(), request.lock)
    for kind in groups():
        for ref in request.refs(kind):
            offer = None if ref.is_auto else registry.find(kind, ref.name, ref.distribution)
            if offer is not None and kind != EXTENSION:
                preset = offer.load()
                preset.plugin.parse_options({**preset.options, **ref.options})


def _request(asked: Mapping[str, Any]) -> Request:
    """Make the request of options and an older file; variables are of the run that will read the new one."""
    older, code = asked["config"], arguments_of(asked)
    if code["devices"].isdecimal() and len(code["devices"]) <= _DIGITS:
        code["devices"] = int(code["devices"])
    return Request.of(**fill(code, {} if older is None else read_file(older)))


def _written(arguments: Mapping[str, Any], suffix: str) -> str:
    """Write plain values so that both formats read them: text in JSON's form is text in TOML and in YAML."""
    sign = " =" if suffix == ".toml" else ":"
    # TOML has no null, and never is 0 seconds too.
    lines = (f"{name}{sign} {json.dumps(0 if value is None else value, ensure_ascii=False)}\n"
             for name, value in arguments.items())  # fmt: skip
    # JSON writes a character beyond 16 bits as two, which TOML refuses; and others plainly that one of the two refuses.
    return re.sub(r"[^\n -~]", lambda found: f"\\U{ord(found[0]):08x}", "".join(lines))


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _ask(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Ask for each kind that has an argument, and for devices; each answer narrows what the next question offers."""
    answers = dict(asked)
    registry = make_registry(environment(), _request(answers).lock or environment().get("FABRIC_LOCK") or None)
    for kind in KINDS.values():
        single = kind.count is Count.ONE
        if kind.argument is not None and answers[kind.name] in (None, [], AUTO):
            texts = plugin_texts(registry, kind.name)
            _answer(answers, kind.name, AUTO if single else _NONE, texts, single=single)
        if kind.name == "accelerator" and answers["devices"] == AUTO:
            _answer(answers, "devices", AUTO, ["a count", "indices"])
    return answers


def _answer(answers: dict[str, Any], what: str, default: str, known: Sequence[str], *, single: bool = True) -> None:
    """Ask until an answer works here, beside those before it; offers what does."""

    def problem(text: str) -> str | None:
        try:
            make_plan(_request({**answers, what: text if single else [text]}), environment())
        except FabricError as error:
            return str(error)
        return None

    offered = [text for text in known if what not in KINDS or problem(text) is None]
    while True:
        answer: str = typer.prompt(f"{what} ({', '.join([default, *offered])})", default=default)
        wrong = None if answer == default else problem(answer)
        if wrong is None:
            if answer != default:
                answers[what] = answer if single else [answer]
            return
        print_text(f"  {wrong}", style="red")
