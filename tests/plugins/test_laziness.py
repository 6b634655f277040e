"""What nobody named is not imported: ``sys.modules`` proves it, each time in a process of its own."""

import ast
import json
import subprocess
import sys

import pytest

CASES = {
    "listing": "sys.argv = ['fabric', 'plugins', 'list']\ntry:\n    cli.main()\nexcept SystemExit:\n    pass",
    "one device": "Fabric(accelerator='cpu', strategy='single_device')",
    "one device and a backward pass": (
        "fabric = Fabric(accelerator='cpu', strategy='single_device', precision='32-true')\n"
        "model = fabric.setup(torch.nn.Linear(2, 1))\n"  # an optimizer would import FSDP by torch's own compiler
        "fabric.backward(model(torch.ones(1, 2)).sum())"
    ),
}


@pytest.mark.parametrize("code", CASES.values(), ids=CASES)
def test_neither_ddp_nor_fsdp_is_imported(code: str) -> None:
    """Beyond what ``import torch`` itself brings, there is no module of DDP or FSDP, neither torch's nor ours."""
    script = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "from fabric_core import Fabric, cli\n"
        f"{code}\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    modules = json.loads(done.stdout.splitlines()[-1])
    assert "fabric_core.choosing.registry" in modules
    assert [name for name in modules if "ddp" in name or "fsdp" in name or "nn.parallel" in name] == []
    plugins = [name for name in modules if name.startswith("fabric_plugins.strategies.")]
    assert plugins == ([] if "list" in code else ["fabric_plugins.strategies.single_device"])


MODULES = """
import sys, torch
from fabric_core import Fabric
Fabric(accelerator="cpu", devices=1)
assert "fabric_core.choosing.lock" not in sys.modules  # who has no lock doesn't wait for it
found = [name for name in sys.modules if name.startswith("fabric_plugins.")]
print([name for name in found if not hasattr(sys.modules[name], "__path__")])
"""


def test_a_fabric_on_the_cpu_imports_at_most_three_modules_of_plugins() -> None:
    """The accelerator that was named, and the first strategy and precision that fit: nothing else, but for packages."""
    done = subprocess.run([sys.executable, "-c", MODULES], capture_output=True, text=True, check=True, timeout=60)
    assert sorted(ast.literal_eval(done.stdout)) == [
        "fabric_plugins.accelerators.cpu",
        "fabric_plugins.precisions.full",
        "fabric_plugins.strategies.single_device",
    ]


@pytest.mark.parametrize("collects", [True, False])
def test_an_import_leaves_the_search_for_garbage_as_it_was(collects: bool) -> None:
    """On or off, also where the import fails."""
    code = (
        f"import gc; gc.{'enable' if collects else 'disable'}(); import fabric_core, sys\n"
        "sys.modules['fabric_core.fabric'] = None\n"
        "try: fabric_core.Fabric\nexcept ImportError: pass\n"
        f"assert gc.isenabled() is {collects}\n"
        "del sys.modules['fabric_core.fabric']; fabric_core.Fabric\n"
        f"assert gc.isenabled() is {collects}\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)
