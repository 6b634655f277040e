"""What starting costs: imports, the first ``Fabric``, and two ranks until their first all-reduce.

Each number is the wall time of fresh processes, and each ratio is against plain PyTorch in the same run.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from _rounds import command_seconds, medians, table

_TORCHRUN = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
dist.destroy_process_group()
"""
_FABRIC = """
import torch
from fabric_core import Fabric
fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
fabric.launch()
fabric.all_reduce(torch.ones(1))
fabric.teardown()
"""
_ACCELERATE = """
import torch
from accelerate import Accelerator
accelerator = Accelerator(cpu=True)
accelerator.reduce(torch.ones(1))
accelerator.end_training()
"""
_FUNCTION = """
import sys, time
import torch
from fabric_core import Fabric


def reduce(fabric):
    fabric.all_reduce(torch.ones(1))


if __name__ == "__main__":
    rounds = []
    for _ in range({rounds} + 1):
        start = time.perf_counter()
        Fabric(accelerator="cpu", strategy="ddp:start_method={method}", devices=2).launch(reduce)
        rounds.append(time.perf_counter() - start)
    print(rounds[0], *sorted(rounds[1:]))
"""
_LIGHTNING = """
import torch
from lightning.fabric import Fabric
fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
fabric.launch()
fabric.all_reduce(torch.ones(1))
torch.distributed.destroy_process_group()
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--launch-rounds", type=int, default=7)
    given = parser.parse_args()
    lightning = importlib.util.find_spec("lightning") is not None

    snippets = {
        "import torch": "import torch",
        "import torch, fabric_core": "import torch, fabric_core",
        'Fabric(accelerator="cpu", devices=1)': 'from fabric_core import Fabric; Fabric(accelerator="cpu", devices=1)',
    }
    if lightning:
        snippets['Lightning: Fabric(accelerator="cpu", devices=1)'] = (
            'from lightning.fabric import Fabric; Fabric(accelerator="cpu", devices=1)'
        )
    found = medians({name: partial(command_seconds, "-c", code) for name, code in snippets.items()}, given.rounds)
    base = found["import torch"]
    print(
        table(
            "One process",
            ("code", "seconds", "times `import torch`"),
            [(f"`{name}`", f"{seconds:.2f}", f"{seconds / base:.2f}") for name, seconds in found.items()],
        )
    )

    with tempfile.TemporaryDirectory(prefix="fabric-bench-") as folder:

        def script(name: str, code: str) -> str:
            path = Path(folder) / f"{name}.py"
            path.write_text(code)
            return str(path)

        torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        contestants: dict[str, Callable[[], float]] = {
            "torchrun": partial(command_seconds, *torchrun, script("plain", _TORCHRUN)),
            "fabric.launch()": partial(command_seconds, script("ours", _FABRIC)),
            "fabric-core run": partial(
                command_seconds,
                "-m",
                "fabric_core",
                "run",
                "--accelerator",
                "cpu",
                "--devices",
                "2",
                script("run", _FABRIC),
            ),
        }
        if importlib.util.find_spec("accelerate") is not None:
            launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
            port = ("--main_process_port", "29871", "--num_machines", "1", "--mixed_precision", "no")
            contestants["accelerate launch"] = partial(command_seconds, *launch, *port, script("other", _ACCELERATE))
        if lightning:
            contestants["Lightning: fabric.launch()"] = partial(command_seconds, script("theirs", _LIGHTNING))
        found = medians(contestants, given.launch_rounds)
        functions = []
        for method in ("fork", "forkserver"):
            path = script(method, _FUNCTION.format(method=method, rounds=given.launch_rounds))
            done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=True)
            first, *later = map(float, done.stdout.split())
            functions.append((method, f"{first:.2f}", f"{statistics.median(later):.2f}"))
    base = found["torchrun"]
    print(
        table(
            "Two ranks, until the first all-reduce is done and the command has ended",
            ("started by", "seconds", "times `torchrun`"),
            [(name, f"{seconds:.2f}", f"{seconds / base:.2f}") for name, seconds in found.items()],
        )
    )
    print(
        table(
            "A function on two ranks, from the call of fabric.launch(function) to its return",
            ("start method", "seconds, the first time", "seconds, again"),
            functions,
        )
    )


if __name__ == "__main__":
    main()
