"""Every error that the project raises on purpose.

The tree (the builtin that each class also is stands in brackets, so that ``except ValueError`` works)::

    FabricError
    ├── RequestError (ValueError)           what the user asked for can't be parsed
    │   ├── OptionError                     an option of a plugin: unknown, or of the wrong type
    │   └── DeviceError (TypeError)         devices: absent, doubled, negative or zero
    ├── PluginError (RuntimeError)          a plugin is not available, or can't be loaded
    │   ├── UnknownPluginError (ValueError) nobody offers that name
    │   ├── NotInstalledError (ModuleNotFoundError) a known name, or a needed package, that is not installed
    │   ├── ConflictError (ValueError)      several distributions offer that name
    │   ├── QuarantinedError                the plugin could not be loaded, or breaks its contract
    │   ├── IncompatibleApiError            the plugin was written for another version of the contracts
    │   ├── LockError                       the lock file doesn't let the plugin run, or is damaged
    │   └── UnavailableError                the plugin is sound, but can't run on this machine
    ├── PlanError (ValueError)              the choices don't fit together
    ├── LaunchError (RuntimeError)          processes could not be started, or don't agree
    │   ├── LaunchTypeError (TypeError)     what is to be launched is no function that takes a ``Fabric``
    │   └── RankFailedError                 a rank failed
    ├── SetupError (RuntimeError)           ``setup`` was given what it can't set up
    │   ├── SetupTypeError (TypeError)      what is no model, optimizer or loader
    │   └── SetupValueError (ValueError)    nothing, or what was set up before
    ├── MisuseError (RuntimeError)          a call at the wrong time, or one that leaves out the strategy
    │   ├── MisuseTypeError (TypeError)     a call with an object of another kind than the one that is meant
    │   └── NoLoggerError (IndexError)      there is no logger
    └── CheckpointError (RuntimeError)      a checkpoint can't be written, read or applied
        ├── CheckpointKeyError (KeyError)   it lacks an entry that was asked for
        ├── CheckpointTypeError (TypeError) the state, or a filter, is of the wrong type
        ├── CheckpointValueError (ValueError) a filter is for what the state doesn't have
        └── NoCheckpointError (FileNotFoundError)   there is none at the path

What is wrong but stops nothing that was asked for is a ``FabricWarning`` (UserWarning).
"""

from typing import Any

__all__ = [
    "CheckpointError",
    "CheckpointKeyError",
    "CheckpointTypeError",
    "CheckpointValueError",
    "ConflictError",
    "DeviceError",
    "FabricError",
    "FabricWarning",
    "IncompatibleApiError",
    "LaunchError",
    "LaunchTypeError",
    "LockError",
    "MisuseError",
    "MisuseTypeError",
    "NoCheckpointError",
    "NoLoggerError",
    "NotInstalledError",
    "OptionError",
    "PlanError",
    "PluginError",
    "QuarantinedError",
    "RankFailedError",
    "RequestError",
    "SetupError",
    "SetupTypeError",
    "SetupValueError",
    "UnavailableError",
    "UnknownPluginError",
]


class FabricError(Exception):
    """The root of all errors of the project.

    Args:
        what: What is wrong, in one sentence.
        where: The place: an argument, a file, an option, a method.
        got: The value that was got, shown by ``repr`` unless it is a string.
        instead: What to write instead.
        fields: Anything else that a program may want to read off the error; set as attributes.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        instead: str | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.got = got
        self.instead = instead
        self.fields = fields
        self.__dict__.update(fields)

    def __str__(self) -> str:
        """Give the message: a line for each of what, where, got and instead."""
        lines = [self.what]
        if self.where is not None:
            lines.append(f"  where:   {self.where}")
        if self.got is not None:
            lines.append(f"  got:     {self.got if isinstance(self.got, str) else repr(self.got)}")
        if self.instead is not None:
            lines.append(f"  instead: {self.instead}")
        return "\n".join(lines)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle with the keyword fields, which ``Exception`` would lose."""
        return _rebuild, (type(self), self.what, self.where, self.got, self.instead, self.fields)


def _rebuild(
    cls: type[FabricError],
    what: str,
    where: str | None,
    got: object,
    instead: str | None,
    fields: dict[str, Any],
) -> FabricError:
    return cls(what, where=where, got=got, instead=instead, **fields)


class RequestError(FabricError, ValueError):
    """What the user asked for can't be parsed."""


class OptionError(RequestError):
    """An option of a plugin is unknown, or its value is of the wrong type."""


class DeviceError(RequestError, TypeError):
    """The devices asked for are absent, doubled, negative or zero."""


class PluginError(FabricError, RuntimeError):
    """A plugin is not available, or can't be loaded."""


class UnknownPluginError(PluginError, ValueError):
    """Nobody offers a plugin of that name."""


class NotInstalledError(PluginError, ModuleNotFoundError):
    """A known plugin, or a package that a plugin needs, is not installed."""


class ConflictError(PluginError, ValueError):
    """Several distributions offer a plugin of that name, and the request doesn't choose."""


class QuarantinedError(PluginError):
    """The plugin could not be loaded, or what was loaded breaks the contract of its kind."""


class IncompatibleApiError(PluginError):
    """The plugin was written for another version of the contracts."""


class LockError(PluginError):
    """The lock file doesn't let the plugin run, or can't be read."""


class UnavailableError(PluginError):
    """The plugin is sound, but can't run on this machine."""


class PlanError(FabricError, ValueError):
    """The choices are sound one by one, but don't fit together."""


class LaunchError(FabricError, RuntimeError):
    """Processes could not be started, or don't agree on the plan."""


class LaunchTypeError(LaunchError, TypeError):
    """What is to be launched is no function that takes a ``Fabric``."""


class RankFailedError(LaunchError):
    """A rank failed; its traceback, where it left one, is the cause of this error."""

    rank: int | None = None
    """The rank that failed first."""
    exit_code: int = 1
    """Its exit code; 128 and the signal's number after a signal."""
    exception_type: str | None = None
    """The class of its exception, with its module where that is no builtin; ``None`` without an exception."""
    exception_message: str | None = None
    """The exception's text."""
    trace: str | None = None
    """Its traceback, as Python shows it."""


class SetupError(FabricError, RuntimeError):
    """``setup`` was given what it can't set up."""


class SetupTypeError(SetupError, TypeError):
    """What was given to ``setup`` is no model, optimizer or loader."""


class SetupValueError(SetupError, ValueError):
    """``setup`` was given nothing, or what was set up before."""


class MisuseError(FabricError, RuntimeError):
    """A call at the wrong time, or one that leaves out the strategy."""


class MisuseTypeError(MisuseError, TypeError):
    """A call with an object of another kind than the one that is meant."""


class NoLoggerError(MisuseError, IndexError):
    """There is no logger."""


class CheckpointError(FabricError, RuntimeError):
    """A checkpoint can't be written, read or applied."""


class CheckpointKeyError(CheckpointError, KeyError):
    """A checkpoint lacks an entry that was asked for."""


class CheckpointTypeError(CheckpointError, TypeError):
    """The state, or a filter, is of the wrong type."""


class CheckpointValueError(CheckpointError, ValueError):
    """A filter is for what the state doesn't have."""


class NoCheckpointError(CheckpointError, FileNotFoundError):
    """There is no checkpoint at the path."""


class FabricWarning(UserWarning):
    """What is wrong but stops nothing that was asked for, such as an installed plugin that can't be loaded."""
