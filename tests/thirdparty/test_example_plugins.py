"""The distributions that authors copy from: each passes its own tests, and all work beside each other."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(1200)  # what imports DeepSpeed and Ray takes minutes where cores are shared

PLUGINS = Path(__file__).parents[2] / "docs" / "examples" / "plugins"
PROJECTS = sorted(one.name for one in PLUGINS.iterdir() if (one / "pyproject.toml").exists())
NEEDS = {
    "fabric-bnb": "bitsandbytes",
    "fabric-deepspeed": "deepspeed",
    "fabric-float8": "torchao",
    "fabric-ray": "ray",
}
"""What a distribution needs beyond this project; where it is absent, its own tests skip."""

SCRIPT = """
import sys
import torch
from torch import nn
from fabric_core import Fabric

def train(**chosen):
    with Fabric(accelerator="cpu", devices=2, **chosen) as fabric:
        fabric.launch()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16))
        wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.05))
        for step in range(8):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(2 * step + fabric.global_rank))
            fabric.backward((wrapped(x) - x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        x = torch.randn(64, 16, generator=torch.Generator().manual_seed(99))
        after = fabric.all_reduce((wrapped(x) - x).square().mean()).item()
        fabric.print(f"{after:.3f}", chosen)

if __name__ == "__main__":
    for chosen in eval(sys.argv[1]):
        train(**chosen)
"""
OPENREG = """
import torch
from torch import nn
from fabric_core import Fabric

with Fabric(accelerator="openreg", devices=1, precision="32-true") as fabric:
    fabric.launch()
    model = nn.Linear(4, 4)
    wrapped, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    fabric.backward(wrapped(torch.ones(2, 4, device=fabric.device)).square().mean())
    optimizer.step()
    print(wrapped.weight.device)
"""
FROM_RAY = """
import torch
from torch import nn
from fabric_core import Fabric

def train(fabric):
    wrapped = fabric.setup(nn.Sequential(nn.Linear(64, 64)).requires_grad_(False))
    bits = type(wrapped[0].weight).__name__
    return fabric.world_size, bits, wrapped(torch.ones(1, 64)).isfinite().all().item()

if __name__ == "__main__":
    print(Fabric(strategy="ddp", accelerator="cpu", devices=2, %splugins=["launcher=ray"]).launch(train))
"""
CHOSEN = [
    {"strategy": "ddp"},
    {"strategy": "local_sgd:sync_every=4"},
    {"strategy": "diloco:sync_every=4"},
    {"strategy": "ddp", "wrappers": ["ema:decay=0.9"]},
    {"strategy": "fsdp", "wrappers": ["ema"]},
]
"""What the script is run with, by string; and what is installed is added."""


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.fixture(scope="module")
def environment(make_environment: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Give an environment with the wheels of all of them, and the variables that DeepSpeed needs without a GPU."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copytree(PLUGINS, folder / "sources")  # a build writes beside the source
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "wheel"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder)]
    sources = [str(folder / "sources" / name) for name in PROJECTS]
    subprocess.run([*command, *options, *sources], check=True, timeout=200)
    environment = make_environment("examples")
    environment.install(sorted(folder.glob("*.whl")))
    with pytest.MonkeyPatch.context() as patch:
        # On shared cores, a Ray takes more than the minute that the kit gives a launcher.
        patch.setenv("FABRIC_TIMEOUT_SCALE", "5")
        patch.setenv("DS_ACCELERATOR", "cpu")
        # It compiles its communication once, here: in the user's folder, a run that was killed may have left a lock.
        patch.setenv("TORCH_EXTENSIONS_DIR", str(environment.folder / "extensions"))
        # ninja, by which it does, lies beside the tests' own interpreter.
        patch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        yield environment


@pytest.mark.authors
def test_all_are_listed_and_sound_beside_each_other(environment: Any) -> None:
    """Every name is there with its distribution, and what it needs is the worst that is said."""
    done = environment.run("-m", "fabric_core", "plugins", "list", "--json")
    listed = {one["distribution"] for one in json.loads(done.stdout)}
    assert set(PROJECTS) <= listed
    done = environment.run("-m", "fabric_core", "plugins", "doctor", "--json")
    found = [{**one, "distribution": one["distribution"].split()[0]} for one in json.loads(done.stdout)]
    assert set(PROJECTS) <= {one["distribution"] for one in found}
    absent = {name for name, module in NEEDS.items() if not _installed(module)}
    sound = {"ok", "unavailable", "not installed"}
    broken = [one for one in found if one["status"] not in sound and one["distribution"] not in absent]
    assert not broken, broken


@pytest.mark.authors
def test_one_script_uses_each_by_name_on_two_processes(environment: Any) -> None:
    """All installed together, each chosen by a string."""
    chosen = [*CHOSEN]
    if _installed("torchao"):
        chosen.append({"strategy": "ddp", "precision": "float8"})
    if _installed("deepspeed"):
        chosen += [{"strategy": f"deepspeed_stage_{stage}"} for stage in (1, 2, 3)]
    (environment.folder / "each.py").write_text(SCRIPT)
    done = environment.run("each.py", repr(chosen), FABRIC_EXTENSIONS="nan_guard", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    losses = [float(line.split()[0]) for line in done.stdout.splitlines() if "strategy" in line]
    assert len(losses) == len(chosen)
    assert all(0.5 < loss < 1.2 for loss in losses), done.stdout


@pytest.mark.authors
def test_the_launcher_and_the_4_bits_go_by_name_too(environment: Any) -> None:
    """Ray's actors are two ranks, whose frozen layers lie in 4 bits where bitsandbytes is there."""
    if not _installed("ray"):
        pytest.skip("ray is not installed")
    bits = _installed("bitsandbytes")
    (environment.folder / "actors.py").write_text(FROM_RAY % ('wrappers=["bnb_nf4"], ' if bits else ""))
    done = environment.run("actors.py", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"(2, '{'Params4bit' if bits else 'Parameter'}', True)" in done.stdout


@pytest.mark.authors
def test_a_device_of_its_own_goes_by_name(environment: Any) -> None:
    """The accelerator trains on one process, all that it claims."""
    (environment.folder / "openreg.py").write_text(OPENREG)
    done = environment.run("openreg.py", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "openreg:0" in done.stdout


def _accuracy(environment: Any, strategy: str) -> float:
    """Train the digits on two processes for some epochs; give the share recognised, in percent."""
    words = ["--accelerator", "cpu", "--devices", "2", "--epochs", "4", "--strategy", strategy, "--out", strategy]
    done = environment.run(str(PLUGINS.parent / "digits.py"), *words, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"^test accuracy ([0-9.]+)%", done.stdout, re.MULTILINE)
    assert found is not None, done.stdout
    return float(found[1])


@pytest.fixture(scope="module")
def accuracy_of_ddp(environment: Any) -> float:
    """Give what the digits come to by the built-in strategy."""
    return _accuracy(environment, "ddp")


@pytest.mark.authors
@pytest.mark.skipif(not _installed("deepspeed"), reason="deepspeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_digits_as_ddp_does(environment: Any, accuracy_of_ddp: float, stage: int) -> None:
    """Every stage comes within a point of ``ddp``; the script itself holds its checkpoint to give the same again."""
    assert accuracy_of_ddp > 90
    assert abs(_accuracy(environment, f"deepspeed_stage_{stage}") - accuracy_of_ddp) <= 1


@pytest.mark.authors
@pytest.mark.parametrize("devices", ["1", "2"])
def test_every_cell_of_the_matrix_is_what_fabric_does(environment: Any, devices: str) -> None:
    """Beside the built-ins: what works trains, in all cells; what is refused is refused for that very reason."""
    only = ["--accelerator", "cpu", "--wrapper", "ema", "--devices", devices]
    done = environment.run("-m", "fabric_core", "plugins", "matrix", *only, "--tried", "--json", OMP_NUM_THREADS="1")
    cells = json.loads(done.stdout)["cells"]
    assert {"local_sgd", "diloco", "deepspeed", "ddp", "fsdp"} <= {cell["strategy"] for cell in cells}
    absent = [f"No module named '{one}'" for one in NEEDS.values() if not _installed(one)]
    failed = [cell for cell in cells if cell["tried"] and not any(one in cell["tried"] for one in absent)]
    assert not failed, failed
    assert sum(cell["tried"] == "" for cell in cells) > 40
    refused = [cell for cell in cells if cell["status"] == "refused"]
    done = environment.run("-c", REFUSED, json.dumps(refused), devices)
    assert done.returncode == 0, done.stdout + done.stderr
    for raised, cell in zip(json.loads(done.stdout), refused, strict=True):
        # What to write instead is taken from what is imported, which is more where all cells were looked at.
        assert raised | {"instead": ""} == cell["error"] | {"instead": ""}


REFUSED = """
import json, sys
from fabric_core import Fabric
from fabric_core.errors import FabricError
raised = []
for cell in json.loads(sys.argv[1]):
    asked = {one: cell[one] for one in ("accelerator", "strategy", "precision")}
    try:
        Fabric(**asked, wrappers=[cell["wrapper"]] if cell["wrapper"] else None, devices=int(sys.argv[2]))
        raised.append(None)
    except FabricError as error:
        raised.append({"type": type(error).__name__, "what": error.what, "where": error.where, "got": error.got})
print(json.dumps(raised))
"""


@pytest.mark.authors
@pytest.mark.parametrize("project", PROJECTS)
def test_each_passes_its_own_tests(environment: Any, project: str, tmp_path: Path) -> None:
    """Its tests run in the environment that the wheels are in, with its own settings."""
    missing = project in NEEDS and not _installed(NEEDS[project])
    if missing:
        pytest.skip(f"{NEEDS[project]} is not installed")
    folder = tmp_path / project
    # Without the modules: those of the wheel are to be tested.
    (folder).mkdir()
    for one in (PLUGINS / project).iterdir():
        if one.name.startswith("test_") or one.name == "pyproject.toml":
            shutil.copy(one, folder / one.name)
    done = subprocess.run(
        [str(environment.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "."],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_comes_with_tests_and_a_page() -> None:
    """A distribution to copy from has what a good one has."""
    for name in PROJECTS:
        files = {one.name for one in (PLUGINS / name).iterdir()}
        assert {"pyproject.toml", "README.md"} <= files, name
        assert any(one.startswith("test_") for one in files), name
