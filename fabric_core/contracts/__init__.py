"""The contracts: what a plugin of each kind is, as a base class and as a pluggy hook specification at once."""

from fabric_core.collectives import (
    Collectives,
    ProcessGroup,
    ProcessInfo,
    SingleProcess,
    World,
    check_reduction,
    check_source,
)
from fabric_core.contracts._blocks import repeated_blocks
from fabric_core.contracts._default_dtype import DefaultDtype
from fabric_core.contracts._spec import (
    API_VERSION,
    API_WINDOW,
    Plugin,
    PluginOptions,
    Preset,
)
from fabric_core.contracts.accelerator import Accelerator, DeviceSpec, parse_device_indices
from fabric_core.contracts.acts import FabricActs
from fabric_core.contracts.agreement import Agreement
from fabric_core.contracts.capabilities import (
    AcceleratorCapabilities,
    CheckpointCapabilities,
    LauncherCapabilities,
    PrecisionCapabilities,
    StrategyCapabilities,
    WrapperCapabilities,
)
from fabric_core.contracts.checkpoint import ABOUT, Checkpoint, walk_tensors
from fabric_core.contracts.launcher import Launcher, LaunchOrder
from fabric_core.contracts.lifecycle import LifeCycle
from fabric_core.contracts.logger import Logger
from fabric_core.contracts.memory import MemoryEstimate
from fabric_core.contracts.precision import (
    Precision,
    PrecisionPolicy,
    convert_tensors,
    converter,
    map_tensors,
)
from fabric_core.contracts.strategy import Strategy, replace_parameters
from fabric_core.contracts.wrapper import Wrapper
from fabric_core.markers import behaviour, event, hookimpl

__all__ = [
    "ABOUT",
    "API_VERSION",
    "API_WINDOW",
    "Accelerator",
    "AcceleratorCapabilities",
    "Agreement",
    "Checkpoint",
    "CheckpointCapabilities",
    "Collectives",
    "DefaultDtype",
    "DeviceSpec",
    "FabricActs",
    "LaunchOrder",
    "Launcher",
    "LauncherCapabilities",
    "LifeCycle",
    "Logger",
    "MemoryEstimate",
    "Plugin",
    "PluginOptions",
    "Precision",
    "PrecisionCapabilities",
    "PrecisionPolicy",
    "Preset",
    "ProcessGroup",
    "ProcessInfo",
    "SingleProcess",
    "Strategy",
    "StrategyCapabilities",
    "World",
    "Wrapper",
    "WrapperCapabilities",
    "behaviour",
    "check_reduction",
    "check_source",
    "convert_tensors",
    "converter",
    "event",
    "hookimpl",
    "map_tensors",
    "parse_device_indices",
    "repeated_blocks",
    "replace_parameters",
    "walk_tensors",
]
