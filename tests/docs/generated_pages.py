"""The pages of the reference that are made from the code: ``python tests/docs/generated_pages.py`` writes them anew."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel

from fabric_core.choosing.registry import Registry
from fabric_core.cli._describe import field_type, meanings
from fabric_core.kinds import KINDS

REFERENCE: Final = Path(__file__).parents[2] / "docs" / "reference"

MODULES: Final = ("fabric_core", "fabric_core.contracts", "fabric_core.collectives", "fabric_core.conformance")

EXAMPLES: Final = {
    "Accelerator": 'assert issubclass(type(Fabric(accelerator="cpu").accelerator), Accelerator)',
    "Checkpoint": "assert not Checkpoint.capabilities.sharded",
    "Fabric": 'with Fabric(accelerator="cpu", devices=1) as fabric:\n    fabric.launch()\n    print(fabric.plan)',
    "FabricDataLoader": "from torch.utils.data import DataLoader\n\n"
    "loader = fabric.setup_dataloaders(DataLoader(list(range(4)), batch_size=2))\n"
    "assert isinstance(loader, FabricDataLoader)",
    "FabricModule": "model = fabric.setup(torch.nn.Linear(2, 1))\nassert isinstance(model, FabricModule)",
    "FabricOptimizer": "bare = torch.nn.Linear(2, 1)\n"
    "model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))\n"
    "assert isinstance(optimizer, FabricOptimizer)",
    "Launcher": "assert not Launcher.capabilities.multi_node",
    "Logger": "class Quiet(Logger):\n    def log_metrics(self, metrics, step):\n        pass\n\n\n"
    'fabric_with_logger = Fabric(accelerator="cpu", devices=1, loggers=[Quiet()])',
    "Precision": 'assert isinstance(Fabric(accelerator="cpu", precision="bf16-mixed").precision, Precision)',
    "Strategy": "assert isinstance(fabric.strategy, Strategy)",
    "Wrapper": "class Nothing(Wrapper):\n    pass\n\n\n"
    'assert list(Fabric(accelerator="cpu", devices=1, wrappers=[Nothing()]).wrappers) == ["Nothing"]',
    "around": "class Loud:\n    @around.strategy\n    def optimizer_step(self, optimizer):\n        print(optimizer)\n"
    "        return (yield)",
    "hookimpl": "class Counted:\n    @hookimpl\n    def module_set_up(self, module):\n        print(module)",
    "is_wrapped": "assert is_wrapped(fabric.setup(torch.nn.Linear(2, 1)))",
    "register": 'register("wrapper", "nothing", Nothing)\n'
    'assert "nothing" in Fabric(accelerator="cpu", devices=1, wrappers=["nothing"]).wrappers',
    "seed_everything": "seed_everything(1)",
    "unwrap": "bare = torch.nn.Linear(2, 1)\nassert unwrap(fabric.setup(bare)) is bare",
}
"""A block for each name of the top level, which runs with the page."""


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
    lines += ["```python", "import torch", "from fabric_core import *", "```", ""]
    for module in MODULES:
        lines += [f"## {module}", ""]
        names = sorted(importlib.import_module(module).__all__)
        if module == "fabric_core":
            names.sort(key=lambda name: name != "Fabric")  # what the other examples use comes first
        for name in names:
            thing = getattr(importlib.import_module(module), name)
            # A value has no docstring of its own; its type's says nothing of it.
            own = inspect.isclass(thing) or inspect.isroutine(thing)
            lines += [
                f"### `{_signature(name, thing)}`",
                "",
                _summary(thing) if own else f"`{type(thing).__name__}`.",
                "",
            ]
            if module == "fabric_core" and name in EXAMPLES:
                lines += ["```python", EXAMPLES[name], "```", ""]
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
