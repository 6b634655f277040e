"""The precision ``float8``: linear layers multiply in 8 bits, by torchao; the rest stays in the type that it has."""

import warnings

from torch import nn

from fabric_core.contracts import Precision, PrecisionPolicy


class Float8Precision(Precision):
    """Parameters in 32 bits; inputs, weights and gradients of linear layers are rounded to float8 to be multiplied."""

    @property
    def policy(self) -> PrecisionPolicy:
        """Nothing is asked of anybody else: a converted layer takes and gives its parameters' own type."""
        return PrecisionPolicy()

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert the linear layers, which keep their parameters."""
        with warnings.catch_warnings():  # what it imports adds filters
            from torchao.float8 import convert_to_float8_training  # slow to import, and needed here only
        converted: nn.Module = convert_to_float8_training(module, module_filter_fn=_is_large)
        return converted


def _is_large(layer: nn.Module, _name: str) -> bool:
    """Say whether a layer has the sizes that hardware asks for: multiples of 16."""
    return isinstance(layer, nn.Linear) and layer.in_features % 16 == layer.out_features % 16 == 0
