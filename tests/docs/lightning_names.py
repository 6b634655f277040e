"""The names of Lightning Fabric, each with what it is here; run as a script, it writes the page anew.

Needs Lightning, which the extra ``bench`` installs.
"""

import importlib
import inspect
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, NamedTuple, get_args

PAGE: Final = Path(__file__).parents[2] / "docs" / "reference" / "lightning-names.md"

HOMES: Final = {
    "lightning.fabric": "fabric_core",
    "lightning.fabric.wrappers": "fabric_core",
    "lightning.fabric.strategies": "fabric_plugins.strategies",
    "lightning.fabric.accelerators": "fabric_plugins.accelerators",
    "lightning.fabric.plugins": "fabric_plugins.precisions",
    "lightning.fabric.plugins.environments": "fabric_plugins.launchers",
    "lightning.fabric.plugins.collectives": "fabric_core.utilities",
    "lightning.fabric.loggers": "fabric_plugins.loggers",
    "lightning.fabric.utilities": "fabric_core.utilities",
}
"""Where the names of each of its modules are here."""

RENAMED: Final = {
    "_FabricModule": "FabricModule",
    "_FabricOptimizer": "FabricOptimizer",
    "_FabricDataLoader": "FabricDataLoader",
}

_AUTHORS: Final = "is for authors: a contract of its own, [here](contracts/strategy.md)"
_LIBRARY: Final = "of another library or hardware: a package of its own provides it, by the same door"
_WIRED: Final = "is set by the `Fabric`, which is given it as an argument of its own"
_ENVIRONMENT: Final = "the job is recognised by itself, by a [launcher](contracts/launcher.md); nothing is to be given"

OUT_OF_SCOPE: Final = {
    "*XLA*": _LIBRARY,
    "*TPU*": _LIBRARY,
    "*DeepSpeed*": _LIBRARY,
    "TransformerEnginePrecision*": _LIBRARY,
    "BitsandbytesPrecision*": f"{_LIBRARY}: the example `fabric-bnb`",
    'strategy="deepspeed*': f"{_LIBRARY}: the example `fabric-deepspeed`",
    'strategy="*xla*': _LIBRARY,
    'strategy="single_tpu"': _LIBRARY,
    'accelerator="tpu"': _LIBRARY,
    'precision="transformer-engine*': _LIBRARY,
    "Strategy": _AUTHORS,
    "ParallelStrategy": _AUTHORS,
    "Accelerator": _AUTHORS,
    "Precision": _AUTHORS,
    "CheckpointIO": _AUTHORS.replace("strategy", "checkpoint"),
    "TorchCheckpointIO": "one file is what `fabric.save` writes; a [format](contracts/checkpoint.md) is a plugin",
    "ClusterEnvironment": _ENVIRONMENT,
    "*Environment*": _ENVIRONMENT,
    "*Strategy(accelerator)": _WIRED,
    "*Strategy(parallel_devices)": _WIRED,
    "*Strategy(cluster_environment)": _WIRED,
    "*Strategy(checkpoint_io)": _WIRED,
    "*Strategy(precision)": _WIRED,
    "*Strategy(device)": _WIRED,
    "*Strategy, its methods": _AUTHORS,
    "*Accelerator, its methods": _AUTHORS.replace("strategy", "accelerator"),
    "*Precision, its methods": _AUTHORS.replace("strategy", "precision"),
    "DataParallelStrategy*": "`dp` is deprecated in PyTorch: `ddp` is faster on one machine too",
    'strategy="dp"': "is deprecated in PyTorch: `ddp` is faster on one machine too",
    "Fabric.sharded_model": "is deprecated there: `setup` shards, and `init_module` makes models of any size",
    "FSDPStrategy(activation_checkpointing)": "is deprecated there: `activation_checkpointing_policy`",
    "*(_reapply_compile)": "is private; what was compiled is compiled again outside the strategy",
    "CheckpointIO, its methods": _AUTHORS.replace("strategy", "checkpoint"),
    "TorchCheckpointIO, its methods": _AUTHORS.replace("strategy", "checkpoint"),
    "LightningEnum*": "is a tool of its own code",
    "disable_possible_user_warnings*": "there are no such warnings here: what can't work is an error",
    "Logger, its methods": "any object with `log_metrics` will do; a plugin has a [contract](contracts/logger.md)",
    "TorchCollective.addr_key": "is a detail of how it joins",
    "TorchCollective.port_key": "likewise",
    "TorchCollective.manages_default_group": "likewise",
}
"""What no training program writes, or another package brings; with the reason."""

DIFFERS: Final = {
    "FSDPStrategy(mixed_precision)": "the precision says the types, under every strategy: `precision=`",
    "FSDPStrategy(state_dict_type)": "the default is `full`, as under the other strategies",
    "FSDPStrategy(auto_wrap_policy)": "the default finds the repeated blocks; `None` is one unit, as there",
    "FSDPPrecision": "`precision=` suits every strategy",
    "FSDPPrecision(*": "likewise",
    "ModelParallelStrategy(save_distributed_checkpoint)": '`state_dict_type="sharded"`, as for `fsdp`',
    "_FabricModule.dtype": "is the original's, where it has one; its parameters have theirs",
    "MPSAccelerator": '`accelerator="mps"`',
    "Fabric.launch(function)": "it runs in new processes, and the script goes on in one, with rank 0's result",
    "Fabric.all_reduce": "gives a new tensor; there the given one changes too",
    "seed_everything(workers)": "workers are seeded in any case; no environment variable is left behind",
    "Fabric.seed_everything(workers)": "likewise",
    'precision="16-true"': "tensors that `forward` makes without a type: the option `default_dtype_in_forward`",
    'precision="64*"': "likewise",
    'precision="bf16-true"': "likewise",
    'precision="16"': "the loss scale is updated once for all optimizers",
    'precision="16-mixed"': "likewise",
    "Fabric.clip_gradients(error_if_nonfinite)": "not given, it raises only where no loss scaler will skip the step",
}
"""What a training program may write and has to write otherwise, or means something else; with how and why."""


class Row(NamedTuple):
    """One name, or one argument of it.

    Args:
        name: As the page shows it, such as ``Fabric.setup(module)``.
        module: Where it is in Lightning.
        path: The attributes from the module to it, here.
        argument: The parameter, where it is one.
        positional: How many parameters come before it, where it can be given by position.
    """

    name: str
    module: str
    path: tuple[str, ...]
    argument: str = ""
    positional: int | None = None

    @property
    def verdict(self) -> tuple[str, str]:
        """``same``, ``differs`` or ``left out``, and why."""
        for verdict, judged in (("left out", OUT_OF_SCOPE), ("differs", DIFFERS)):
            for pattern, why in judged.items():
                if fnmatchcase(self.name, pattern):
                    return verdict, why
        return "same", ""


def rows() -> Iterator[Row]:
    """List every public name of the installed Lightning Fabric."""
    for module in HOMES:
        there = importlib.import_module(module)
        for name in _public(there):
            yield from _of(module, name, getattr(there, name))
        if module == "lightning.fabric":
            yield from _named(module)


def _public(module: Any) -> list[str]:
    if module.__name__ == "lightning.fabric.wrappers":
        return list(RENAMED)
    listed = getattr(module, "__all__", None)
    return sorted(listed or (name for name, one in vars(module).items() if _is_public(name, one)))


def _is_public(name: str, one: Any) -> bool:
    return (
        not name.startswith("_")
        and (inspect.isclass(one) or inspect.isfunction(one))
        and one.__module__.startswith("lightning.fabric")
    )


def _of(module: str, name: str, one: Any) -> Iterator[Row]:
    path = (RENAMED.get(name, name),)
    yield Row(name, module, path)
    if not inspect.isclass(one):
        yield from _arguments(name, module, path, one)
        return
    made_here = not name.startswith("_") and not inspect.isabstract(one)
    if made_here and one.__init__ is not object.__init__:
        yield from _arguments(name, module, path, one.__init__)
    if _is_contract(module):
        yield Row(f"{name}, its methods", module, path)
        return
    if name == "Logger":
        yield Row("Logger, its methods", module, path)
        return
    if name == "Collective":
        return  # what it declares are the methods of the classes below it
    for member in dir(one):
        if member.startswith("_"):
            continue
        if not any(member in vars(base) and base.__module__.startswith("lightning.fabric") for base in one.__mro__):
            continue
        found = inspect.getattr_static(one, member)
        yield Row(f"{name}.{member}", module, (*path, member))
        if not isinstance(found, property):
            yield from _arguments(f"{name}.{member}", module, (*path, member), getattr(one, member))


def _is_contract(module: str) -> bool:
    return module.endswith(("strategies", "accelerators", "plugins", "environments"))


def _arguments(name: str, module: str, path: tuple[str, ...], function: Any) -> Iterator[Row]:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return
    before = 0
    for parameter in parameters:
        if parameter.name in {"self", "cls"} or parameter.kind in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}:
            continue
        positional = None if parameter.kind is parameter.KEYWORD_ONLY else before
        before += 1
        yield Row(f"{name}({parameter.name})", module, path, parameter.name, positional)


def _named(module: str) -> Iterator[Row]:
    """List what can be named in text."""
    accelerators = importlib.import_module("lightning.fabric.accelerators").ACCELERATOR_REGISTRY
    strategies = importlib.import_module("lightning.fabric.strategies").STRATEGY_REGISTRY
    inputs = get_args(importlib.import_module("lightning.fabric.connector")._PRECISION_INPUT)
    precisions = {str(one) for group in inputs for one in get_args(group)}
    for argument, names in {
        "accelerator": {"auto", "gpu", *accelerators.available_accelerators()},
        "strategy": {"auto", *strategies.available_strategies()},
        "precision": precisions,
    }.items():
        for name in sorted(names):
            yield Row(f'{argument}="{name}"', module, (name,), argument)


def page() -> str:
    """Write the page."""
    version = importlib.import_module("lightning.fabric").__version__
    every = list(rows())
    counts = {verdict: sum(row.verdict[0] == verdict for row in every) for verdict in ("same", "differs", "left out")}
    share = 100 * counts["same"] / (counts["same"] + counts["differs"])
    lines = f"""# The names of Lightning Fabric

Every public name of Lightning Fabric {version}, every argument and method. Made by a script that asks the installed
Lightning; a test calls what is the same on both libraries and compares.

Of what a training program writes, {share:.1f} % is the same: {counts["same"]} are the same, and
{counts["differs"]} differ. {counts["left out"]} are left out: they belong to authors of plugins, who have
[contracts](contracts/strategy.md) to write to, to other libraries and hardware, or are deprecated.

How behaviour differs where names are the same tells
[the guide](../how-to/move-from-lightning-fabric.md).""".splitlines()
    for module, home in HOMES.items():
        lines += ["", f"## `{module}`: `{home}`", "", "| name | here | how, or why |", "|---|---|---|"]
        for row in every:
            if row.module == module:
                verdict, why = row.verdict
                lines.append(f"| `{row.name}` | {verdict} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
