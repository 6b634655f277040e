"""Extensions go round what a script does through ``Fabric``, and hear of its life with the ``Fabric`` at hand."""

import gc
import pickle
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fabric_core
from fabric_core import Fabric, around, hookimpl
from fabric_core.errors import FabricWarning


class Witness:
    """Goes round every act, and writes down what it saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @around.fabric
    def setup(self, module: nn.Module, optimizers: Any) -> Generator[None, Any, Any]:
        self.seen.append(("setup", type(module), len(optimizers)))
        return (yield)

    @around.fabric
    def backward(self, tensor: torch.Tensor) -> Generator[None, Any, Any]:
        self.seen.append(("backward", tensor.item()))
        return (yield)

    @around.fabric
    def step(self, optimizer: Any) -> Generator[None, Any, Any]:
        self.seen.append("step")
        return (yield)

    @around.fabric
    def save(self, path: Path, state: Any, options: Any) -> Generator[None, Any, Any]:
        self.seen.append(("save", sorted(state), options["keep"]))
        return (yield)

    @around.fabric
    def load(self, path: Path, options: Any) -> Generator[None, Any, Any]:
        rest = yield
        return {**rest, "seen": options["strict"]}


def _trained(fabric: Fabric, steps: int = 1) -> tuple[Any, Any]:
    bare = nn.Linear(2, 1)
    model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    for _ in range(steps):
        fabric.backward(model(torch.ones(1, 2)).sum() * 0 + 3)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def test_an_extension_goes_round_what_a_script_does(in_memory: dict[str, Any], tmp_path: Path) -> None:
    """Setup, backward, step, save and load pass through it; what it returns is what the script gets."""
    witness = Witness()
    with Fabric(**{**in_memory, "plugins": [*in_memory["plugins"], witness]}) as fabric:
        model, _ = _trained(fabric, steps=2)
        fabric.save(tmp_path / "page", {"model": model, "epoch": 3})
        assert fabric.load(tmp_path / "page", {"model": model}) == {"epoch": 3, "seen": True}
        assert fabric.models == [model]
        assert fabric.step_count == 2
    assert witness.seen == [
        ("setup", nn.Linear, 1),
        ("backward", 3.0),
        "step",
        ("backward", 3.0),
        "step",
        ("save", ["epoch", "model"], None),
    ]


def test_an_act_may_be_changed(in_memory: dict[str, Any]) -> None:
    """An extension may replace what the script gets."""

    class Silent:
        @around.fabric
        def step(self) -> Generator[None, Any, Any]:
            yield
            return "stepped"

    with Fabric(**{**in_memory, "plugins": [Silent()]}) as fabric:
        _, optimizer = _trained(fabric)
        assert optimizer.step() == "stepped"


class Diary:
    """Listens to everything."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    @hookimpl
    def configured(self, fabric: Fabric, plan: Any) -> None:
        assert fabric.plan is plan
        self.lines.append("configured")

    @hookimpl
    def launched(self, fabric: Fabric, world: Any) -> None:
        assert fabric.world is world
        self.lines.append("launched")

    @hookimpl
    def module_set_up(self, fabric: Fabric, module: nn.Module) -> None:
        assert fabric.models == [module]
        self.lines.append("module")

    @hookimpl
    def optimizer_set_up(self, fabric: Fabric, optimizer: Any) -> None:
        self.lines.append(type(optimizer).__name__)

    @hookimpl
    def stepped(self, fabric: Fabric) -> None:
        self.lines.append(f"step {fabric.step_count}")

    @hookimpl
    def checkpoint_saved(self, fabric: Fabric, path: Path) -> None:
        self.lines.append(f"saved {path.name}")

    @hookimpl
    def checkpoint_loaded(self, fabric: Fabric, path: Path) -> None:
        self.lines.append(f"loaded {path.name}")

    @hookimpl
    def failed(self, fabric: Fabric, error: BaseException) -> None:
        self.lines.append(f"failed {error}")

    @hookimpl
    def torn_down(self, fabric: Fabric) -> None:
        self.lines.append("torn down")


def test_a_listener_hears_the_whole_life(in_memory: dict[str, Any], tmp_path: Path) -> None:
    """In the order of a script, each with the ``Fabric``; a failure before the end."""
    diary = Diary()
    in_memory["plugins"] = [*in_memory["plugins"], diary]
    with pytest.raises(LookupError), Fabric(**in_memory) as fabric:  # noqa: PT012 - a script
        model, _ = _trained(fabric)
        fabric.save(tmp_path / "page", {"model": model})
        fabric.load(tmp_path / "page", {"model": model})
        raise LookupError("no more data")
    assert diary.lines == [
        "configured", "launched", "module", "FabricSGD", "step 1", "saved page", "loaded page", "failed no more data",
        "torn down",
    ]  # fmt: skip


def test_a_listener_hears_of_what_is_set_up_by_itself(in_memory: dict[str, Any]) -> None:
    """``setup_module`` and ``setup_optimizers`` tell as ``setup`` does, of each optimizer."""
    diary = Diary()
    fabric = Fabric(**{**in_memory, "plugins": [*in_memory["plugins"], diary]})
    first, second = nn.Linear(2, 1), nn.Linear(2, 1)
    fabric.setup_module(nn.ModuleList([first, second]))
    fabric.setup_optimizers(torch.optim.SGD(first.parameters()), torch.optim.Adagrad(second.parameters()))
    assert diary.lines == ["configured", "launched", "module", "FabricSGD", "FabricAdagrad"]


@pytest.mark.parametrize(
    ("end", "heard"),
    [
        ("raise LookupError('no more data')", "failed no more data,torn down"),
        ("", "torn down"),
        ("exit(3)", "torn down"),
    ],
)
def test_a_listener_hears_of_the_end_of_a_script_that_does_not_tear_down(end: str, heard: str) -> None:
    """Also of what ended it."""
    script = f"""
from fabric_core import Fabric, hookimpl
class Diary:
    lines = []
    @hookimpl
    def failed(self, fabric, error):
        self.lines.append(f"failed {{error}}")
    @hookimpl
    def torn_down(self, fabric):
        print(",".join([*self.lines, "torn down"]))
fabric = Fabric(accelerator="cpu", devices=1, plugins=[Diary()])
fabric.launch()
{end}
"""
    pytest.importorskip("fabric_plugins")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=60)
    assert done.stdout.strip() == heard, done.stderr


class Steps:
    @around.strategy
    def optimizer_step(self) -> Generator[None, Any, Any]:
        return (yield)


class Conversions:
    @around.precision
    def convert_input(self) -> Generator[None, Any, Any]:
        return (yield)


def test_an_optimizer_that_outlives_its_fabric_steps_through_its_extensions(in_memory: dict[str, Any]) -> None:
    """Only nobody is left to be told."""
    witness, diary = Witness(), Diary()
    with Fabric(**{**in_memory, "plugins": [witness, diary]}) as fabric:
        _, optimizer = _trained(fabric)
    seen, heard = len(witness.seen), len(diary.lines)
    del fabric
    gc.collect()
    optimizer.step()
    assert witness.seen[seen:] == ["step"]
    assert len(diary.lines) == heard


def test_what_is_pickled_says_that_its_extensions_are_lost(in_memory: dict[str, Any]) -> None:
    """An optimizer by its strategy, precision and step, a model by its precision and wrappers; else nothing is said."""
    with Fabric(**{**in_memory, "plugins": [Steps(), Witness(), Conversions()]}) as fabric:
        model, optimizer = _trained(fabric)
        with pytest.warns(
            FabricWarning, match="an optimizer was pickled without the extensions.*Conversions, Steps, Witness"
        ):
            again = pickle.loads(pickle.dumps(optimizer))  # noqa: S301 - made here
        again.step()
        with pytest.warns(FabricWarning, match="a model was pickled without the extensions.*: Conversions;"):
            pickle.dumps(model)
    with Fabric(**in_memory) as fabric:
        pickle.dumps(_trained(fabric))


def test_a_fabric_shows_what_it_is(in_memory: dict[str, Any]) -> None:
    """Its choices, and who it is once it is launched."""
    fabric = Fabric(**{**in_memory, "strategy": "alone:patience=4"})
    chosen = "accelerator='host', strategy='alone:patience=4', precision='plain', devices=1, num_nodes=1"
    assert repr(fabric) == f"<Fabric({chosen}), not launched>"
    with fabric:
        fabric.launch()
        assert repr(fabric) == f"<Fabric({chosen}), rank 0 of 1>"


def test_the_package_has_a_version() -> None:
    """That of the distribution, without being asked for at import."""
    from importlib.metadata import version

    assert fabric_core.__version__ == version("fabric-registry")
