"""Wrappers by bitsandbytes: the weights of frozen linear layers lie in 4 bits."""

from typing import Any, Final, Literal

from torch import nn

from fabric_core.contracts import PluginOptions, Preset, Wrapper, WrapperCapabilities

BLOCK: Final = 64
"""How many weights share a scale; a layer whose rows are no multiple of it stays as it is."""


class FourBitOptions(PluginOptions):
    """The options of the wrapper ``bnb_nf4``."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit type."""
    double_quant: bool = False
    """Store the scales in 8 bits, too."""
    skip: tuple[str, ...] = ()
    """Names of layers, and of modules that have some, to leave as they are."""


class FourBitWrapper(Wrapper):
    """Linear layers whose weights are frozen keep them in 4 bits, and compute in the type that they had.

    It is no precision, which says in which types a model computes: it changes which numbers a layer holds, and goes
    with any precision, such as ``bf16-true``.
    """

    Options = FourBitOptions
    options: FourBitOptions
    capabilities = WrapperCapabilities(supports_sharded_parameters=False)

    def wrap_module(self, module: nn.Module) -> nn.Module:
        """Replace layers in place; one that is trained, or tied to another, stays."""
        uses = [id(one) for each in module.modules() for one in each.parameters(recurse=False)]
        for name, layer in list(module.named_modules()):
            if type(layer) is not nn.Linear or not name or layer.weight.requires_grad or layer.in_features % BLOCK:
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
        made.register_load_state_dict_pre_hook(_take_scales)
        # Moving it is what quantizes it.
        converted: nn.Module = made.to(layer.weight.device).train(layer.training)
        return converted


def _take_scales(layer: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take from a state the scales that bitsandbytes saves beside a weight, and doesn't load by itself."""
    stem = f"{prefix}weight."
    scales = {name.removeprefix(stem): state.pop(name) for name in list(state) if name.startswith(stem)}
    if scales:
        data, device = state[f"{prefix}weight"], layer.weight.device
        layer.weight = type(layer.weight).from_prequantized(data, scales, requires_grad=False, device=device)


FP4: Final = Preset.of(FourBitWrapper, quant_type="fp4")
"""The alias ``bnb_fp4``."""
