"""Which blocks of a model a wrapper acts on."""

from torch import nn

from fabric_core.contracts import PluginOptions, repeated_blocks
from fabric_core.errors import SetupError

__all__ = ["BlockOptions", "find_blocks"]


class BlockOptions(PluginOptions):
    """The options of wrappers that act on blocks."""

    blocks: frozenset[str] | None = None
    """The names of the blocks' classes; ``None`` finds the repeated blocks: children of one class in a list."""


def find_blocks(module: nn.Module, names: frozenset[str] | None, where: str) -> list[nn.Module]:
    """Find the blocks of a model, in its order.

    Raises:
        SetupError: There is none, or none of a class that was named.
    """
    if names is None:
        found = repeated_blocks(module)
        missing = "" if found else "repeated blocks"
    else:
        found = [one for one in module.modules() if type(one).__name__ in names]
        missing = ", ".join(sorted(names - {type(one).__name__ for one in found}))
    if missing:
        raise SetupError(
            f"the model has no {missing}",
            where=where,
            got=type(module).__name__,
            instead='name the classes of its blocks: blocks=["Block"]',
        )
    return found
