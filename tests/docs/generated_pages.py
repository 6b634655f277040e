"""The pages of the reference that are made from the code: ``python tests/docs/generated_pages.py`` writes them anew."""

import importlib
import inspect
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from fabric_core.choosing.registry import Registry
from fabric_core.cli._describe import field_type, meanings
from fabric_core.kinds import KINDS

REFERENCE: Final = Path(__file__).parents[2] / "docs" / "reference"

EXAMPLES: Final = runpy.run_path(str(Path(__file__).with_name("api_examples.py")))["EXAMPLES"]
"""For each module and name a block of code, which runs with the page."""


def _summary(thing: Any) -> str:
    return " ".join((inspect.getdoc(thing) or "").partition("\n\n")[0].split())


def _signature(name: str, thing: Any) -> str:
    """Give the names of the arguments: what their types are stands on the pages of contracts, and in editors."""
    if not callable(thing):
        return name
    if isinstance(thing, type) and issubclass(thing, BaseModel):
        thing.model_rebuild()  # it is built at its first use, and shows its fields from then on
    try:
        parameters = inspect.signature(thing).parameters.values()
    except (TypeError, ValueError):
        return name
    stars: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    return f"{name}({', '.join(stars.get(one.kind, '') + one.name for one in parameters)})"


def api() -> str:
    """Make the page of all public names."""
    lines = [
        "# Public names",
        "",
        "Made from the code. What a contract asks for stands on the contract's own page.",
        "",
    ]
    shown: set[str] = set()
    for module, examples in EXAMPLES.items():
        lines += [
            f"## {module}",
            "",
            "```python",
            *(["import torch"] * (not shown)),
            f"from {module} import *",
            "```",
            "",
        ]
        names = sorted(importlib.import_module(module).__all__)
        names.sort(key=lambda name: name not in ("Fabric", "Report"))  # what the other examples use comes first
        for name in names:
            if name in shown:
                continue
            shown.add(name)
            thing = getattr(importlib.import_module(module), name)
            # A value has no docstring of its own; its type's says nothing of it.
            own = inspect.isclass(thing) or inspect.isroutine(thing)
            lines += [
                f"### `{_signature(name, thing)}`",
                "",
                _summary(thing) if own else f"`{type(thing).__name__}`.",
                "",
                "```python",
                examples[name],
                "```",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def _shown(default: Any) -> str:
    return repr(sorted(default) if isinstance(default, set | frozenset) else default)


def _plugins(kind: str) -> Iterator[str]:
    seen: dict[Any, str] = {}
    for offer in Registry().offers(kind):
        if offer.distribution != "fabric-registry":
            continue
        preset = offer.load()
        given = ", ".join(f"{name}={value!r}" for name, value in preset.options.items())
        if preset.plugin in seen:
            yield f"`{offer.name}` is `{seen[preset.plugin]}`{f' with `{given}`' if given else ''}.\n"
            continue
        seen[preset.plugin] = offer.name
        yield f"### `{offer.name}`\n"
        yield f"{_summary(preset.plugin)}{f' Preset: `{given}`.' if given else ''}\n"
        fields = preset.plugin.Options.model_fields
        if fields:
            meaning = meanings(preset.plugin.Options)
            yield "| option | type | default | meaning |\n|---|---|---|---|"
            for name, info in fields.items():
                default = "required" if info.is_required() else _shown(info.get_default(call_default_factory=True))
                about = " ".join(meaning.get(name, "").split()).replace("|", "\\|")
                shown = str(field_type(info.annotation)).replace("|", "\\|")
                yield f"| `{name}` | `{shown}` | `{default}` | {about} |"
            yield ""


def options() -> str:
    """Make the page of the built-in plugins with their options."""
    lines = [
        "# Built-in plugins and their options",
        "",
        "Made from the code; `fabric-core plugins show NAME` says the same.",
    ]
    for kind in KINDS:
        lines += ["", f"## {KINDS[kind].group.rpartition('.')[2].capitalize()}", "", *_plugins(kind)]
    return "\n".join(lines).rstrip() + "\n"


PAGES: Final = {"api.md": api, "options.md": options}
"""Each page with what makes it."""

if __name__ == "__main__":
    for page, make in PAGES.items():
        (REFERENCE / page).write_text(make(), encoding="utf-8")
