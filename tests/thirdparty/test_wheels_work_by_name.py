"""Wheels of third parties work by name, from a script that imports only the core."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SCRIPT = """
import json
import torch
from torch import nn
from fabric_core import Fabric

def train(**chosen):
    with Fabric(accelerator="cpu", devices=2, **chosen) as fabric:
        fabric.launch()
        torch.manual_seed(3)
        model = nn.Linear(4, 2)
        model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        batches = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1))
        for batch in batches:
            output = model(batch[fabric.global_rank::2])
            fabric.backward(output.square().mean())
            optimizer.step()
            optimizer.zero_grad()
        fabric.print(json.dumps({
            "type": str(output.dtype),
            "weight": model.weight.tolist(),
            "choices": [f"{choice.name} of {choice.distribution}" for choice in fabric.plan.choices],
        }))

train(strategy="mean_gradients", precision="float64-everywhere")
train(strategy="ddp", precision="FLOAT64-everywhere")
train(strategy={"name": "mean_gradients", "options": {"factor": 0.0}}, precision="32-true")
"""


def _plain(dtype: torch.dtype) -> torch.Tensor:
    """Train the same model in one process on whole batches."""
    torch.manual_seed(3)
    model = nn.Linear(4, 2).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1)).to(dtype):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.weight.detach()


@pytest.fixture(scope="module")
def environment(make_environment: Callable[[str], Any], built_wheels: list[Path]) -> Any:
    """Give an environment with the three distributions."""
    environment = make_environment("third-parties")
    environment.install(built_wheels)
    (environment.folder / "train.py").write_text(SCRIPT)
    return environment


def test_a_strategy_a_precision_and_an_extension_work_on_two_processes(environment: Any) -> None:
    """Each is chosen by its name, acts, and stands in the plan with its distribution; training equals one process."""
    done = environment.run("train.py")
    assert done.returncode == 0, done.stdout + done.stderr
    both, precision_alone, factor = (json.loads(line) for line in done.stdout.splitlines())
    reference = _plain(torch.float64)
    for result in (both, precision_alone):
        assert result["type"] == "torch.float64"
        torch.testing.assert_close(torch.tensor(result["weight"], dtype=torch.float64), reference, rtol=0, atol=1e-12)
    assert "mean_gradients of acme-mean-gradients 1.0" in both["choices"]
    assert "float64-everywhere of acme-float64 1.0" in precision_alone["choices"]
    assert "backward_counter of acme-backward-counter 1.0" in factor["choices"]
    torch.manual_seed(3)
    torch.testing.assert_close(torch.tensor(factor["weight"]), nn.Linear(4, 2).weight.detach())
    assert sorted(line for line in done.stderr.splitlines() if "backward passes" in line) == [
        f"rank {rank}: 3 backward passes" for rank in (0, 0, 0, 1, 1, 1)
    ]


ASK = """
import json, sys
from fabric_core import Fabric
from fabric_core.errors import FabricError
answers = []
for chosen in json.loads(sys.argv[1]):
    try:
        Fabric(accelerator="cpu", devices=2, **chosen)
        answers.append(["fine", "", ""])
    except FabricError as error:
        answers.append([type(error).__name__, error.what, error.instead])
print(json.dumps(answers))
"""


def test_what_is_not_installed_says_what_to_install(environment: Any) -> None:
    """Once uninstalled, a name with its distribution, or one that others know, says what to install."""
    environment.pip("uninstall", "--yes", "acme-mean-gradients")
    asked = [
        {"strategy": "mean_gradients"},
        {"strategy": "Acme.Mean_Gradients/mean_gradients"},
        {"strategy": "acme-float64/mean_gradients"},
        {"strategy": "ddp", "precision": "float64-everywhere"},
    ]
    done = environment.run("-c", ASK, json.dumps(asked))
    assert done.returncode == 0, done.stdout + done.stderr
    known, named, elsewhere, rest = json.loads(done.stdout)
    assert known[0] == named[0] == "NotInstalledError"
    assert known[1] == "the strategy 'mean_gradients' comes with acme_mean_gradients, which isn't installed"
    assert (known[2], named[2]) == ("pip install acme_mean_gradients", "pip install Acme.Mean_Gradients")
    assert elsewhere[:2] == ["UnknownPluginError", "there is no strategy 'mean_gradients' in acme-float64"]
    assert rest[0] == "fine"
