"""Saves in processes that are killed, and says what is left: ``python killing.py FOLDER TRIALS FORMAT RANKS``.

Everything is imported once; the savers are forks, which number their saves and tell of each that has returned. One line
of JSON for each kill: the last number that was told (0 where a checkpoint was there before, -1 where none was), what a
load gave after the kill, and what lay beside it once another save had been through. Moments are drawn anew each time.
"""

import json
import os
import random
import signal
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.fsdp  # before the fork: it takes half a second
from torch import nn

from fabric_core import Fabric

SIZE = 300


def _port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "kill", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip


def _fabric(ranks: int) -> Fabric:
    strategy: Any = "fsdp:state_dict_type=sharded" if ranks > 1 else "single_device"
    fabric = Fabric(accelerator="cpu", strategy=strategy, devices=ranks)
    fabric.launch()
    return fabric


def _saver(path: Path, form: str, ranks: int, told: int, *, exchange: bool) -> None:
    fabric = _fabric(ranks)
    model = fabric.setup(nn.Linear(SIZE, SIZE))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
    fabric.barrier()
    os.write(told, struct.pack("q", 0))
    with patch("fabric_plugins.checkpoints._files._EXCHANGE", 2 if exchange else 1 << 30):
        for number in range(1, 10_000):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(float(number))
            fabric.save(path, _state(model, number, form), format=form)
            os.write(told, struct.pack("q", number))


def _state(model: Any, number: int, form: str) -> dict[str, Any]:
    return {"model": model} if form == "safetensors" else {"model": model, "number": number}


def _load(path: Path, form: str) -> Any:
    with Fabric(accelerator="cpu", devices=1) as fabric:
        model = nn.Linear(SIZE, SIZE)
        state = _state(model, 0, form)
        fabric.load(path, state)
        weights = sorted({one for part in model.parameters() for one in part.flatten().tolist()})
        number: Any = state.get("number", int(weights[0]))
        return number if weights == [float(number)] else f"torn: {weights[:3]}"


def _save(path: Path, form: str, number: int) -> None:
    with Fabric(accelerator="cpu", devices=1) as fabric:
        model = nn.Linear(SIZE, SIZE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(float(number))
        fabric.save(path, _state(model, number, form), format=form)


def main() -> None:
    """Kill savers at random moments."""
    folder, trials, form, ranks = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)
    draw = random.Random()  # noqa: S311 - no secret
    for trial in range(trials):
        path = folder / f"state-{trial // 4}"  # the first of four finds nothing there
        before = 0 if os.path.lexists(path) else -1
        port = _port()
        read, write = os.pipe()
        exchange = trial % 2 == 0
        children = []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                os.environ.update(_environment(rank, ranks, port) if ranks > 1 else {})
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 2)
                try:
                    _saver(path, form, ranks, write, exchange=exchange)
                finally:
                    os._exit(1)
            children.append(child)
        os.close(write)
        os.read(read, 8)
        # To a new path the very first save is what matters.
        time.sleep(draw.uniform(0.0, 0.25 if before == 0 else 0.03))
        os.kill(draw.choice(children), signal.SIGKILL)
        time.sleep(draw.uniform(0.0, 0.02))
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        told = before
        while data := os.read(read, 8):
            told = max(told, struct.unpack("q", data)[0] or before)
        os.close(read)
        try:
            got = _load(path, form)
        except Exception as error:  # noqa: BLE001 - it is reported
            got = f"{type(error).__name__}: {error}"
        _save(path, form, 1)
        beside = sorted(one.name for one in folder.iterdir() if not one.name.startswith("state-"))
        shown = {"trial": trial, "told": told, "got": got, "beside": beside}
        print(json.dumps(shown), flush=True)  # noqa: T201
        _save(path, form, 0)


if __name__ == "__main__":
    main()
