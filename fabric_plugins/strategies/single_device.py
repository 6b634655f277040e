"""One process on one device."""

from fabric_core.contracts import PrecisionPolicy, Strategy, StrategyCapabilities, World

__all__ = ["SingleDeviceStrategy"]


class SingleDeviceStrategy(Strategy):
    """One process on one device: the contract's defaults."""

    capabilities = StrategyCapabilities(max_world_size=1)

    def connect(self, world: World, policy: PrecisionPolicy) -> None:
        """Nobody to join."""
