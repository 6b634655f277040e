"""From what was asked for and what is possible to what is chosen, with a reason for each choice.

Everything here is a function of its arguments: it reads no entry point, no environment and no device. A candidate is
made when it is its turn to be asked, so that what comes after the first that fits is neither imported nor made.
"""

import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, cast

import torch

from fabric_core.choosing.offers import causes
from fabric_core.choosing.parsing import brief
from fabric_core.choosing.plan import Choice, Plan, plain_options, processes
from fabric_core.choosing.request import Request
from fabric_core.contracts import Accelerator, Precision, Strategy, Wrapper
from fabric_core.errors import ConflictError, DeviceError, FabricError, PlanError, QuarantinedError, UnavailableError
from fabric_core.kinds import EXTENSION, KINDS, Count

__all__ = ["Candidate", "check_declared", "resolve", "start_clash"]


@dataclass(eq=False)
class Candidate:
    """A plugin that could be chosen for a kind; made, with the options it would have, when it is first asked.

    Args:
        kind: The kind.
        name: The lookup string.
        distribution: The distribution that provides it, with its version.
        make: Makes the plugin, ready to be asked; raises a ``FabricError`` where it can't be.
        named: Where the user named it; empty where the choice is automatic.
        priority: Where it stands in automatic choice, the highest first.
        left_out: Told why, once, when an automatic choice leaves it out because it is broken.
    """

    kind: str
    name: str
    distribution: str
    make: Callable[[], Any]
    named: str = ""
    priority: int = 0
    left_out: Callable[["Candidate", FabricError], None] = lambda _candidate, _failure: None
    failure: FabricError | None = field(default=None, init=False)

    @classmethod
    def of(cls, kind: str, name: str, distribution: str, plugin: Any, **rest: Any) -> "Candidate":
        """Take a plugin that is made already."""
        return cls(kind, name, distribution, lambda: plugin, **rest)

    @property
    def is_made(self) -> bool:
        """Whether it was asked before, and could be made."""
        return "plugin" in vars(self)

    @cached_property
    def plugin(self) -> Any:
        """The plugin.

        Raises:
            FabricError: It can't be made.
        """
        return self.make()

    def refusal(self, clash: Callable[[Any], str | None]) -> str | None:
        """Say why it can't be chosen, if it can't; what is broken is left out once and for all.

        Raises:
            FabricError: It was named, and is broken.
        """
        if self.failure is None:
            try:
                return clash(self.plugin)
            except KeyboardInterrupt:
                raise
            except FabricError as error:
                if self.named:
                    raise
                self.failure = error
            except BaseException as error:  # a stranger's code may raise anything
                broken = self._broken(error)
                if self.named:
                    raise broken from error
                broken.__cause__ = error
                self.failure = broken
            self.left_out(self, self.failure)
        return self.failure.what

    def _broken(self, error: BaseException) -> QuarantinedError:
        reason = str(error) if isinstance(error, _Undeclared) else f"asking whether it fits failed: {causes(error)}"
        return QuarantinedError(
            f"the {self.kind} {self.name!r} of {self.distribution} can't be used: {reason}",
            where=f"{type(self.plugin).__module__}.{type(self.plugin).__qualname__}" if self.is_made else None,
            instead=f"fix it, or choose another {self.kind}",
        )


class _Undeclared(Exception):  # noqa: N818 - never leaves this module
    """What a plugin declares, or answers, is not of the type that its contract gives."""


def resolve(
    request: Request, candidates: Mapping[str, Sequence[Candidate]]
) -> tuple[Plan, Mapping[str, Sequence[Candidate]]]:
    """Choose.

    Args:
        request: What was asked for.
        candidates: For each kind what could be chosen: the named one alone, or all where
            the choice is automatic; where there may be several, each that was named; and the extensions.

    Returns:
        The plan, and the candidates that it chose by their kind.

    Raises:
        UnavailableError: The accelerator that was named can't be used here, or none can.
        DeviceError: The devices are not there.
        PlanError: The choices don't fit together.
        ConflictError: What an automatic choice would take is offered by several distributions.
        QuarantinedError: What was named is broken.
    """
    found = _Found()
    accelerator = found.choose(
        candidates["accelerator"],
        "accelerator",
        lambda plugin: _absence(plugin, request),
        "on this machine",
        UnavailableError,
    )
    device: Accelerator = accelerator.plugin
    indices = _indices(device, request)
    world_size = len(indices) * request.num_nodes
    strategy = found.choose(
        candidates["strategy"],
        "strategy",
        lambda plugin: _strategy_clash(plugin, device, world_size),
        f"for {processes(world_size)} on {device.device_type}",
    )
    found.choose(
        candidates["precision"],
        "precision",
        lambda plugin: _precision_clash(plugin, device, strategy),
        f"for {strategy.name} on {device.device_type}",
    )
    for one in candidates.get("wrapper", ()):
        found.choose([one], "wrapper", lambda plugin: _wrapper_clash(plugin, strategy), f"with {strategy.name}")
    _check_order(tuple(found.candidates.get("wrapper", ())))
    for kind in (*KINDS, EXTENSION):
        if kind not in found.candidates:
            found.take(kind, candidates.get(kind, ()))
    choices = tuple(choice for kind in (*KINDS, EXTENSION) for choice in found.choices.get(kind, ()))
    return Plan(choices, indices, request.num_nodes), found.candidates


class _Found:
    """What was chosen so far, with a reason for each."""

    def __init__(self) -> None:
        self.choices: dict[str, list[Choice]] = {}
        self.candidates: dict[str, list[Candidate]] = {}

    def _add(self, candidate: Candidate, reason: str, rejected: Sequence[tuple[str, str]] = ()) -> None:
        options = plain_options(candidate.plugin) if candidate.is_made else {}
        choice = Choice(candidate.kind, candidate.name, candidate.distribution, options, reason, tuple(rejected))
        self.choices.setdefault(candidate.kind, []).append(choice)
        self.candidates.setdefault(candidate.kind, []).append(candidate)

    def take(self, kind: str, candidates: Sequence[Candidate]) -> None:
        """Take what needs no comparing: all that were named, or the first of one, or all that are asked in order."""
        if kind in KINDS and KINDS[kind].count is Count.ONE:
            self.choose(candidates, kind, lambda _plugin: None, "here")
            return
        for one in candidates:
            if one.named and kind != EXTENSION:
                one.refusal(check_declared)
            self._add(one, _named(one) if one.named else _ranked(one))

    def choose(
        self,
        candidates: Sequence[Candidate],
        kind: str,
        clash: Callable[[Any], str | None],
        why: str,
        error: type[FabricError] = PlanError,
    ) -> Candidate:
        """Choose among candidates: the named one, or the one with the highest priority that fits.

        Raises:
            PlanError: None fits.
            ConflictError: Several distributions offer the one that is best.
            QuarantinedError: The named one is broken.
        """

        def refusal(plugin: Any) -> str | None:
            # What isn't here may be unable to say what it is.
            absent = clash(plugin) if kind == "accelerator" else None
            if absent is None:
                check_declared(plugin)
            return absent if kind == "accelerator" else clash(plugin)

        rejected: list[tuple[str, str]] = []
        rest = iter(sorted(candidates, key=lambda one: (-one.priority, one.name, one.distribution)))
        for candidate in rest:
            reason = candidate.refusal(refusal)
            if reason is not None:
                rejected.append((candidate.name, reason))
                continue
            others = list(rest)
            _check_alone(candidate, others, refusal)
            rejected += [
                (one.name, f"its priority is {one.priority}, and that of {candidate.name} is {candidate.priority}")
                for one in others
            ]
            self._add(
                candidate, _named(candidate) if candidate.named else f"the highest priority that fits, {why}", rejected
            )
            return candidate
        named = next((candidate for candidate in candidates if candidate.named), None)
        raise error(
            f"the {kind} {named.name!r} can't be used {why}" if named else f"no {kind} fits {why}",
            where=f"{kind}={named.name!r}" if named else kind,
            got="; ".join(f"{name}: {reason}" for name, reason in rejected)
            or f"no {kind} that is installed is offered to the automatic choice",
            instead=f"another {kind}" if rejected else f"the name of a {kind}",
        )


def _check_alone(best: Candidate, others: Sequence[Candidate], refusal: Callable[[Any], str | None]) -> None:
    twins = [one for one in others if (one.name, one.priority) == (best.name, best.priority)]
    twins = [one for one in twins if one.refusal(refusal) is None]
    if twins:
        raise ConflictError(
            f"{len(twins) + 1} distributions offer the {best.kind} {best.name!r}, which would be chosen automatically",
            where=f'{best.kind}="auto"',
            got=", ".join(one.distribution for one in (best, *twins)),
            instead=f'{best.kind}="DISTRIBUTION/{best.name}"',
        )


def _named(candidate: Candidate) -> str:
    return f"named in {candidate.named}"


def _ranked(candidate: Candidate) -> str:
    return f"asked in this order: its priority is {candidate.priority}"


def check_declared(plugin: Any) -> None:
    """Check that the properties of a plugin have the types that its contract gives them.

    Raises:
        _Undeclared: One has not, or raised.
    """
    for name, expected in _declared(cast("Any", KINDS[plugin.kind].contract)):
        try:
            value = getattr(plugin, name)
        except Exception as error:
            raise _Undeclared(f"its {name} failed: {causes(error)}") from error
        if not isinstance(value, expected):
            shown = " or ".join(one.__name__ for one in expected)
            raise _Undeclared(f"{type(plugin).__name__}.{name} is {brief(value)}, and must be of the type {shown}")


@lru_cache(maxsize=32)
def _declared(contract: Any) -> tuple[tuple[str, tuple[type, ...]], ...]:
    """Give the properties of a contract, and its capabilities, with their types."""
    found: list[tuple[str, tuple[type, ...]]] = []
    capabilities = getattr(contract, "capabilities", None)
    if capabilities is not None:
        found.append(("capabilities", (type(capabilities),)))
    for name, one in vars(contract).items():
        if isinstance(one, property) and one.fset is None:
            hint = typing.get_type_hints(one.fget)["return"]
            parts = typing.get_args(hint) if typing.get_origin(hint) in {types.UnionType, typing.Union} else (hint,)
            if all(isinstance(part, type) for part in parts):
                found.append((name, tuple(parts)))
    return tuple(found)


def _indices(accelerator: Accelerator, request: Request) -> tuple[int, ...]:
    """Ask the accelerator for its devices.

    Raises:
        DeviceError: They are not there.
        _Undeclared: What it answers are no indices.
    """
    spec = list(request.devices) if isinstance(request.devices, tuple) else request.devices
    indices = accelerator.parse_devices(spec)
    if not isinstance(indices, Sequence) or not indices or not all(type(index) is int for index in indices):
        raise _Undeclared(f"parse_devices gave {brief(indices)}, and must give at least one whole number")
    return tuple(indices)


def _absence(accelerator: Accelerator, request: Request) -> str | None:
    if not isinstance(available := accelerator.is_available(), bool):
        raise _Undeclared(f"is_available() gave {brief(available)}, and no bool")
    if not available:
        return f"no {accelerator.device_type} device can be used here"
    with suppress(DeviceError):  # that one is the user's, once it is chosen
        _indices(accelerator, request)
    return None


def _types(declared: frozenset[str]) -> str:
    return f"it declares the device types {', '.join(sorted(declared))}"


def _strategy_clash(strategy: Strategy, accelerator: Accelerator, world_size: int) -> str | None:
    declared = strategy.capabilities
    if declared.device_types is not None and accelerator.device_type not in declared.device_types:
        return f"{_types(declared.device_types)}, and the accelerator's is {accelerator.device_type}"
    if world_size < declared.min_world_size:
        return f"it declares at least {processes(declared.min_world_size)}, and there would be {world_size}"
    if declared.max_world_size is not None and world_size > declared.max_world_size:
        return f"it declares at most {processes(declared.max_world_size)}, and there would be {world_size}"
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


def _precision_clash(precision: Precision, accelerator: Accelerator, strategy: Candidate) -> str | None:
    declared = precision.capabilities
    if declared.device_types is not None and accelerator.device_type not in declared.device_types:
        return f"{_types(declared.device_types)}, and the accelerator's is {accelerator.device_type}"
    policy, carrier = precision.policy, strategy.plugin.capabilities
    for dtype in (policy.param_dtype, policy.compute_dtype):
        if isinstance(dtype, torch.dtype) and not accelerator.supports(dtype):
            return f"it computes in {dtype}, which {accelerator.device_type} doesn't support here"
    if policy.param_dtype is not None and (other := carrier.refusal_of(policy.param_dtype)) is not None:
        return f"its parameters are of the type {policy.param_dtype}, and the strategy {strategy.name} {other}"
    if policy.loss_scaling and not carrier.loss_scaling:
        return f"it scales the loss, which the strategy {strategy.name} declares not to support"
    converts = policy.compute_dtype is not None and policy.compute_dtype != policy.param_dtype
    if carrier.applies_mixed_precision and converts and not policy.autocast:
        return (
            f"it computes in {policy.compute_dtype} by other means than autocast, and the strategy {strategy.name} "
            "declares to carry out the policy itself"
        )
    return None


def _wrapper_clash(wrapper: Wrapper, strategy: Candidate) -> str | None:
    if strategy.plugin.capabilities.sharded and not wrapper.capabilities.supports_sharded_parameters:
        return f"it declares not to work with a strategy that shards, and {strategy.name} does"
    return None


def _check_order(wrappers: tuple[Candidate, ...]) -> None:
    """Refuse an order that breaks a declared one."""
    for position, earlier in enumerate(wrappers):
        for later in wrappers[position + 1 :]:
            if later.name in earlier.plugin.capabilities.after or earlier.name in later.plugin.capabilities.before:
                raise PlanError(
                    f"the wrapper {earlier.name!r} must come after {later.name!r}",
                    where="wrappers",
                    got=", ".join(one.name for one in wrappers),
                    instead=f"put {later.name!r} before {earlier.name!r}",
                    ordered=True,
                )
