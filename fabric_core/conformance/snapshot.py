"""What a plugin must leave as it was: one wide look at the process, which every rule about leaving nothing takes."""

import builtins
import gc
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from fabric_core._torch import compiler, global_hooks, print_options

__all__ = ["Snapshot", "differences", "restored", "take"]

Snapshot = Mapping[str, Any]
"""What was seen, under the words that a message says it by."""

_DEVICES: Final = ("cpu", "cuda")
_BACKENDS: Final = (
    (torch.backends.cudnn, ("enabled", "benchmark", "deterministic", "allow_tf32")),
    (torch.backends.cuda.matmul, ("allow_tf32", "allow_fp16_reduced_precision_reduction")),
    (torch.backends.mkldnn, ("enabled",)),
)
_PATCHABLE: Final[tuple[Any, ...]] = (
    torch,
    torch.Tensor,
    nn.Module,
    nn.Parameter,
    nn.functional,
    nn.init,
    nn.utils,
    torch.autograd,
    torch.optim.Optimizer,
    torch.utils.data.DataLoader,
    dist,
    builtins,
    os,
)
"""Where functions lie that somebody might replace by others."""


def take() -> Snapshot:
    """Look at the process."""
    return {
        "environment variables": dict(os.environ),
        "the working folder": (os.getcwd(), sorted(os.listdir())),  # noqa: PTH109, PTH208 - as text, to compare
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "child processes": sorted(child.name for child in multiprocessing.active_children()),
        "the process group": dist.is_available() and dist.is_initialized(),
        "started devices": torch.cuda.is_initialized(),
        **_torch_settings(),
        **_random_states(),
        **_interpreter(),
        "functions of others": _functions(),
    }


def _torch_settings() -> dict[str, Any]:

    return {
        "the default type": torch.get_default_dtype(),
        "the default device": torch.get_default_device(),
        "the number of threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "anomaly mode": torch.is_anomaly_enabled(),
        "autocast": [torch.is_autocast_enabled(kind) for kind in _DEVICES],
        "autocast's type": [torch.get_autocast_dtype(kind) for kind in _DEVICES],
        "autocast's cache": torch.is_autocast_cache_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "determinism": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "settings of backends": [[getattr(place, name) for name in names] for place, names in _BACKENDS],
        "how tensors print": print_options(),
        "hooks on all modules": global_hooks(),
    }


def _random_states() -> dict[str, Any]:
    name, keys, *place = np.random.get_state()  # noqa: NPY002 - the process's own generator is what is looked at
    return {
        "the random state of torch": torch.get_rng_state().tolist(),
        "the random state of numpy": (name, np.asarray(keys).tolist(), place),
        "the random state of Python": random.getstate(),
    }


def _interpreter() -> dict[str, Any]:
    root = logging.getLogger()
    return {
        "warning filters": list(warnings.filters),
        "logging": (root.level, root.handlers[:], root.disabled, logging.root.manager.disable),
        "signal handlers": {one: signal.getsignal(one) for one in signal.valid_signals()},
        "sys.excepthook": (_by_torch(sys.excepthook), threading.excepthook, sys.displayhook),
        "standard streams": (sys.stdout, sys.stderr, sys.stdin),
        "sys.path": (sys.path[:], sys.argv[:]),
        "the start method of processes": multiprocessing.get_start_method(allow_none=True),
        "the settings of multiprocessing": _multiprocessing(),
        "the garbage collector": (gc.isenabled(), gc.get_threshold()),
        "limits of the interpreter": (sys.getrecursionlimit(), sys.getswitchinterval()),
        "the processors to run on": sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [],
    }


def _multiprocessing() -> tuple[Any, ...]:
    """Give what only private names tell: what semaphores are named after, and what a fork server imports.

    The temporary folder is no setting: whatever needs it first makes it.
    """
    process: Any = multiprocessing.current_process()
    server: Any = forkserver._forkserver  # noqa: SLF001 - as said
    return process._config.get("semprefix"), list(server._preload_modules)  # noqa: SLF001 - as said


def _by_torch(hook: Any) -> Any:
    """Give the usual hook for PyTorch's own, which making a process group sets for good."""
    return sys.__excepthook__ if hook.__module__.startswith("torch.") else hook


def _functions() -> dict[str, Any]:
    return {
        f"{place.__name__}.{name}": value
        for place in _PATCHABLE
        for name, value in list(vars(place).items())
        if callable(value)
    }


def differences(before: Snapshot, after: Snapshot | None = None) -> list[str]:
    """Name what is no longer as it was, now or at another look; of functions, which ones."""
    after = take() if after is None else after
    found = [name for name, value in before.items() if name != "functions of others" and value != after[name]]
    ours, theirs = before["functions of others"], after["functions of others"]
    # A name that is new may come from an import; one that means another function was replaced.
    replaced = [name for name, value in ours.items() if theirs.get(name, value) is not value]
    # Compiling anything lets PyTorch replace two of its own.
    return [*found, *sorted(one for one in replaced if not theirs[one].__module__.startswith(compiler()))]


@contextmanager
def restored() -> Iterator[None]:
    """Undo what a wrong plugin may leave in a rank that goes on: settings, groups, folders, variables, streams."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    matmul, folder, environment = torch.get_float32_matmul_precision(), os.getcwd(), dict(os.environ)  # noqa: PTH109
    streams, hooks = (sys.stdout, sys.stderr), (sys.excepthook, threading.excepthook)
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        with warnings.catch_warnings():
            # Every rank would print them again.
            warnings.simplefilter("ignore")
            yield
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
        torch.set_default_dtype(dtype)
        torch.set_default_device(None)
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(matmul)
        torch.set_grad_enabled(True)
        torch.use_deterministic_algorithms(deterministic)
        torch.autograd.set_detect_anomaly(False)
        for device_type in _DEVICES:
            torch.set_autocast_enabled(device_type, False)
        os.chdir(folder)
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        sys.stdout, sys.stderr = streams
        sys.excepthook, threading.excepthook = hooks
        logging.getLogger().handlers[:] = handlers
        if logging.getLogger().level != level:
            logging.getLogger().setLevel(level)
