"""From what was asked for and what is possible to what is chosen, with a reason for each choice.

Everything here is a function of its arguments: it reads no entry point, no environment and no device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fabric_core.contracts import (
    Accelerator,
    Plugin,
    Precision,
    Strategy,
    Wrapper,
)
from fabric_core.errors import FabricError, PlanError, UnavailableError
from fabric_core.request import PluginRef, Request

__all__ = ["Candidate", "Choice", "Plan", "resolve"]


@dataclass(frozen=True)
class Candidate:
    """A plugin that could be chosen for a kind, made with the options it would have, or why it can't be.

    Args:
        kind: The kind.
        name: The lookup string.
        distribution: The distribution that brings it, with its version.
        plugin: The plugin, ready to be asked.
        failure: Why there is no plugin.
        named: The user named it.
        alias: It is another name for a plugin that has a name of its own.
    """

    kind: str
    name: str
    distribution: str
    plugin: Plugin | None = None
    failure: FabricError | None = None
    named: bool = False
    alias: bool = False


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
        plugin: The plugin.
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
    """

    accelerator: Choice
    strategy: Choice
    precision: Choice
    wrappers: tuple[Choice, ...]
    device_indices: tuple[int, ...]
    num_nodes: int

    @property
    def world_size(self) -> int:
        """The number of processes."""
        return len(self.device_indices) * self.num_nodes

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Every choice, in the order of the kinds."""
        return (self.accelerator, self.strategy, self.precision, *self.wrappers)

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
        rows = [
            (choice.kind, _shown(choice.name, choice.options), choice.distribution, choice.reason)
            for choice in self.choices
        ]
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
            for wrappers, each that was named.

    Raises:
        UnavailableError: The accelerator that was named can't be used here, or none can.
        DeviceError: The devices are not there.
        PlanError: The choices don't fit together.
        PluginError: What was named can't be had, or what an automatic choice depends on can't be loaded.
    """
    accelerator = _choose_accelerator(candidates["accelerator"])
    device: Accelerator = accelerator.plugin
    indices = tuple(device.parse_devices(_spec(request)))
    world_size = len(indices) * request.num_nodes
    strategy = _choose(
        candidates["strategy"],
        "strategy",
        lambda plugin: _strategy_clash(plugin, device.device_type, world_size),
        f"for {world_size} process{'es' if world_size != 1 else ''} on {device.device_type}",
    )
    precision = _choose(
        candidates["precision"],
        "precision",
        lambda plugin: _precision_clash(plugin, device, strategy),
        f"for {strategy.name} on {device.device_type}",
    )
    wrappers = tuple(
        _choose([one], "wrapper", lambda plugin: _wrapper_clash(plugin, strategy), "")
        for one in candidates.get("wrapper", ())
    )
    return Plan(accelerator, strategy, precision, _ordered(wrappers), indices, request.num_nodes)


def _spec(request: Request) -> Any:
    return list(request.devices) if isinstance(request.devices, tuple) else request.devices


def _choose_accelerator(candidates: Sequence[Candidate]) -> Choice:
    def clash(plugin: Accelerator) -> str | None:
        return None if plugin.is_available() else f"no {plugin.device_type} device can be used here"

    try:
        return _choose(candidates, "accelerator", clash, "on this machine")
    except PlanError as error:
        raise UnavailableError(error.what, where=error.where, got=error.got, instead=error.instead) from error


def _strategy_clash(strategy: Strategy, device_type: str, world_size: int) -> str | None:
    declared = strategy.capabilities
    if declared.device_types is not None and device_type not in declared.device_types:
        return f"it declares the device types {', '.join(sorted(declared.device_types))}, not {device_type}"
    if world_size < declared.min_world_size:
        return f"it declares at least {declared.min_world_size} processes, and there would be {world_size}"
    if declared.max_world_size is not None and world_size > declared.max_world_size:
        return f"it declares at most {declared.max_world_size} process, and there would be {world_size}"
    return None


def _precision_clash(precision: Precision, accelerator: Accelerator, strategy: Choice) -> str | None:
    declared = precision.capabilities
    if declared.device_types is not None and accelerator.device_type not in declared.device_types:
        return f"it declares the device types {', '.join(sorted(declared.device_types))}, not {accelerator.device_type}"
    policy = precision.policy
    for dtype in (policy.param_dtype, policy.compute_dtype):
        if isinstance(dtype, torch.dtype) and not accelerator.supports(dtype):
            return f"it computes in {dtype}, which {accelerator.device_type} doesn't support here"
    if policy.loss_scaling and not strategy.plugin.capabilities.loss_scaling:
        return f"it scales the loss, which the strategy {strategy.name} declares not to support"
    return None


def _wrapper_clash(wrapper: Wrapper, strategy: Choice) -> str | None:
    if strategy.plugin.capabilities.sharded and not wrapper.capabilities.strategies_sharded:
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
                )
    return wrappers


def _choose(candidates: Sequence[Candidate], kind: str, clash: Any, why: str) -> Choice:
    """Choose among candidates: the named one, or the one with the highest priority that fits.

    Raises:
        PlanError: None fits.
    """
    fitting: list[Candidate] = []
    rejected: list[tuple[str, str]] = []
    for candidate in candidates:
        if candidate.failure is not None:
            raise candidate.failure
        reason = clash(candidate.plugin)
        if reason is None and not candidate.named and (candidate.alias or _priority(candidate) < 0):
            reason = "it is another name for a plugin" if candidate.alias else "it is never chosen automatically"
        if reason is None:
            fitting.append(candidate)
        else:
            rejected.append((candidate.name, reason))
    if not fitting:
        shown = "; ".join(f"{name}: {reason}" for name, reason in rejected)
        named = [candidate for candidate in candidates if candidate.named]
        raise PlanError(
            f"the {kind} {named[0].name!r} can't be used {why}".rstrip() if named else f"no {kind} fits {why}",
            where=f"{kind}={named[0].name!r}" if named else kind,
            got=shown or "no plugin of this kind is installed",
            instead=f"another {kind}, or other devices",
        )
    fitting.sort(key=lambda candidate: (-_priority(candidate), candidate.name))
    best, *rest = fitting
    rejected += [(one.name, f"its priority {_priority(one)} is lower than {_priority(best)}") for one in rest]
    return Choice(
        kind=kind,
        name=best.name,
        distribution=best.distribution,
        options=_given(best.plugin),
        reason="named in the request" if best.named else f"the highest priority that fits, {why}",
        rejected=tuple(rejected),
        plugin=best.plugin,
    )


def _priority(candidate: Candidate) -> int:
    priority: int = getattr(candidate.plugin, "capabilities").priority  # noqa: B009 - not on every kind
    return priority


def _given(plugin: Plugin | None) -> dict[str, Any]:
    if plugin is None:
        return {}
    return plugin.options.model_dump(exclude_defaults=True)


def _shown(name: str, options: Mapping[str, Any]) -> str:
    return str(PluginRef(name=name, options={key: str(value) for key, value in options.items()}))
