"""Several processes from a notebook and from a prompt: what works there works, and what can't says what does."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.sampled(0.4)

_PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "use-in-a-notebook.md"
_PAGE_CELLS = re.findall(
    r"the tests run it in the kernel of a notebook -->\n```python\n(.*?)```", _PAGE.read_text(), re.DOTALL
)
_CELLS = {
    "used before": """
import torch
(torch.rand(600, 600) @ torch.rand(600, 600)).sum()
torch.nn.Linear(4, 1)(torch.ones(2, 4)).sum().backward()
""",
    "page": _PAGE_CELLS[0] + "\nassert 0 < loss < 10\nprint(fabric)",
    "failure": _PAGE_CELLS[1],
    "no function": "Fabric(accelerator='cpu', strategy='ddp', devices=2).launch()",
    "spawned": "Fabric(accelerator='cpu', strategy='ddp', devices=2).launch(train, 3)",
    "sharded": "print(Fabric(accelerator='cpu', strategy='fsdp:start_method=fork', devices=2).launch(train, 1) > 0)",
    "module": """
from helper import which
print("sum", Fabric(accelerator="cpu", strategy="ddp:start_method=forkserver", devices=2).launch(which, 3))
""",
    "one device": "print(train(Fabric(accelerator='cpu', devices=1), 1) > 0)",
}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Run the cells in a real kernel; gives what each shows, errors as ``Class: text``."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "helper.py").write_text(
        "def which(fabric, more):\n    return fabric.all_reduce(more, reduce_op='sum').item()\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in _CELLS.values()])
    NotebookClient(
        notebook, timeout=100, kernel_name="python3", allow_errors=True, resources={"metadata": {"path": str(folder)}}
    ).execute()
    return {name: "".join(map(_shown, cell.outputs)) for name, cell in zip(_CELLS, notebook.cells, strict=True)}


def _shown(output: Any) -> str:
    return f"{output.ename}: {output.evalue}" if output.output_type == "error" else output.get("text", "")


@pytest.mark.slow
def test_the_page_works_in_a_kernel(outputs: dict[str, str]) -> None:
    """The page's function trains on forked ranks, after the kernel has computed; the object stays unlaunched."""
    assert "Error" not in outputs["used before"]
    assert "not launched" in outputs["page"]
    assert "Error" not in outputs["page"]
    assert "TypeError 'str' object cannot be interpreted as an integer" in outputs["failure"]


@pytest.mark.slow
def test_what_cannot_work_says_what_does(outputs: dict[str, str]) -> None:
    """No function, and a function that started processes can't import: each error names the strategy that works."""
    for name in ("no function", "spawned"):
        assert outputs[name].startswith("LaunchError")
        assert 'strategy="ddp_notebook"' in outputs[name]
    assert "train" in outputs["spawned"]


@pytest.mark.slow
def test_what_the_errors_and_the_page_say_works(outputs: dict[str, str]) -> None:
    """FSDP on forked ranks, a function of a module on started ones, and one device without any."""
    assert "True" in outputs["sharded"]
    assert "sum 6" in outputs["module"]
    assert "True" in outputs["one device"]


@pytest.mark.slow
def test_a_prompt_is_told_the_same_and_can_launch() -> None:
    """At Python's own prompt, too."""
    lines = (
        "from fabric_core import Fabric",
        "def double(fabric, x): return fabric.all_reduce(x, reduce_op='sum').item()",
        "",
        "Fabric(accelerator='cpu', strategy='ddp', devices=2).launch()",
        "Fabric(accelerator='cpu', strategy='ddp_notebook', devices=2).launch(double, 4)",
    )
    done = subprocess.run(
        [sys.executable, "-i", "-q"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert 'fabric.launch(function) under strategy="ddp_notebook"' in done.stderr
    assert done.stdout.split()[-1] == "8", done.stderr
