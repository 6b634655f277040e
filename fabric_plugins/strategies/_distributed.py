"""What strategies with a process group share: its options, and a start from rank 0's values."""

from datetime import timedelta
from typing import ClassVar, Literal

from torch import nn

from fabric_core.contracts import Collectives, PluginOptions, PrecisionPolicy, ProcessGroup, Strategy, World
from fabric_core.errors import MisuseError

__all__ = ["DistributedOptions", "DistributedStrategy"]


class DistributedOptions(PluginOptions):
    """The options that every strategy with a process group has."""

    timeout: timedelta | None = None
    """How long a collective waits for the other ranks; ``None`` is 30 minutes."""
    process_group_backend: str | None = None
    """The process group's backend; ``None`` is the accelerator's."""
    start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen"
    """How ``fabric.launch`` starts processes; ``popen`` re-runs the command that was typed."""


class DistributedStrategy(Strategy):
    """A process group of all ranks, which gradients travel on."""

    Options: ClassVar[type[DistributedOptions]] = DistributedOptions
    options: DistributedOptions
    _world: World | None = None
    _group: ProcessGroup
    _policy: PrecisionPolicy

    @property
    def start_method(self) -> str | None:
        """As the option says."""
        return None if self.options.start_method == "popen" else self.options.start_method

    @property
    def world(self) -> World:
        """This process among the others.

        Raises:
            MisuseError: Before ``connect``.
        """
        if self._world is None:
            raise MisuseError(
                "the processes are not connected yet",
                where=type(self).__name__,
                instead="call fabric.launch() first",
            )
        return self._world

    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """Join the default process group, or make it.

        Raises:
            LaunchError: There is one, and it is not what the options ask for.
        """
        self._world, self._policy = world, policy
        self._group = ProcessGroup(world, backend=self.options.process_group_backend, timeout=self.options.timeout)
        return self._group

    def teardown(self) -> None:
        """Forget the others."""
        self._world = None

    def _start_as_rank_zero(self, module: nn.Module, group: ProcessGroup | None = None) -> None:
        """Give all ranks, or a group's, the values of the first of them, as DDP does; meta ones have none yet."""
        tensors = (*module.parameters(), *module.buffers())
        (group or self._group).broadcast_tensors([one.detach() for one in tensors if not one.is_meta], 0)
