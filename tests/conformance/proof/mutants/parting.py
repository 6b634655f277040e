"""Wrong strategies that let ranks part between steps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fabric_core.conformance.references import Averaging
from fabric_core.contracts import StrategyCapabilities
from proof.mutants import Mutants
from proof.right import Parting

MUTANTS = Mutants()
mutant = MUTANTS.mutant


@mutant("averages gradients before every step, and declares that it doesn't", "STR-346")
class Modest(Averaging):
    capabilities = Averaging.capabilities.model_copy(update={"synchronous": False})


@mutant("never synchronizes ranks", "STR-347")
class Estranged(Parting):
    def meet(self, tensors: Sequence[torch.Tensor]) -> None:
        pass


@mutant("synchronizes some of a model's parameters", "STR-347")
class Partial(Parting):
    def meet(self, tensors: Sequence[torch.Tensor]) -> None:
        super().meet(tensors[1:])


@mutant("counts from zero after a checkpoint", "STR-348")
class Recounting(Parting):
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


@mutant("sums where it should average", "STR-301")
class Swelling(Parting):
    def meet(self, tensors: Sequence[torch.Tensor]) -> None:
        super().meet(tensors)
        for one in tensors:
            one.mul_(self.world_size)


@mutant("lets ranks start as they like", "STR-303")
class Unlike(Parting):
    def setup_module(self, module: nn.Module) -> nn.Module:
        return module


@mutant("parts, and doesn't say so", "STR-301", "STR-302")
class Silent(Parting):
    capabilities = StrategyCapabilities(distributed=True)
