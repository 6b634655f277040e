"""Rules for plugins of every kind: how one is found, made, and travels."""

import contextlib
import io
import json
import os
import pickle
import re
import subprocess
import sys
from functools import lru_cache
from importlib import import_module
from typing import Any, Final

import torch
from pydantic import ValidationError

from fabric_core.binding import Bindings
from fabric_core.choosing.registry import Registry
from fabric_core.conformance import snapshot
from fabric_core.conformance.bench import Bench, Place
from fabric_core.conformance.rule import Broken, Level, Table
from fabric_core.contracts import API_WINDOW, PluginOptions
from fabric_core.errors import FabricError, OptionError
from fabric_core.kinds import KINDS

TABLE: Final = Table("any")

_HEAVY: Final = 150
"""How many modules an import may load; PyTorch's sharding loads some 400, a data-parallel wrapper 800."""

_IMPORT: Final = 60.0
"""How many seconds an import in a new interpreter may take; ``FABRIC_TIMEOUT_SCALE`` multiplies it."""

_UNKNOWN: Final = "no_such_option_of_any_plugin"


@lru_cache(maxsize=64)
def _imported(module: str) -> tuple[list[str], int, str]:
    """Import a module in a new interpreter; say what changed, how many modules came along, and what was printed.

    Raises:
        Broken: It can't be imported, or not in time.
    """
    program = f"from {__name__} import report_import; report_import({module!r})"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    timeout = _IMPORT * float(os.environ.get("FABRIC_TIMEOUT_SCALE", "1"))
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise Broken(f"importing {module} didn't end in {timeout:.0f} s") from None
    if done.returncode != 0:
        raise Broken(f"importing {module} fails:\n{done.stderr}")
    changed, count, printed = json.loads(done.stdout)
    return changed, count, printed


def report_import(module: str) -> None:
    """Do the importing for ``_imported``, and print what was seen as JSON."""
    before, known = snapshot.take(), set(sys.modules)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        import_module(module)
    json.dump([snapshot.differences(before), len(set(sys.modules) - known), printed.getvalue()], sys.stdout)


def _import(bench: Bench) -> tuple[list[str], int, str]:
    return _imported(bench.subject.value.partition(":")[0])


@TABLE.rule(
    "REG-001",
    "Its name is one word that a user can write in a string: letters, digits and `_.+-`, and not `auto`.",
    reason="A user writes `[distribution/]name[:option=value,...]`; any other name can't be asked for.",
    advice="rename the entry point to letters, digits and `_.+-`, beginning with a letter or digit",
)
def _name(bench: Bench) -> None:
    name = bench.subject.name
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", name) or name.lower() == "auto":
        raise Broken(f"the name is {name!r}")


@TABLE.rule(
    "REG-002",
    "Importing its module changes nothing outside it.",
    reason="A user who imports a plugin must not find other random numbers, threads or environment variables after it.",
    advice="move what the module does on import into the methods that need it",
    inside=False,
)
def _import_is_pure(bench: Bench) -> None:
    changed, _, _ = _import(bench)
    if changed:
        raise Broken(f"importing {bench.subject.value.partition(':')[0]} changes {', '.join(changed)}")


@TABLE.rule(
    "REG-003",
    "Importing its module prints nothing.",
    reason="Every rank imports it, and listing options in a pipeline reads what is printed.",
    advice="take the print out, or log in a method",
    level=Level.SHOULD,
    inside=False,
)
def _import_is_silent(bench: Bench) -> None:
    _, _, printed = _import(bench)
    if printed:
        raise Broken(f"it printed {printed[:200]!r}")


@TABLE.rule(
    "REG-004",
    f"Importing its module imports at most {_HEAVY} other modules that PyTorch and the core don't import.",
    reason="A choice by name must cost nothing before it is used; seconds of imports on every rank add up.",
    advice="import what is heavy inside the methods that use it",
    level=Level.SHOULD,
    inside=False,
)
def _import_is_light(bench: Bench) -> None:
    _, count, _ = _import(bench)
    if count > _HEAVY:
        raise Broken(f"it imports {count} modules")


@TABLE.rule(
    "REG-005",
    "It is a class of its kind's contract, with no abstract method left.",
    reason="Anything else is quarantined by the registry, and nobody can choose it.",
    advice="derive it from the contract, and implement the methods that are named",
)
def _concrete(bench: Bench) -> None:
    try:
        bench.subject.load()
    except FabricError as error:
        raise Broken(str(error)) from error


@TABLE.rule(
    "REG-006",
    "It says itself for which version of the contracts it was written, and this core accepts that version.",
    reason="A contract that changes must refuse old plugins instead of calling them wrongly.",
    advice=f"set api_version to one of {', '.join(map(str, API_WINDOW))}, and adapt the plugin to that version",
)
def _version(bench: Bench) -> None:
    # What follows in brackets are extras of the distribution.
    module, _, name = bench.subject.value.partition("[")[0].strip().partition(":")
    found = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    version = getattr(getattr(found, "plugin", found), "api_version", None)
    if not isinstance(version, int) or version not in API_WINDOW:
        raise Broken(f"api_version is {version!r}")


@TABLE.rule(
    "REG-007",
    "Its methods have the names and arguments of its contract, without default values.",
    reason="Behaviours are bound when a Fabric is built; pluggy leaves out arguments that have a default.",
    advice="write the signature that the message shows",
)
def _binds(bench: Bench) -> None:
    try:
        Bindings().bind(bench.plugin())
    except FabricError as error:
        raise Broken(str(error)) from error


@TABLE.rule(
    "REG-008",
    "It keeps the kind of its contract, and its capabilities are an instance of that kind's model.",
    reason="The plan reads capabilities before anything runs; a wrong model is read wrongly.",
    advice="leave `kind` alone, and set `capabilities` to the contract's own model",
)
def _kind(bench: Bench) -> None:
    plugin, contract = bench.plugin(), KINDS[bench.subject.kind].contract
    if plugin.kind != contract.kind:
        raise Broken(f"kind is {plugin.kind!r}")
    expected = type(getattr(contract, "capabilities", None))
    got = getattr(plugin, "capabilities", None)
    if not isinstance(got, expected):
        raise Broken(f"capabilities is {got!r}, and no {expected.__name__}")


@TABLE.rule(
    "REG-009",
    "Its options refuse a key that they don't have.",
    reason="A misspelt option that is ignored trains something else than was asked for.",
    advice='derive Options from PluginOptions, or set extra="forbid"',
)
def _options_refuse(bench: Bench) -> None:
    preset = bench.subject.load()
    try:
        preset.plugin.parse_options({**preset.options, _UNKNOWN: 1})
    except OptionError:
        return
    raise Broken(f"the option {_UNKNOWN!r} is taken")


@TABLE.rule(
    "REG-010",
    "Its options are the same after a trip through JSON.",
    reason="Plans are compared over the ranks and stored beside checkpoints as JSON.",
    advice="give options types that JSON has, or pydantic serialisers for the others",
)
def _options_travel(bench: Bench) -> None:
    options = bench.plugin().options
    again = type(options).model_validate_json(options.model_dump_json())
    if again != options:
        raise Broken(f"{options!r} comes back as {again!r}")


@TABLE.rule(
    "REG-011",
    "Its options can't be changed after it was made.",
    reason="The plan shows the options; what runs must be what it shows.",
    advice="derive Options from PluginOptions, or set frozen=True",
)
def _options_are_frozen(bench: Bench) -> None:
    plugin = bench.plugin()
    if not isinstance(plugin.options, PluginOptions):
        raise Broken(f"options is a {type(plugin.options).__name__}, and no PluginOptions")
    for name in type(plugin.options).model_fields:
        try:
            setattr(plugin.options, name, getattr(plugin.options, name))
        except ValidationError:
            continue
        raise Broken(f"options.{name} can be set")
    if plugin.options.model_config.get("frozen") is not True:
        raise Broken("the model isn't frozen")


@TABLE.rule(
    "REG-012",
    "Made from options or from keyword arguments, it is the same.",
    reason="The core makes it from options, a user from keyword arguments; both must get what they ask for.",
    advice="let __init__ take (options=None, /, **given) and pass both to super().__init__",
)
def _two_ways_to_make(bench: Bench) -> None:
    preset = bench.subject.load()
    by_options = preset.plugin(preset.plugin.parse_options(preset.options))
    by_keywords = preset.plugin(**preset.options)
    if by_options.options != by_keywords.options or repr(by_options) != repr(by_keywords):
        raise Broken(f"{by_options!r} from options, {by_keywords!r} from keyword arguments")


def _make(place: Place) -> list[str]:
    place.subject.load()
    before = snapshot.take()
    place.plugin()
    return snapshot.differences(before)


@TABLE.rule(
    "REG-013",
    "Making it changes nothing outside it.",
    reason="The automatic choice makes every plugin of a kind, and uses one of them.",
    advice="do it in the method that needs it, and undo it in teardown",
    inside=False,
)
def _making_is_pure(bench: Bench) -> None:
    changed = bench.fresh(_make)
    if changed:
        raise Broken(f"making it changes {', '.join(changed)}")


@TABLE.rule(
    "REG-014",
    "Two of it share no state.",
    reason="Two Fabric objects live side by side in one process.",
    advice="make mutable state in __init__, on self; what the class has is constant",
)
def _no_shared_state(bench: Bench) -> None:
    one = bench.plugin()
    before = _on_classes(one)
    other = bench.plugin()
    after = _on_classes(other)
    shared = [
        name for name, value in vars(one).items() if isinstance(value, _MUTABLE) and value is vars(other).get(name)
    ]
    # A table that has entries may be a constant; one without any can only be there to be filled.
    changed = [name for (owner, name), text in after.items() if before.get((owner, name)) != text]
    empty = [name for (_, name), text in after.items() if text in _EMPTY]
    if shared or changed or empty:
        raise Broken(f"they share {', '.join([*shared, *changed, *empty])}")


_MUTABLE: Final = (dict, list, set, bytearray, torch.Tensor)
_EMPTY: Final = ("{}", "[]", "set()", "bytearray(b'')")


def _on_classes(plugin: Any) -> dict[tuple[type, str], str]:
    """Show what the plugin's classes have; of what is no data, only that it is there."""
    return {
        (owner, name): repr(value) if isinstance(value, _MUTABLE) else ""
        for owner in type(plugin).__mro__
        if owner.__module__.partition(".")[0] not in {"builtins", "abc"}
        for name, value in vars(owner).items()
        if not name.startswith("__")
    }


@TABLE.rule(
    "REG-015",
    "Before it is used it pickles, with its options.",
    reason="An instance that a user gives travels to the processes that are started.",
    advice="make locks, handles and groups when they are first needed, and not in __init__",
)
def _pickles(bench: Bench) -> None:
    plugin = bench.plugin()
    try:
        again = pickle.loads(pickle.dumps(plugin))  # noqa: S301 - our own
    except Exception as error:
        raise Broken(f"it doesn't pickle: {error!r}") from error
    if type(again) is not type(plugin) or again.options != plugin.options:
        raise Broken(f"{plugin!r} comes back as {again!r}")


def _describe(place: Place) -> tuple[str, str]:
    plugin = place.plugin()
    return f"{type(plugin).__module__}:{type(plugin).__qualname__}", repr(plugin)


@TABLE.rule(
    "REG-016",
    "Resolved again in a new process, it is the same class with the same options.",
    reason="Every rank resolves the request itself; ranks that get something else train something else.",
    advice="let class and options depend on nothing but the installed distribution",
    inside=False,
)
def _same_elsewhere(bench: Bench) -> None:
    here, there = bench.run(_describe)[0], bench.fresh(_describe)
    if here != there:
        raise Broken(f"{here} here, {there} in a new process")


@TABLE.rule(
    "REG-017",
    "Its class says in its own docstring what it is.",
    reason="It is what a user reads who looks for a plugin.",
    advice="write one sentence under the class",
    level=Level.SHOULD,
)
def _documented(bench: Bench) -> None:
    if not (bench.subject.load().plugin.__doc__ or "").strip():
        raise Broken("there is no docstring")


@TABLE.rule(
    "REG-018",
    "Its repr is the call that makes it.",
    reason="Plans and errors show plugins by it.",
    advice="keep Plugin's __repr__",
    level=Level.SHOULD,
)
def _repr(bench: Bench) -> None:
    plugin = bench.plugin()
    if not repr(plugin).startswith(f"{type(plugin).__name__}(") or not repr(plugin).endswith(")"):
        raise Broken(f"it is {plugin!r}")


@TABLE.rule(
    "REG-019",
    "No other installed distribution offers its name.",
    reason="A user who writes the name alone gets an error that asks which one is meant.",
    advice="choose a name that nobody has; begin it with your project's",
    level=Level.SHOULD,
)
def _alone(bench: Bench) -> None:
    subject = bench.subject
    others = {
        offer.distribution
        for offer in Registry().offers(subject.kind)
        if offer.name == subject.name and offer.distribution != subject.distribution
    }
    if subject.distribution and others:
        raise Broken(f"{', '.join(sorted(others))} offers {subject.name!r} too")


@TABLE.rule(
    "REG-020",
    "Where it is offered to the automatic choice, the entry counts, and its priority is from -100 to 100.",
    reason="Priorities are compared between strangers; a huge one takes the choice from everybody else.",
    advice='write "KIND/PRIORITY/NAME" = "module:Class" in fabric.auto, with a priority near those of its like',
    level=Level.SHOULD,
)
def _priority(bench: Bench) -> None:
    subject = bench.subject
    if subject.strays:
        raise Broken("; ".join(subject.strays))
    if subject.auto is not None and not -100 <= subject.auto <= 100:
        raise Broken(f"it is {subject.auto}")


TABLE.untested(
    "REG-021",
    "It works on every version of Python and PyTorch that its distribution allows.",
    reason="The kit runs on the versions that are installed; run it once for each that you declare.",
    advice="narrow the requirements, or fix it",
)
