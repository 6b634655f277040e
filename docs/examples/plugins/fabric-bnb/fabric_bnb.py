"""Precisions by bitsandbytes: the weights of frozen linear layers lie in 4 bits."""

from typing import Any, Final, Literal

from torch import nn

from fabric_core.contracts import PluginOptions, Precision, PrecisionCapabilities, PrecisionPolicy, Preset


class FourBitOptions(PluginOptions):
    """The options of the precision ``bnb-nf4``."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit type."""
    double_quant: bool = False
    """Store the scales in 8 bits, too."""
    skip: tuple[str, ...] = ()
    """Names of layers, and of modules that have some, to leave as they are."""


class FourBitPrecision(Precision):
    """Linear layers whose weights are frozen keep them in 4 bits, and compute in their inputs' type."""

    Options = FourBitOptions
    options: FourBitOptions
    capabilities = PrecisionCapabilities(device_types=frozenset({"cpu", "cuda", "xpu"}))

    @property
    def policy(self) -> PrecisionPolicy:
        """Nothing is asked of anybody else: a converted layer takes and gives its inputs' type."""
        return PrecisionPolicy()

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Replace layers in place; one that is trained, or tied to another, stays."""
        uses = [id(one) for each in module.modules() for one in each.parameters(recurse=False)]
        for name, layer in list(module.named_modules()):
            if type(layer) is not nn.Linear or not name or layer.weight.requires_grad:
                continue
            if any(name == one or name.startswith(f"{one}.") for one in self.options.skip):
                continue
            if uses.count(id(layer.weight)) == 1:
                parent, _, own = name.rpartition(".")
                setattr(module.get_submodule(parent), own, self._converted(layer))
        return module

    def _converted(self, layer: nn.Linear) -> nn.Module:
        import bitsandbytes as bnb  # slow to import, and needed here only

        made: Any = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            compress_statistics=self.options.double_quant,
            quant_type=self.options.quant_type,
            device="meta",
        )
        made.weight = bnb.nn.Params4bit(
            layer.weight.detach(),
            requires_grad=False,
            compress_statistics=self.options.double_quant,
            quant_type=self.options.quant_type,
        )
        made.bias = layer.bias
        # Moving it is what quantizes it.
        converted: nn.Module = made.to(layer.weight.device).train(layer.training)
        return converted


FP4: Final = Preset.of(FourBitPrecision, quant_type="fp4")
"""The alias ``bnb-fp4``."""
