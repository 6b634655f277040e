"""``fabric-core estimate`` beside the peak of a training on the CPU, for three models.

A training runs in fresh processes, two of them under ``ddp`` and ``fsdp``. After a step of a tiny model of the same
kind, which loads all code, the resident memory is noted; after the first step of the model Linux forgets the peak so
far, and the peak of the next two steps, less what was noted, is what was measured: the larger of the ranks'. The batch
of the digits network is so large because a process's own noise is larger than its parameters.
"""

import argparse
import importlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _rounds import table
from _transformer import Transformer
from torch.nn import functional as F

MIB = 2**20


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def digits(batch: int = 4096) -> tuple[Any, ...]:
    """Make the network of docs/examples/digits.py, with a batch that is larger than a process's noise."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "docs" / "examples"))
    build_model = importlib.import_module("digits").build_model

    targets = torch.randint(0, 10, (batch,))
    return build_model(), torch.rand(batch, 1, 8, 8), lambda logits: _cross_entropy(logits, targets)


def transformer(batch: int = 2, width: int = 768, depth: int = 12, vocabulary: int = 50257) -> tuple[Any, ...]:
    """Make a transformer of 124 million parameters, the embedding's and the head's the same ones."""
    model = Transformer(width, depth, vocabulary)
    model.head.weight = model.embedding.weight
    tokens = torch.randint(0, vocabulary, (batch, 128))
    return model, tokens, lambda logits: _cross_entropy(logits, tokens)


def llama(batch: int = 2, width: int = 512, depth: int = 8, vocabulary: int = 32000) -> tuple[Any, ...]:
    """Make a Hugging Face Llama of 58 million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": width,
        "intermediate_size": width * 43 // 16,
        "num_hidden_layers": depth,
        "num_attention_heads": 8,
    }
    tokens = torch.randint(0, vocabulary, (batch, 128))
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **sizes)), {"input_ids": tokens, "labels": tokens}


MODELS = {"digits": digits, "transformer": transformer, "llama": llama}
TINY: dict[str, dict[str, int]] = {
    "digits": {"batch": 64},
    "transformer": {"width": 64, "depth": 1, "vocabulary": 64},
    "llama": {"width": 64, "depth": 1, "vocabulary": 64},
}


def _status(name: str) -> int:
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith(name))
    return int(line.split()[1]) * 1024


def train(name: str, strategy: str, precision: str, optimizer: str, devices: int) -> None:
    """Train in one rank, and write what was measured to the folder that ``PEAKS`` names."""
    from fabric_core import Fabric

    torch.set_num_threads(1)

    def steps(fabric: Any, made: tuple[Any, ...], count: int) -> Any:
        bare, data, *loss = made
        kind = getattr(torch.optim, optimizer)
        model, stepper = fabric.setup(bare, kind(bare.parameters()))

        def step() -> None:
            output = model(**data) if isinstance(data, dict) else model(data)
            fabric.backward(loss[0](output) if loss else output.loss)
            stepper.step()
            stepper.zero_grad()

        for _ in range(count):
            step()
        return step

    with Fabric(accelerator="cpu", strategy=strategy, precision=precision, devices=devices) as fabric:
        fabric.launch()
        steps(fabric, MODELS[name](**TINY[name]), 2)
        before = _status("VmRSS")
        step = steps(fabric, MODELS[name](), 1)
        Path("/proc/self/clear_refs").write_text("5")
        step()
        step()
        Path(os.environ["PEAKS"], str(fabric.global_rank)).write_text(str(_status("VmHWM") - before))


def _measured(*case: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        devices = case[-1]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
        environment = {**os.environ, "PEAKS": folder, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "131072"}
        subprocess.run([*command, __file__, "--train", *case], env=environment, check=True, timeout=300)
        return max(int(path.read_text()) for path in Path(folder).iterdir())


def _estimated(name: str, strategy: str, precision: str, optimizer: str, devices: str) -> int:
    asked = ("--strategy", strategy, "--precision", precision, "--optimizer", optimizer, "--devices", devices)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "fabric_core",
            "estimate",
            f"bench_estimate:{name}",
            "--accelerator",
            "cpu",
            *asked,
            "--json",
        ],
        cwd=Path(__file__).parent,
        check=True,
        stdout=subprocess.PIPE,
        timeout=300,
    )
    return max(int(one["peak"]) for one in json.loads(done.stdout)["ranks"])


def _accelerates(name: str, precision: str) -> int:
    """Ask what ``accelerate estimate-memory`` prints for a training, which takes models of the Hugging Face Hub alone.

    It knows Adam alone, and neither the batch nor the strategy.
    """
    from accelerate.commands.estimate import estimate_training_usage
    from accelerate.utils import calculate_maximum_sizes

    with torch.device("meta"):
        model = MODELS[name]()[0]
    dtype = {"32-true": "float32", "bf16-mixed": "bfloat16"}[precision]
    return int(max(estimate_training_usage(calculate_maximum_sizes(model)[0], dtype).values()))


def main() -> None:
    """Estimate, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", nargs=5, metavar="WHAT", help="a rank of one training")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--strategies", nargs="+", default=["single_device", "ddp", "fsdp"])
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--optimizers", nargs="+", default=["SGD", "AdamW"])
    given = parser.parse_args()
    if given.train:
        name, strategy, precision, optimizer, devices = given.train
        train(name, strategy, precision, optimizer, int(devices))
        return
    rows = []
    for case in itertools.product(given.models, given.strategies, given.precisions, given.optimizers):
        devices = "1" if case[1] == "single_device" else "2"
        said, real = _estimated(*case, devices), _measured(*case, devices)
        other = f"{_accelerates(case[0], case[2]) / MIB:.0f}" if case[3] == "AdamW" else ""
        rows.append((*case, f"{said / MIB:.0f}", f"{real / MIB:.0f}", f"{100 * (said / real - 1):+.1f} %", other))
    columns = ("model", "strategy", "precision", "optimizer", "estimated", "measured", "difference", "Accelerate")
    print(table("Peak of a rank, MiB", columns, rows))


if __name__ == "__main__":
    main()
