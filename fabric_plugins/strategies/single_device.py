"""One process on one device."""

from fabric_core.contracts import (
    Collectives,
    PrecisionPolicy,
    SingleProcess,
    Strategy,
    StrategyCapabilities,
    World,
)

__all__ = ["SingleDeviceStrategy"]


class SingleDeviceStrategy(Strategy):
    """One process on one device: the contract's defaults."""

    capabilities = StrategyCapabilities(max_world_size=1)

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """There are no other processes."""
        return SingleProcess()
