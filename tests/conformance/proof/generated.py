"""The kit against plugins that are wrong by chance: every change of ``proof.operators`` to right plugins' sources.

``python -m proof.generated`` judges a sample (``--sample``, drawn by ``--seed``) or all of them; ``--record`` adds what
it saw to the record, from which the documentation's page is made. A change that no rule notices is a survivor: it is
killed by a new rule, or listed in ``proof.equivalent`` with the reason why nobody could notice it.
"""

import argparse
import ast
import contextlib
import hashlib
import io
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from multiprocessing.util import Finalize
from pathlib import Path
from types import FunctionType
from typing import Any, Final

from fabric_core.conformance.bench import Bench
from fabric_core.conformance.rule import Rule
from fabric_core.conformance.rules import rules_for
from fabric_core.conformance.runner import judge
from fabric_core.conformance.subject import Subject
from proof.equivalent import EQUIVALENT
from proof.operators import Change, changes
from proof.record import Record, add_choices

__all__ = ["RECORD", "TARGETS", "Generated", "Target", "judged", "population", "record", "unchanged"]

RECORD: Final = Path(__file__).with_name("generated.json")
"""What was seen of every change that was ever judged: the rule that noticed it, or ``null``."""

_TIMEOUT: Final = 12.0
_REFERENCES: Final = "fabric_core.conformance.references"
_REFERENCE_STRATEGIES: Final = "fabric_core.conformance.reference_strategies"
_GROUP: Final = "fabric_core.collectives.process_group"
_SINGLE: Final = "fabric_core.collectives.interface"


@dataclass(frozen=True)
class Target:
    """A right plugin whose source is changed.

    Args:
        kind: Its kind.
        place: Where it lies, as ``module:Class``.
        changed: The modules that are changed.
        within: The names at the top level of the modules that are changed; ``None`` is all.
        options: The options that it is made with.
        also: Further options, under which its kind's rules are asked too, as much of a source lies behind an option;
            each with the rules that PyTorch breaks under them.
        beside: Modules that are copied unchanged, because they import the changed ones.
    """

    kind: str
    place: str
    changed: tuple[str, ...]
    within: frozenset[str] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    also: tuple[tuple[dict[str, Any], frozenset[str]], ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """All modules that are copied."""
        return (*self.changed, *self.beside)


def _reference(kind: str, name: str, *more: str) -> Target:
    module = _REFERENCE_STRATEGIES if kind == "strategy" else _REFERENCES
    return Target(kind, f"{module}:{name}", (module,), frozenset({name, *more}))


_STRATEGIES: Final = "fabric_plugins.strategies"
_SHARDING: Final = tuple(f"{_STRATEGIES}._sharding.{name}" for name in ("strategy", "materialise", "tensors", "units"))

TARGETS: Final[tuple[Target, ...]] = (
    _reference("accelerator", "Host"),
    _reference("strategy", "Alone"),
    _reference("strategy", "Averaging"),
    _reference("strategy", "Routed", "_Gate"),
    _reference("strategy", "Sharding", "_whole"),
    _reference("precision", "Full"),
    _reference("precision", "Doubled"),
    _reference("precision", "Mixed"),
    _reference("precision", "Scaled", "ScaledOptions", "_gradients"),
    _reference("wrapper", "Tagging", "_count"),
    _reference("launcher", "Surroundings"),
    _reference("checkpoint", "OneFile", "_comes_back", "_loaded"),
    _reference("logger", "Remembering"),
    Target("strategy", f"{_REFERENCE_STRATEGIES}:Averaging", (_GROUP,), beside=(_REFERENCE_STRATEGIES,)),
    Target("strategy", f"{_REFERENCE_STRATEGIES}:Alone", (_SINGLE,), frozenset({"SingleProcess", "check_reduction",
           "check_source"}), beside=(_REFERENCE_STRATEGIES,)),
    Target("accelerator", "fabric_plugins.accelerators.cpu:CPUAccelerator", ("fabric_plugins.accelerators.cpu",)),
    Target("precision", "fabric_plugins.precisions.mixed:Float16MixedPrecision", ("fabric_plugins.precisions.mixed",),
           frozenset({"MixedOptions", "_MixedPrecision", "Float16MixedOptions", "Float16MixedPrecision",
                      "_OptimizerState", "_Scaler"}),
           options={"init_scale": 16.0, "growth_interval": 2},
           also=(({"init_scale": 16.0, "growth_interval": 2, "cast_inputs": False}, frozenset()),)),
    Target("precision", "fabric_plugins.precisions.true:DoublePrecision", ("fabric_plugins.precisions.true",),
           frozenset({"TrueOptions", "_TruePrecision", "DoublePrecision"}),
           also=(({"default_dtype_in_forward": True}, frozenset()),)),
    Target("precision", "fabric_plugins.precisions.full:FullPrecision", ("fabric_plugins.precisions.full",)),
    Target("strategy", f"{_STRATEGIES}.ddp:DDPStrategy",
           (f"{_STRATEGIES}.ddp", f"{_STRATEGIES}._distributed", f"{_STRATEGIES}._replicated"),
           also=(({"find_unused_parameters": True, "broadcast_buffers": False, "gradient_as_bucket_view": False,
                   "bucket_cap_mb": 0.0001}, frozenset()),
                 ({"static_graph": True}, frozenset({"STR-305", "STR-306", "STR-365", "STR-383", "STR-396"})))),
    Target("strategy", f"{_STRATEGIES}.single_device:SingleDeviceStrategy", (f"{_STRATEGIES}.single_device",)),
    Target("strategy", f"{_STRATEGIES}.fsdp:FSDPStrategy",
           (f"{_STRATEGIES}.fsdp", *_SHARDING), beside=(f"{_STRATEGIES}._distributed",),
           also=(({"sharding_strategy": "HYBRID_SHARD", "use_orig_params": True, "auto_wrap_policy": ["Linear"],
                   "cpu_offload": True, "state_dict_type": "sharded", "reshard_after_forward": False}, frozenset()),)),
    Target("checkpoint", "fabric_plugins.checkpoints.single_file:SingleFileCheckpoint",
           ("fabric_plugins.checkpoints.single_file", "fabric_plugins.checkpoints._plain")),
    Target("checkpoint", "fabric_plugins.checkpoints.distributed:DistributedCheckpoint",
           ("fabric_plugins.checkpoints.distributed", "fabric_plugins.checkpoints._manifest"),
           beside=tuple(f"fabric_plugins.checkpoints.{name}" for name in ("_files", "_places", "_records"))),
    Target("wrapper", "fabric_plugins.wrappers.compile:CompileWrapper", ("fabric_plugins.wrappers.compile",),
           frozenset({"CompileOptions", "CompileWrapper"}), options={"backend": "eager"}),
    Target("wrapper", "fabric_plugins.wrappers.compile:CompileBlocksWrapper", ("fabric_plugins.wrappers.compile",),
           frozenset({"CompileBlocksOptions", "CompileBlocksWrapper"}),
           options={"backend": "eager", "blocks": ["Linear"]}),
    Target("wrapper", "fabric_plugins.wrappers.activation_checkpointing:ActivationCheckpointingWrapper",
           ("fabric_plugins.wrappers.activation_checkpointing", "fabric_plugins.wrappers._blocks"),
           options={"blocks": ["Linear"]}),
    Target("wrapper", "fabric_plugins.wrappers.channels_last:ChannelsLastWrapper",
           ("fabric_plugins.wrappers.channels_last",)),
    Target("launcher", "fabric_plugins.launchers.elastic:ElasticLauncher", ("fabric_plugins.launchers.elastic",)),
)  # fmt: skip
"""The right plugins, and which of their sources are changed."""


@dataclass(frozen=True)
class Generated:
    """A plugin with one change.

    Args:
        target: The right plugin.
        module: The module that is changed.
        change: The change.
    """

    target: Target
    module: str
    change: Change

    @property
    def key(self) -> str:
        """Its name."""
        return self.change.key

    def write(self, folder: Path) -> Subject:
        """Write its modules into a folder that is on the path; give the subject."""
        package = "g" + hashlib.sha256(self.key.encode()).hexdigest()[:12]
        home = folder / package
        home.mkdir()
        (home / "__init__.py").touch()
        for module in self.target.modules:
            source = self.change.source if module == self.module else _source(module)
            text = _rerouted(source, self.target.modules, package)
            (home / f"{_leaf(module)}.py").write_text(text, encoding="utf-8")
        module, _, name = self.target.place.partition(":")
        place = f"{package}.{_leaf(module)}:{name}"
        return Subject(self.target.kind, name, place, options=dict(self.target.options))


@cache
def _source(module: str) -> str:
    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _leaf(module: str) -> str:
    return module.replace(".", "_")


@cache
def _home(module: str, name: str) -> str:
    """Say in which module a class or function lies that a package of ours gives on."""
    given = getattr(import_module(module), name, None) if module.startswith("fabric_") else None
    return given.__module__ if isinstance(given, type | FunctionType) else module


def _rerouted(source: str, modules: Sequence[str], package: str) -> str:
    """Let a module import the copies."""

    class Router(ast.NodeTransformer):
        def visit_ImportFrom(self, node: ast.ImportFrom) -> Any:
            if node.module is not None and node.module in modules:
                return ast.ImportFrom(f"{package}.{_leaf(node.module)}", node.names, 0)
            homes = {one: _home(node.module or "", one.name) for one in node.names}
            kept = [one for one, home in homes.items() if home not in modules]
            routes = [
                ast.ImportFrom(f"{package}.{_leaf(home)}", [one], 0) for one, home in homes.items() if home in modules
            ]
            return [*([ast.ImportFrom(node.module, kept, 0)] if kept else []), *routes]

    return ast.unparse(ast.fix_missing_locations(Router().visit(ast.parse(source))))


@cache
def population() -> tuple[Generated, ...]:
    """Give every change to every target, each once: a module that several share is changed for the first alone."""
    found: dict[str, Generated] = {}
    for target in TARGETS:
        for module in target.changed:
            for change in changes(_source(module), module, target.within):
                found.setdefault(change.key, Generated(target, module, change))
    return tuple(found.values())


def unchanged(target: Target) -> Generated:
    """Give a copy without a change."""
    module = target.changed[0]
    tree = ast.parse(_source(module))
    place = next(node for node in ast.walk(tree) if isinstance(node, ast.expr))
    return Generated(target, module, Change(f"{target.place}, {module} unchanged", "none", 0, tree, place, place))


_FIRST: Final = ("STR-301", "STR-310", "STR-350", "STR-373", "STR-340", "STR-396", "PRE-233", "PRE-231", "PRE-229",
                 "PRE-232", "CHK-601", "CHK-603", "LAU-503", "LAU-505", "LAU-516", "LAU-520", "ACC-110", "WRA-403",
                 "WRA-410")  # fmt: skip
"""The rules that notice most, which are asked first."""


def _ordered(kind: str) -> list[Rule]:
    rank = {rule: index for index, rule in enumerate(_FIRST)}
    return sorted(rules_for(kind), key=lambda rule: (rank.get(rule.id, len(rank)), rule.kind == "any"))


def judged(one: Generated, folder: Path, excused: frozenset[str] = frozenset()) -> tuple[str | None, float]:
    """Judge until a rule notices; give its number, or ``None``, and the seconds.

    Args:
        one: The plugin.
        folder: Where its modules are written; on the path.
        excused: Rules that the right plugin breaks too.
    """
    begin = time.perf_counter()
    subject = one.write(folder)
    rules = [rule for rule in _ordered(subject.kind) if rule.id not in excused]
    found = _first_broken(subject, rules)
    for options, broken in one.target.also:
        asked = [rule for rule in rules if rule.kind != "any" and rule.id not in broken]
        found = found or _first_broken(replace(subject, options=options), asked)
    return found, time.perf_counter() - begin


def _first_broken(subject: Subject, rules: Sequence[Rule]) -> str | None:
    bench = Bench(subject, timeout=_TIMEOUT)
    try:
        return next((rule.id for rule in rules if judge(rule, bench, shrink=False).failed), None)
    finally:
        bench.close()


_EXCUSED: Final = frozenset({"WRA-408", "REG-018", "REG-004"})
"""Rules that some right plugin breaks, or that a copy of it does by being one."""

_folder: Path | None = None


def _start() -> None:
    """Give each worker a folder of its own on the path, from where its ranks import too."""
    global _folder  # noqa: PLW0603 - one for each worker
    _folder = Path(tempfile.mkdtemp(prefix="fabric-generated-"))
    sys.path.insert(0, str(_folder))
    Finalize(None, shutil.rmtree, args=(_folder,), kwargs={"ignore_errors": True}, exitpriority=10)


def _judge_unchanged(workers: int) -> int:
    """Judge copies without a change: what a rule notices there is the copying's fault."""
    noticed = 0
    for key, rule, seconds in _run([-index - 1 for index in range(len(TARGETS))], workers):
        noticed += rule is not None
        sys.stdout.write(f"{rule or 'kept':9} {seconds:5.1f} s  {key}\n")
        sys.stdout.flush()
    return 1 if noticed else 0


def _work(index: int) -> tuple[str, str | None, float]:
    one = population()[index] if index >= 0 else unchanged(TARGETS[-index - 1])
    assert _folder is not None
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        rule, seconds = judged(one, _folder, _EXCUSED)
    return one.key, rule, seconds


def record() -> Record:
    """Read what was seen of every change."""
    return Record(RECORD, [one.key for one in population()], EQUIVALENT)


def _run(indices: Sequence[int], workers: int) -> Iterator[tuple[str, str | None, float]]:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start) as pool:
        yield from pool.map(_work, indices)


def main(arguments: Sequence[str] | None = None) -> int:
    """Judge; the exit code is 1 where one survives that is not listed as equivalent, nor known to survive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--unchanged", action="store_true", help="the copies with no change, which all rules keep")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    add_choices(parser)
    given = parser.parse_args(arguments)
    if given.unchanged:
        return _judge_unchanged(given.workers)
    kept = record()
    known = set(kept.survivors)
    chosen = kept.choose(given)
    deadline = time.monotonic() + (given.minutes * 60 if given.minutes else float("inf"))
    sys.stdout.write(f"{len(chosen)} of {len(population())} changes, seed {given.seed}\n")
    killed = 0
    fresh: list[str] = []
    count = 0
    for key, rule, seconds in _run(chosen, given.workers):
        count += 1
        killed += rule is not None
        if rule is None and key not in EQUIVALENT and key not in known:
            fresh.append(key)
        kept.seen[key] = rule
        sys.stdout.write(f"{rule or 'SURVIVES':9} {seconds:5.1f} s  {key}\n")
        sys.stdout.flush()
        if given.record and count % 10 == 0:
            kept.save()
        if time.monotonic() > deadline:
            break
    if given.record:
        kept.save()
    sys.stdout.write(f"{killed} of {count} noticed, {len(fresh)} new survivors; score so far {kept.score:.1%}\n")
    return 1 if fresh else 0


if __name__ == "__main__":
    sys.exit(main())
