"""From what was asked for and what is possible to what is chosen, with a reason for each choice.

Everything here is a function of its arguments: it reads no entry point, no environment and no device.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from pydantic import BaseModel

from fabric_core.choosing.request import PluginRef, Request
from fabric_core.contracts import (
    Accelerator,
    Precision,
    Strategy,
    Wrapper,
)
from fabric_core.contracts._spec import by_name
from fabric_core.errors import ConflictError, FabricError, PlanError, UnavailableError

__all__ = ["Candidate", "Choice", "Plan", "alternatives", "resolve", "shown", "start_clash"]


@dataclass(frozen=True)
class Candidate:
    """A plugin that could be chosen for a kind, made with the options it would have, or why it can't be.

    Args:
        kind: The kind.
        name: The lookup string.
        distribution: The distribution that brings it, with its version.
        plugin: The plugin, ready to be asked: its bound behaviours.
        failure: Why there is no plugin.
        named: Where the user named it; empty where the choice is automatic.
    """

    kind: str
    name: str
    distribution: str
    plugin: Any = None
    failure: FabricError | None = None
    named: str = ""


@dataclass(frozen=True)
class Choice:
    """What was chosen for one kind.

    Args:
        kind: The kind.
        name: The lookup string.
        distribution: The distribution that brings it, with its version.
        options: The options that differ from their defaults.
        reason: Why it was chosen.
        rejected: What else there was, and why it was not chosen.
        plugin: The plugin's bound behaviours.
    """

    kind: str
    name: str
    distribution: str
    options: Mapping[str, Any]
    reason: str
    rejected: tuple[tuple[str, str], ...]
    plugin: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class Plan:
    """What was chosen for every kind, and why; the same on every rank.

    Args:
        accelerator: The accelerator.
        strategy: The strategy.
        precision: The precision.
        wrappers: The wrappers, in the order in which they act.
        device_indices: The devices of this node, one for each of its processes.
        num_nodes: The number of nodes.
        launchers: The launchers, in the order in which they are asked whether they started this process; the first
            starts processes where none did.
        checkpoints: The checkpoint formats, in the order in which they are asked whether they recognise a checkpoint.
        loggers: The loggers.
        extensions: What wraps behaviours or listens, the outermost first.
    """

    accelerator: Choice
    strategy: Choice
    precision: Choice
    wrappers: tuple[Choice, ...]
    device_indices: tuple[int, ...]
    num_nodes: int
    launchers: tuple[Choice, ...] = ()
    checkpoints: tuple[Choice, ...] = ()
    loggers: tuple[Choice, ...] = ()
    extensions: tuple[Choice, ...] = ()

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return len(self.device_indices) * self.num_nodes

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Every choice, in the order of the kinds."""
        return (
            self.accelerator,
            self.strategy,
            self.precision,
            *self.wrappers,
            *self.launchers,
            *self.checkpoints,
            *self.loggers,
            *self.extensions,
        )

    def as_dict(self) -> dict[str, Any]:
        """Give the plan as plain data, for JSON and for comparing ranks."""
        return {
            "choices": [
                {
                    "kind": choice.kind,
                    "name": choice.name,
                    "distribution": choice.distribution,
                    "options": {name: str(value) for name, value in choice.options.items()},
                    "reason": choice.reason,
                    "rejected": [{"name": name, "reason": why} for name, why in choice.rejected],
                }
                for choice in self.choices
            ],
            "devices": list(self.device_indices),
            "num_nodes": self.num_nodes,
            "world_size": self.world_size,
        }

    def __str__(self) -> str:
        """Show the plan as a table of plain text."""
        rows = [(choice.kind, shown(choice), choice.distribution, choice.reason) for choice in self.choices]
        devices = ", ".join(str(device) for device in self.device_indices)
        processes = f"{self.world_size} process{'es' if self.world_size != 1 else ''} on {self.num_nodes} node"
        rows.append(("devices", devices, "", processes + ("s" if self.num_nodes != 1 else "")))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]).rstrip()
            for row in rows
        )


def resolve(request: Request, candidates: Mapping[str, Sequence[Candidate]]) -> Plan:
    """Choose.

    Args:
        request: What was asked for.
        candidates: For each kind what could be chosen: the named one alone, or all where the choice is automatic;
            for wrappers and loggers, each that was named; for extensions, each that there is.

    Raises:
        UnavailableError: The accelerator that was named can't be used here, or none can.
        DeviceError: The devices are not there.
        PlanError: The choices don't fit together.
        ConflictError: What an automatic choice would take is offered by several distributions.
    """
    accelerator = _choose(candidates["accelerator"], "accelerator", _absence, "on this machine", UnavailableError)
    device: Accelerator = accelerator.plugin
    indices = tuple(device.parse_devices(_spec(request)))
    world_size = len(indices) * request.num_nodes
    strategy = _choose(
        candidates["strategy"],
        "strategy",
        lambda plugin: _strategy_clash(plugin, device, world_size),
        f"for {_processes(world_size)} on {device.device_type}",
    )
    precision = _choose(
        candidates["precision"],
        "precision",
        lambda plugin: _precision_clash(plugin, device, strategy),
        f"for {strategy.name} on {device.device_type}",
    )
    wrappers = tuple(
        _choose([one], "wrapper", lambda plugin: _wrapper_clash(plugin, strategy), f"with {strategy.name}")
        for one in candidates.get("wrapper", ())
    )
    return Plan(
        accelerator,
        strategy,
        precision,
        _ordered(wrappers),
        indices,
        request.num_nodes,
        launchers=_ranked(candidates.get("launcher", ())),
        checkpoints=_ranked(candidates.get("checkpoint", ())),
        loggers=tuple(_choice(one, _named(one)) for one in candidates.get("logger", ())),
        extensions=tuple(_choice(one, _named(one)) for one in candidates.get("extension", ())),
    )


def alternatives(
    request: Request, candidates: Mapping[str, Sequence[Candidate]], offered: Mapping[str, Sequence[Candidate]]
) -> list[str]:
    """Find the nearest requests that work: those that change one argument, else those that change two.

    Args:
        request: What was asked for, and can't be done.
        candidates: What it was resolved from.
        offered: For each kind everything that could be named instead.

    Returns:
        Each as the arguments to write instead, such as ``strategy="name"``; at most two for each argument, four in all.
    """
    changes: list[tuple[str, dict[str, Any], dict[str, Sequence[Candidate]]]] = []
    for kind in ("strategy", "precision", "accelerator"):
        asked = {one.name for one in candidates[kind] if one.named}
        if not asked:
            continue
        others = [one for one in offered.get(kind, ()) if one.failure is None and one.name not in asked]
        others.sort(key=lambda one: (-_priority(one), one.name))
        changes += [(f'{kind}="{one.name}"', {}, {kind: [replace(one, named="an alternative")]}) for one in others]
    changes += [(f"devices={count}", {"devices": count}, {}) for count in (1, 2) if count != request.devices]
    if request.num_nodes > 1:
        changes.append(("num_nodes=1", {"num_nodes": 1}, {}))
    wrappers = candidates.get("wrapper", ())
    for index, wrapper in enumerate(wrappers):
        rest = [one for position, one in enumerate(wrappers) if position != index]
        changes.append((f"wrappers without {wrapper.name!r}", {}, {"wrapper": rest}))
    pairs = [
        (f"{one} with {other}", {**update, **its_update}, {**swap, **its_swap})
        for (one, update, swap), (other, its_update, its_swap) in itertools.combinations(changes, 2)
        if not (update.keys() & its_update.keys()) and not (swap.keys() & its_swap.keys())
    ]
    found: dict[str, list[str]] = {}
    for tried in (changes, pairs):
        for text, update, swap in tried:
            texts = found.setdefault(text.partition("=")[0], [])
            if len(texts) < _SHOWN and _works(request.model_copy(update=update), {**candidates, **swap}):
                texts.append(text)
        if any(found.values()):
            break
    return [text for texts in found.values() for text in texts][:_ALL_SHOWN]


_ALL_SHOWN: Final = 4
_SHOWN: Final = 2


def _works(request: Request, candidates: Mapping[str, Sequence[Candidate]]) -> bool:
    try:
        resolve(request, candidates)
    except FabricError:
        return False
    return True


def _spec(request: Request) -> Any:
    return list(request.devices) if isinstance(request.devices, tuple) else request.devices


def _processes(count: int) -> str:
    return f"{count} process{'es' if count != 1 else ''}"


def _absence(accelerator: Accelerator) -> str | None:
    return None if accelerator.is_available() else f"no {accelerator.device_type} device can be used here"


def _types(declared: frozenset[str]) -> str:
    return f"it declares the device types {', '.join(sorted(declared))}"


def _strategy_clash(strategy: Strategy, accelerator: Accelerator, world_size: int) -> str | None:
    declared = strategy.capabilities
    if declared.device_types is not None and accelerator.device_type not in declared.device_types:
        return f"{_types(declared.device_types)}, and the accelerator's is {accelerator.device_type}"
    if world_size < declared.min_world_size:
        return f"it declares at least {_processes(declared.min_world_size)}, and there would be {world_size}"
    if declared.max_world_size is not None and world_size > declared.max_world_size:
        return f"it declares at most {_processes(declared.max_world_size)}, and there would be {world_size}"
    return start_clash(strategy, accelerator)


def start_clash(strategy: Strategy, accelerator: Accelerator) -> str | None:
    """Say why processes can't be started in the strategy's way now, if they can't."""
    method, ways = strategy.start_method, accelerator.capabilities.start_methods
    if method is None or method in ways or not accelerator.is_started():
        return None
    return (
        f"it starts processes by {method}, this process has used {accelerator.device_type} already, and after that its "
        f"accelerator declares only {', '.join(sorted(ways)) or 'none'}"
    )


def _precision_clash(precision: Precision, accelerator: Accelerator, strategy: Choice) -> str | None:
    declared = precision.capabilities
    if declared.device_types is not None and accelerator.device_type not in declared.device_types:
        return f"{_types(declared.device_types)}, and the accelerator's is {accelerator.device_type}"
    policy, carrier = precision.policy, strategy.plugin.capabilities
    for dtype in (policy.param_dtype, policy.compute_dtype):
        if isinstance(dtype, torch.dtype) and not accelerator.supports(dtype):
            return f"it computes in {dtype}, which {accelerator.device_type} doesn't support here"
    if policy.loss_scaling and not carrier.loss_scaling:
        return f"it scales the loss, which the strategy {strategy.name} declares not to support"
    converts = policy.compute_dtype is not None and policy.compute_dtype != policy.param_dtype
    if carrier.applies_mixed_precision and converts and not policy.autocast:
        return (
            f"it computes in {policy.compute_dtype} by other means than autocast, and the strategy {strategy.name} "
            "declares to carry out the policy itself"
        )
    return None


def _wrapper_clash(wrapper: Wrapper, strategy: Choice) -> str | None:
    if strategy.plugin.capabilities.sharded and not wrapper.capabilities.supports_sharded_parameters:
        return f"it declares not to work with a strategy that shards, and {strategy.name} does"
    return None


def _ordered(wrappers: tuple[Choice, ...]) -> tuple[Choice, ...]:
    """Keep the user's order; refuse one that breaks a declared order."""
    for position, earlier in enumerate(wrappers):
        for later in wrappers[position + 1 :]:
            if later.name in earlier.plugin.capabilities.after or earlier.name in later.plugin.capabilities.before:
                raise PlanError(
                    f"the wrapper {earlier.name!r} must come after {later.name!r}",
                    where="wrappers",
                    got=", ".join(choice.name for choice in wrappers),
                    instead=f"put {later.name!r} before {earlier.name!r}",
                    ordered=True,
                )
    return wrappers


def _ranked(candidates: Sequence[Candidate]) -> tuple[Choice, ...]:
    """Order what is asked one after the other: the named one alone, or all by their priority."""
    sound = [one for one in candidates if one.failure is None and (one.named or _priority(one) >= 0)]
    sound.sort(key=lambda one: (-_priority(one), one.name))
    return tuple(
        _choice(one, _named(one) if one.named else f"asked in this order: its priority is {_priority(one)}")
        for one in sound
    )


def _choose(
    candidates: Sequence[Candidate], kind: str, clash: Any, why: str, error: type[FabricError] = PlanError
) -> Choice:
    """Choose among candidates: the named one, or the one with the highest priority that fits.

    Raises:
        PlanError: None fits.
        ConflictError: Several distributions offer the one that is best.
    """
    fitting: list[Candidate] = []
    rejected: list[tuple[str, str]] = []
    for candidate in candidates:
        reason = candidate.failure.what if candidate.failure is not None else clash(candidate.plugin)
        if reason is None and not candidate.named and _priority(candidate) < 0:
            reason = "it is never chosen automatically"
        if reason is None:
            fitting.append(candidate)
        else:
            rejected.append((candidate.name, reason))
    if not fitting:
        named = next((candidate for candidate in candidates if candidate.named), None)
        raise error(
            f"the {kind} {named.name!r} can't be used {why}" if named else f"no {kind} fits {why}",
            where=f"{kind}={named.name!r}" if named else kind,
            got="; ".join(f"{name}: {reason}" for name, reason in rejected) or "no plugin of this kind is installed",
            instead=f"another {kind}",
        )
    fitting.sort(key=lambda candidate: (-_priority(candidate), candidate.name, candidate.distribution))
    best, *rest = fitting
    twins = [one for one in rest if one.name == best.name and _priority(one) == _priority(best)]
    if twins:
        raise ConflictError(
            f"{len(twins) + 1} distributions offer the {kind} {best.name!r}, which would be chosen automatically",
            where=f'{kind}="auto"',
            got=", ".join(one.distribution for one in (best, *twins)),
            instead=f'{kind}="DISTRIBUTION/{best.name}"',
        )
    rejected += [
        (one.name, f"its priority is {_priority(one)}, and that of {best.name} is {_priority(best)}") for one in rest
    ]
    return _choice(best, _named(best) if best.named else f"the highest priority that fits, {why}", rejected)


def _choice(candidate: Candidate, reason: str, rejected: Sequence[tuple[str, str]] = ()) -> Choice:
    return Choice(
        kind=candidate.kind,
        name=candidate.name,
        distribution=candidate.distribution,
        options=_given(candidate.plugin),
        reason=reason,
        rejected=tuple(rejected),
        plugin=candidate.plugin,
    )


def _named(candidate: Candidate) -> str:
    return f"named in {candidate.named}"


def _priority(candidate: Candidate) -> int:
    priority: int = getattr(candidate.plugin, "capabilities").priority  # noqa: B009 - not on every kind
    return priority


def _given(plugin: Any) -> dict[str, Any]:
    options = getattr(plugin, "options", None)
    if not isinstance(options, BaseModel):
        return {}
    return {name: by_name(value) for name, value in options.model_dump(exclude_defaults=True).items()}


def shown(choice: Choice) -> str:
    """Give a choice as the text that names it."""
    options = {name: value if isinstance(value, _PLAIN) else str(value) for name, value in choice.options.items()}
    return str(PluginRef(name=choice.name, options=options))


_PLAIN: Final = (bool, int, float, str, type(None))
