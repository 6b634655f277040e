"""Whatever is public is documented: hooks, options, errors, capabilities, the command line, public names."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from fabric_core import cli, errors
from fabric_core.choosing.registry import Registry
from fabric_core.contracts import LifeCycle, PluginOptions, Preset, Strategy, StrategyCapabilities
from fabric_core.contracts._spec import behaviours
from fabric_core.kinds import KINDS

DOCS = Path(__file__).parents[2] / "docs"


def _text(*pages: str) -> str:
    return "\n".join((DOCS / page).read_text(encoding="utf-8") for page in pages)


def _all_text() -> str:
    pages = [page for page in DOCS.rglob("*.md") if "decisions" not in page.parts and "benchmarks" not in page.parts]
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def _words(text: str) -> set[str]:
    """Give what stands in code on a page: in backquotes or in a block."""
    return set(re.findall(r"[A-Za-z_][\w-]*", " ".join(re.findall(r"`+[^`]+`+", text))))


def _built_ins() -> Iterator[tuple[str, Any]]:
    for kind in KINDS:
        for offer in Registry().offers(kind):
            if offer.distribution == "fabric-registry":
                yield f"{kind} {offer.name}", offer.load()


@pytest.mark.parametrize("kind", KINDS)
def test_every_behaviour_and_capability_is_on_its_contract_s_page(kind: str) -> None:
    """The page names each method, and each capability, of the contract."""
    words = _words(_text(f"reference/contracts/{kind}.md"))
    assert set(behaviours(KINDS[kind].contract)) <= words
    declared = getattr(KINDS[kind].contract, "capabilities", None)
    if declared is not None:
        assert set(type(declared).model_fields) <= words


def test_every_hook_is_documented() -> None:
    """With its exact arguments."""
    page = _text("reference/contracts/extension.md")
    for name, arguments in behaviours(LifeCycle).items():
        assert f"{name}({', '.join(arguments)})" in page


def test_every_option_of_a_built_in_is_documented() -> None:
    """Each option of each plugin that comes along stands in code on a page."""
    words = _words(_all_text())
    missing = {
        f"{plugin}: {option}"
        for plugin, preset in _built_ins()
        for option in preset.plugin.Options.model_fields
        if option not in words
    }
    assert not missing, f"document them: {sorted(missing)}"


def test_every_name_of_a_built_in_is_documented() -> None:
    """Each name that a user can write stands in code on a page."""
    words = _words(_all_text())
    text = _all_text()
    missing = {name for name, _ in _built_ins() if name.split()[1] not in words and f'"{name.split()[1]}' not in text
               and f"`{name.split()[1]}`" not in text}  # fmt: skip
    assert not missing, f"document them: {sorted(missing)}"


def test_every_error_is_documented() -> None:
    """Each class that is raised on purpose stands on the page of errors."""
    words = _words(_text("reference/errors.md"))
    classes = {
        name for name, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, Exception | Warning)
    }
    assert {name for name in classes if getattr(errors, name).__module__ == errors.__name__} <= words


def _commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    # Not by class: typer brings a click of its own in newer versions.
    for name, one in getattr(command, "commands", {}).items():
        yield from _commands(one, (*path, name))
    if path and not hasattr(command, "commands"):
        yield " ".join(path), command


def test_every_command_and_option_is_documented() -> None:
    """The page of the command line names each command with its options."""
    page = _text("reference/command-line.md")
    words = set(re.findall(r"--[\w-]+", _all_text()))
    commands = dict(_commands(typer.main.get_command(cli._make_app())))
    assert "plugins list" in commands
    for name, command in commands.items():
        assert f"fabric-core {name}" in page, name
        for parameter in command.params:
            if parameter.param_type_name == "option" and not parameter.hidden:
                assert set(parameter.opts) & words, f"fabric-core {name} {parameter.opts}"


@pytest.mark.parametrize(
    "module", ["fabric_core", "fabric_core.contracts", "fabric_core.collectives", "fabric_core.conformance"]
)
def test_every_public_name_is_documented(module: str) -> None:
    """In the reference, by its name."""
    words = _words(_text("reference/api.md"))
    assert set(importlib.import_module(module).__all__) <= words


class _PlantedOptions(PluginOptions):
    planted_option: int = 0


class _PlantedCapabilities(StrategyCapabilities):
    planted_capability: bool = False


class _Planted(Strategy):
    Options = _PlantedOptions


def test_an_undocumented_addition_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more hook, option, error, capability or option of the command line, and the test of its page fails."""
    with monkeypatch.context() as patch:
        hooks = {**behaviours(LifeCycle), "planted_hook": ("fabric",)}
        patch.setitem(globals(), "behaviours", lambda _: hooks)
        with pytest.raises(AssertionError):
            test_every_hook_is_documented()
    with monkeypatch.context() as patch:
        planted = type("PlantedError", (errors.FabricError,), {"__module__": errors.__name__})
        patch.setattr(errors, "PlantedError", planted, raising=False)
        with pytest.raises(AssertionError):
            test_every_error_is_documented()
    with monkeypatch.context() as patch:
        patch.setattr(Strategy, "capabilities", _PlantedCapabilities())
        with pytest.raises(AssertionError):
            test_every_behaviour_and_capability_is_on_its_contract_s_page("strategy")
    with monkeypatch.context() as patch:
        patch.setitem(globals(), "_built_ins", lambda: iter([("strategy planted", Preset.of(_Planted))]))
        with pytest.raises(AssertionError, match="planted_option"):
            test_every_option_of_a_built_in_is_documented()
    with monkeypatch.context() as patch:
        commands = dict(_commands(typer.main.get_command(cli._make_app())))
        commands["plugins list"].params[0].opts = ["--planted-flag"]
        patch.setitem(globals(), "_commands", lambda _: commands.items())
        with pytest.raises(AssertionError, match="planted-flag"):
            test_every_command_and_option_is_documented()
