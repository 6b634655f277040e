"""The repeated blocks of a model."""

from torch import nn

__all__ = ["repeated_blocks"]


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """Find the repeated blocks: several children of one class in a list, each with children of its own.

    Args:
        module: Where to look; it is never found itself.

    Returns:
        The outermost ones, in the model's order.
    """
    if isinstance(module, nn.ModuleList | nn.Sequential):
        kinds: dict[type, int] = {}
        for child in module.children():
            kinds[type(child)] = kinds.get(type(child), 0) + 1
        blocks = {
            child for child in module.children() if kinds[type(child)] > 1 and next(child.children(), None) is not None
        }
    else:
        blocks = set()
    found: list[nn.Module] = []
    for child in module.children():
        found += [child] if child in blocks else repeated_blocks(child)
    return found
