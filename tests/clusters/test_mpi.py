"""Under a real ``mpirun``, of Open MPI and of MPICH, the processes are one world."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.sampled(0.5)

Command = Callable[..., Any]

_OPEN_MPI = ("mpirun.openmpi", "--allow-run-as-root", "--oversubscribe")
_MPICH = ("mpirun.mpich",)
_AFTERWARDS = """
import ctypes
from fabric_core import Fabric

fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
fabric.launch()
fabric.barrier()
rank, size = fabric.global_rank, ctypes.c_int()
fabric.teardown()
mpi = ctypes.CDLL("libmpich.so.12", mode=ctypes.RTLD_GLOBAL)
mpi.MPI_Init(None, None)
mpi.MPI_Comm_size(0x44000000, ctypes.byref(size))  # MPI_COMM_WORLD of MPICH
mpi.MPI_Finalize()
print(f"of {size.value}\\n", end="", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mpirun", [_OPEN_MPI, _MPICH], ids=["open-mpi", "mpich"])
def test_processes_of_mpirun_are_one_world_that_trains(
    mpirun: tuple[str, ...], command: Command, needing: Command, train: str, ranks: Command, tmp_path: Path
) -> None:
    """``mpirun -np 2`` trains once, on two ranks with the same weights, and writes one checkpoint."""
    needing(mpirun[0])
    done = command(*mpirun, "-np", "2", sys.executable, train, "2", str(tmp_path / "saved"))
    assert done.code == 0, done.err
    rows = ranks(done.out)
    assert [(row["rank"], row["local"], row["size"], row["owner"]) for row in rows] == [
        (0, 0, 2, "mpirun"),
        (1, 1, 2, "mpirun"),
    ]
    assert rows[0]["weights"] == rows[1]["weights"]
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
@pytest.mark.parametrize("mpirun", [_OPEN_MPI, _MPICH], ids=["open-mpi", "mpich"])
def test_a_failing_rank_ends_the_job(
    mpirun: tuple[str, ...], command: Command, needing: Command, tmp_path: Path
) -> None:
    """``mpirun`` ends the others when one fails, and the cause is among what was printed."""
    needing(mpirun[0])
    script = tmp_path / "fails.py"
    script.write_text(
        "import torch\nfrom fabric_core import Fabric\n"
        "fabric = Fabric(accelerator='cpu', strategy='ddp', devices=2)\nfabric.launch()\n"
        "if fabric.global_rank == 1:\n    raise ValueError('the first cause')\n"
        "fabric.all_reduce(torch.ones(1))\n"
    )
    done = command(*mpirun, "-np", "2", sys.executable, str(script), timeout=60)
    assert done.code != 0
    assert done.err.count("ValueError: the first cause") == 1
    assert done.err.count("Traceback (most recent call last)") == 1


@pytest.mark.slow
def test_mpich_can_be_initialised_afterwards(command: Command, needing: Command, tmp_path: Path) -> None:
    """What the launcher asks Hydra leaves MPI usable."""
    needing("mpirun.mpich")
    script = tmp_path / "afterwards.py"
    script.write_text(_AFTERWARDS)
    done = command("mpirun.mpich", "-np", "2", sys.executable, str(script))
    assert (done.code, done.out.split()) == (0, ["of", "2", "of", "2"]), done.err


@pytest.mark.slow
def test_one_process_of_mpirun_is_like_a_shell(
    command: Command, needing: Command, train: str, ranks: Command, tmp_path: Path
) -> None:
    """``mpirun -np 1`` starts one process, which starts its own ranks."""
    needing(_OPEN_MPI[0])
    done = command(*_OPEN_MPI, "-np", "1", sys.executable, train, "2", str(tmp_path / "saved"))
    assert [(row["size"], row["owner"]) for row in ranks(done.out)] == [(2, "elastic")] * 2, done.err
