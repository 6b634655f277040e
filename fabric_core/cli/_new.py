"""``fabric-core new``: a package for a plugin, complete: it installs, is found by name, and passes its tests."""

import re
import shutil
import sys
import tempfile
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Annotated, Final

import typer

from fabric_core.cli._output import AsJson, print_json
from fabric_core.errors import RequestError
from fabric_core.kinds import EXTENSION, KINDS, groups

__all__ = ["new"]

_NAME: Final = re.compile(r"[a-z0-9][a-z0-9_-]*")

_USAGE: Final = {
    "launcher": 'fabric = Fabric(devices=2, plugins=["launcher=$name"])',
    "checkpoint": 'fabric = Fabric(plugins=["checkpoint=$name"])',
    EXTENSION: "from $package import $class_name\n\nfabric = Fabric(plugins=[$class_name()])",
    "wrapper": 'fabric = Fabric(wrappers=["$name"])',
    "logger": 'fabric = Fabric(loggers=["$name"])',
}
"""How a user asks for a plugin of a kind; of the others by the argument that is named after the kind."""


def new(
    kind: Annotated[str, typer.Argument(help="strategy, precision, accelerator, wrapper, launcher, checkpoint, ...")],
    name: Annotated[str, typer.Argument(help="What users will write, as in strategy='NAME'.")],
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Where; by default a folder NAME here.")
    ] = None,
    distribution: Annotated[str | None, typer.Option(help="The distribution's name; fabric-NAME by default.")] = None,
    author: Annotated[str | None, typer.Option(help="Who holds the rights; asked for on a terminal.")] = None,
    description: Annotated[str | None, typer.Option(help="One sentence; asked for on a terminal.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a package for a plugin: it installs, is found by its name, and passes its tests and type checks."""
    folder = folder or Path(name)
    known = [*KINDS, EXTENSION]
    if kind not in known:
        raise RequestError("there is no such kind", where="fabric-core new", got=kind, instead=", ".join(known))
    if not _NAME.fullmatch(name):
        raise RequestError(
            "a name is written in small letters, digits, - and _",
            where="fabric-core new",
            got=name,
            instead="my_strategy",
        )
    if folder.exists():
        raise RequestError(
            "there is something already, which is left as it is",
            where="fabric-core new",
            got=str(folder),
            instead=f"fabric-core new {kind} {name} ANOTHER_FOLDER",
        )
    described = _ask("description", description, f"The {kind} {name}, for fabric-registry.")
    words = _words(
        kind,
        name,
        distribution or f"fabric-{name.replace('_', '-')}",
        _ask("author", author, "The authors"),
        described.rstrip(".") + ".",
    )
    # Whole or not at all: what fails half-way leaves no folder that a second call would refuse.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".fabric-core-new-") as aside:
        made = Path(aside) / folder.name
        for path, template in _layout(kind, words["package"]).items():
            (made / path).parent.mkdir(parents=True, exist_ok=True)
            (made / path).write_text(_filled(template, words), encoding="utf-8")
        shutil.move(made, folder)
    if as_json:
        print_json({"folder": str(folder), "kind": kind, "name": name, "distribution": words["distribution"]})
    else:
        typer.echo(f"{folder}: the {kind} {name!r}. Next:\n  pip install -e '{folder}[test]'\n  pytest {folder}")


def _ask(what: str, given: str | None, default: str) -> str:
    """Take an option; on a terminal ask for it where it was left out."""
    if given is not None or not sys.stdin.isatty():
        return given or default
    answer: str = typer.prompt(what, default=default)
    return answer


def _words(kind: str, name: str, distribution: str, author: str, description: str) -> dict[str, str]:
    """Give what the templates' words stand for."""
    package = re.sub(r"\W", "_", distribution.lower())
    camel = "".join(part.capitalize() for part in re.split("[-_]", name)).removesuffix(kind.capitalize())
    words = {
        "kind": kind,
        "name": name,
        "distribution": distribution,
        "package": package if package.isidentifier() else f"fabric_{package}",
        "class_name": f"{camel}{kind.capitalize()}" if camel.isidentifier() else f"{kind.capitalize()}{camel}",
        "variable": re.sub(r"\W", "_", distribution).upper(),
        "group": groups()[kind],
        "author": author.replace('"', "'"),
        "description": description.replace('"', "'"),
        "core_version": "0.1",
        "year": str(datetime.now(UTC).year),
    }
    usage = _USAGE.get(kind, f'fabric = Fabric({kind}="$name")')
    return {
        **words,
        "usage": "from fabric_core import Fabric\n"
        + ("" if kind == EXTENSION else "\n")
        + Template(usage).substitute(words),
    }


def _layout(kind: str, package: str) -> dict[str, str]:
    """Give for each file of the package the template that it is made from."""
    return {
        "pyproject.toml": "pyproject.toml",
        "README.md": "README.md",
        "LICENSE": "LICENSE",
        ".github/workflows/test.yml": "ci.yml",
        f"{package}/__init__.py": f"{kind}.py",
        f"{package}/py.typed": "",
        f"tests/test_{package}.py": "test_extension.py" if kind == EXTENSION else "test_kind.py",
    }


def _filled(template: str, words: dict[str, str]) -> str:
    if not template:
        return ""
    text = (files("fabric_core.cli") / "templates" / f"{template}.txt").read_text(encoding="utf-8")
    return Template(text).substitute(words)
