"""What it costs to resolve a plan with 50 plugins installed, and to call a bound behaviour.

Bounds: 100 ms cold, 1 ms warm; an unwrapped bound behaviour costs what a bound method costs.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import timeit
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _rounds import medians, table

from fabric_core import Strategy, around
from fabric_core.binding import Bindings
from fabric_core.collectives import Collectives, SingleProcess
from fabric_core.contracts import PrecisionPolicy, World

PLUGINS = 50
ROUNDS = 15
KIND = {"strategies": "strategy", "precisions": "precision"}

_SOURCES = {
    "strategies": """
from fabric_core import Strategy
from fabric_core.contracts import PluginOptions
class Options(PluginOptions):
    speed: int = 1
    name: str = "x"
class Plugin(Strategy):
    Options = Options
    def connect(self, world, policy): pass
""",
    "precisions": """
from fabric_core import Precision
from fabric_core.contracts import PluginOptions, PrecisionPolicy
class Plugin(Precision):
    @property
    def policy(self): return PrecisionPolicy()
""",
}

_RESOLVE = """
import json, sys, time, torch
from fabric_core import Fabric, assembly, contracts
from fabric_core.choosing import request
sys.path.insert(0, sys.argv[1])
arguments = json.loads(sys.argv[2])
def once():
    start = time.perf_counter()
    plan = assembly.make_plan(request.Request.of(**arguments), {})
    return (time.perf_counter() - start) * 1e3, plan
cold, plan = once()
warm = sorted(once()[0] for _ in range(200))[100]
modules = [name for name, one in sys.modules.items() if name.startswith(("fabric_plugins.", "bench_plugin"))]
print(json.dumps([cold, warm, sum(not hasattr(sys.modules[name], "__path__") for name in modules)]))
"""


def _install(folder: Path) -> None:
    for number in range(PLUGINS):
        group = ("strategies", "precisions")[number % 2]
        (folder / f"bench_plugin_{number}.py").write_text(_SOURCES[group].replace("{number}", str(number + 1)))
        info = folder / f"bench_plugin_{number}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: bench-plugin-{number}\nVersion: 1.0\nRequires-Dist: fabric-registry>=0.1\n"
            "Summary: one of many\n\n" + "A description as long as one finds them.\n" * 50
        )
        (info / "entry_points.txt").write_text(
            f"[fabric.{group}]\nbench_{number} = bench_plugin_{number}:Plugin\n[console_scripts]\nx = y:z\n"
            f"[fabric.auto]\n{KIND[group]}/-{number + 1}/bench_{number} = bench_plugin_{number}:Plugin\n"
        )


def _resolve() -> None:
    requests: dict[str, dict[str, Any]] = {
        "everything named": {"accelerator": "cpu", "strategy": "bench_0:speed=2", "devices": 1, "precision": "bench_1"},
        "strategy and precision automatic": {"accelerator": "cpu", "devices": 1},
    }
    rows = []
    with tempfile.TemporaryDirectory() as name:
        _install(Path(name))
        measured: dict[str, list[list[float]]] = {title: [] for title in requests}
        for _ in range(ROUNDS + 1):
            for title, arguments in requests.items():
                command = [sys.executable, "-c", _RESOLVE, name, json.dumps(arguments)]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                measured[title].append(json.loads(done.stdout))
        for title, runs in measured.items():
            cold, warm, seen = (statistics.median(run[part] for run in runs[1:]) for part in range(3))
            rows.append((title, f"{cold:.1f} ms", f"{warm:.2f} ms", f"{seen:.0f}"))
    head = ("request", "cold", "warm", "modules of plugins")
    print(table(f"Resolving a plan with {PLUGINS} further plugins installed", head, rows))


class _Owner(Strategy):
    def connect(self, world: World, policy: PrecisionPolicy) -> Collectives:
        """There are no other processes."""
        return SingleProcess()


class _Around:
    @around.strategy
    def data_shard(self) -> Generator[None, Any, Any]:
        """Change nothing."""
        return (yield)


def _call() -> None:
    plain, unwrapped, wrapped = _Owner(), _Owner(), _Owner()
    bindings = Bindings(), Bindings([_Around()])
    for owner in (plain, unwrapped, wrapped):
        owner.collectives = SingleProcess()
    for one, owner in zip(bindings, (unwrapped, wrapped), strict=True):
        one.bind(owner)
    contestants: dict[str, Callable[[], Any]] = {
        "the method of the plugin itself": lambda: plain.data_shard,
        "bound, nothing goes round it": lambda: unwrapped.data_shard,
        "bound, one extension goes round it": lambda: wrapped.data_shard,
    }

    def measure(get: Callable[[], Any]) -> float:
        return timeit.timeit(get(), number=20_000) / 20_000 * 1e9

    result = medians({name: partial(measure, get) for name, get in contestants.items()}, ROUNDS)
    base = result["the method of the plugin itself"]
    rows = [(name, f"{value:.0f} ns", f"{value / base:.2f}") for name, value in result.items()]
    print(table("Calling a behaviour", ("what is called", "per call", "ratio"), rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    _resolve()
    _call()
