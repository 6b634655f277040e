"""Which modules are sharded, or checkpointed, as one unit."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

from torch import nn

from fabric_core.contracts import repeated_blocks
from fabric_core.errors import OptionError

__all__ = ["ModulePolicy", "choose_modules"]

ModulePolicy = Literal["auto"] | set[Any] | Callable[[nn.Module], bool]
"""Which modules: ``"auto"``, a set of classes (or of their names), or a callable that says yes or no to each."""


def choose_modules(module: nn.Module, policy: ModulePolicy | None, *, option: str) -> list[nn.Module]:
    """Find the modules that a policy names, the innermost first.

    A module that shares a parameter with something outside of it is left out, since it can't be a unit of its own.

    Args:
        module: Where to look; it is never found itself.
        policy: Which modules; ``None`` is none.
        option: The option that the policy is the value of, for messages.

    Raises:
        OptionError: The policy names a class of which there is no module.
    """
    if policy is None:
        return []
    below = [one for name, one in module.named_modules() if name]
    if policy == "auto":
        chosen = repeated_blocks(module)
    elif callable(policy):
        asked = _asked(policy)
        chosen = [one for one in below if asked(one)]
    else:
        chosen = [one for one in below if type(one) in policy or type(one).__name__ in policy]
        there = {type(one) for one in chosen} | {type(one).__name__ for one in chosen}
        absent = [getattr(one, "__name__", str(one)) for one in policy if one not in there]
        if absent:
            raise OptionError(
                f"the model has no {', '.join(sorted(absent))}",
                where=option,
                got=", ".join(sorted({type(one).__name__ for one in below})),
                instead="classes of which the model has modules, or their names",
            )
    users: dict[nn.Parameter, int] = {}
    for one in module.modules():
        for parameter in one.parameters(recurse=False):
            users[parameter] = users.get(parameter, 0) + 1
    return [one for one in reversed(chosen) if _stands_alone(one, users)]


def _asked(policy: Callable[..., bool]) -> Callable[[nn.Module], bool]:
    """Give a policy as a function of a module; those of ``torch.distributed.fsdp.wrap`` take more."""
    try:
        takes = inspect.signature(policy).parameters
    except (TypeError, ValueError):  # a builtin that doesn't tell
        return policy
    if "recurse" not in takes:
        return policy
    return lambda one: policy(
        module=one, recurse=False, nonwrapped_numel=sum(parameter.numel() for parameter in one.parameters())
    )


def _stands_alone(module: nn.Module, users: Mapping[nn.Parameter, int]) -> bool:
    inside: dict[nn.Parameter, int] = {}
    for one in module.modules():
        for parameter in one.parameters(recurse=False):
            inside[parameter] = inside.get(parameter, 0) + 1
    return bool(inside) and all(users[parameter] == count for parameter, count in inside.items())
