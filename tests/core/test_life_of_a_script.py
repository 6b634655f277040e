"""The façade from construction to teardown, with in-memory plugins alone."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric, around, hookimpl
from fabric_core.errors import (
    CheckpointError,
    DeviceError,
    MisuseError,
    OptionError,
    PlanError,
    RequestError,
    SetupError,
    UnknownPluginError,
)

from .conftest import Shelf


def _model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def test_training_equals_plain_pytorch(in_memory: dict[str, Any]) -> None:
    """Ten steps give exactly the parameters that the same loop gives in plain PyTorch."""
    x = torch.randn(10, 6, 4)
    plain = _model()
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=0.01)
    for batch in x:
        plain(batch).square().mean().backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()

    with Fabric(**in_memory) as fabric:
        fabric.launch()
        original = _model()
        model, optimizer = fabric.setup(original, torch.optim.Adam(original.parameters(), lr=0.01))
        for batch in x:
            fabric.backward(model(batch).square().mean())
            optimizer.step()
            optimizer.zero_grad()
    for mine, reference in zip(original.parameters(), plain.parameters(), strict=True):
        assert torch.equal(mine, reference)


def test_saving_and_loading_continue_as_if_never_stopped(in_memory: dict[str, Any]) -> None:
    """A state saved and loaded into new objects goes on to the same parameters as the uninterrupted run."""
    with Fabric(**in_memory) as fabric:
        x = torch.randn(8, 6, 4)

        def fresh() -> tuple[Any, Any]:
            bare = _model()
            model, optimizer = fabric.setup(bare, torch.optim.Adam(bare.parameters(), lr=0.01))
            return model, optimizer

        def train(model: Any, optimizer: Any, batches: torch.Tensor) -> None:
            for batch in batches:
                fabric.backward(model(batch).square().mean())
                optimizer.step()
                optimizer.zero_grad()

        model, optimizer = fresh()
        train(model, optimizer, x[:4])
        fabric.save("half", {"model": model, "optimizer": optimizer, "step": 4, "extra": "kept"})
        train(model, optimizer, x[4:])

        again, its_optimizer = fresh()
        state = {"model": again, "optimizer": its_optimizer, "step": 0}
        rest = fabric.load("half", state)
        assert state["step"] == 4
        assert rest == {"extra": "kept"}
        train(again, its_optimizer, x[4:])
        for mine, reference in zip(again.parameters(), model.parameters(), strict=True):
            assert torch.equal(mine, reference)

        with pytest.raises(CheckpointError, match="has no 'scheduler'"):
            fabric.load("half", {"scheduler": 0})
        with pytest.raises(CheckpointError, match="there is no checkpoint"):
            fabric.load("nowhere", {})


def test_filter_chooses_what_is_saved(in_memory: dict[str, Any]) -> None:
    """``filter`` keeps the entries of a name for which it is true."""
    with Fabric(**in_memory) as fabric:
        model = fabric.setup(_model())
        fabric.save("some", {"model": model}, filter={"model": lambda name, _: name.startswith("0.")})
        assert sorted(fabric.load("some")["model"]) == ["0.bias", "0.weight"]


def test_a_strategy_that_needs_both_at_once_gets_both_at_once(in_memory: dict[str, Any]) -> None:
    """Where joint setup is declared, an optimizer goes through ``setup`` with its model, and not alone."""
    strategy = Fabric(**in_memory).strategy
    declared = strategy.capabilities.model_copy(update={"joint_setup": True})
    joint = type("Joint", (type(strategy),), {"capabilities": declared})
    with Fabric(**{**in_memory, "strategy": joint()}) as fabric:
        model = _model()
        with pytest.raises(SetupError, match="together with its model"):
            fabric.setup_optimizers(torch.optim.SGD(model.parameters()))
        fabric.setup(model, torch.optim.SGD(model.parameters()))


def test_single_process_collectives_give_the_data_back(in_memory: dict[str, Any]) -> None:
    """With one process every collective is the identity on values, which are new and go with no gradient."""
    with Fabric(**in_memory) as fabric:
        data: dict[str, Any] = {"a": torch.arange(3), "b": (torch.ones(2),)}
        assert torch.equal(fabric.all_reduce(data)["a"], data["a"])
        assert torch.equal(fabric.all_gather(data)["b"][0], data["b"][0])
        assert fabric.broadcast("word") == "word"
        loss = torch.ones(1, requires_grad=True) * 2
        for result in (fabric.all_reduce(loss), fabric.all_gather(loss)):
            assert not result.requires_grad
            result.zero_()
        assert loss.item() == 2
        torch.autograd.backward(fabric.all_gather(loss, sync_grads=True), torch.ones(1))
        with pytest.raises(RequestError, match="no such reduction"):
            fabric.all_reduce(loss, reduce_op="median")
        with pytest.raises(RequestError, match="no such rank"):
            fabric.broadcast("word", src=1)
        fabric.barrier()
        with fabric.rank_zero_first():
            pass
        assert (fabric.global_rank, fabric.local_rank, fabric.node_rank, fabric.world_size) == (0, 0, 0, 1)
        assert fabric.is_global_zero


def test_extension_wraps_a_behaviour(in_memory: dict[str, Any]) -> None:
    """``@around.strategy`` runs before and after the owner, and can change the result."""

    class Doubling:
        @around.strategy
        def backward(self, loss: torch.Tensor) -> Any:
            seen.append(loss.item())
            result = yield
            seen.append("after")
            return result

    seen: list[Any] = []
    in_memory["plugins"] = [*in_memory["plugins"], Doubling()]
    with Fabric(**in_memory) as fabric:
        weight = torch.ones(1, requires_grad=True)
        fabric.backward((weight * 3).sum())
        assert seen == [3.0, "after"]
        assert weight.grad is not None
        assert weight.grad.item() == 3.0


def test_listener_hears_the_life_cycle(in_memory: dict[str, Any]) -> None:
    """``@hookimpl`` methods are called in the order of a script's life."""

    class Diary:
        def __init__(self) -> None:
            self.lines: list[str] = []

        @hookimpl
        def configured(self, plan: Any) -> None:
            self.lines.append(f"configured {plan.strategy.name}")

        @hookimpl
        def launched(self, world: Any) -> None:
            self.lines.append(f"launched {world.global_rank}")

        @hookimpl
        def module_set_up(self, module: nn.Module) -> None:
            self.lines.append(type(module).__name__)

        @hookimpl
        def checkpoint_saved(self, path: Path) -> None:
            self.lines.append(path.name)

        @hookimpl
        def torn_down(self) -> None:
            self.lines.append("torn down")

    diary = Diary()
    in_memory["plugins"] = [*in_memory["plugins"], diary]
    with Fabric(**in_memory) as fabric:
        model = fabric.setup(_model())
        fabric.save("page", {"model": model})
    assert diary.lines == ["configured alone", "launched 0", "FabricModule", "page", "torn down"]


def test_loggers_and_callbacks(in_memory: dict[str, Any]) -> None:
    """Metrics reach the logger as numbers; ``call`` reaches the callbacks that have the method."""
    heard: list[Any] = []

    class Listener:
        def on_epoch(self, number: int) -> None:
            heard.append(number)

    with Fabric(**in_memory, callbacks=[Listener(), object()]) as fabric:
        fabric.log("loss", torch.tensor(0.5), step=3)
        fabric.log_dict({"accuracy": 1})
        fabric.call("on_epoch", 7)
        fabric.call("on_nothing")
        notebook: Any = in_memory["loggers"]
        assert notebook.rows == [({"loss": 0.5}, 3), ({"accuracy": 1.0}, None)]
        assert heard == [7]
        assert fabric.logger.log_metrics == notebook.log_metrics


def test_teardown_gives_back_and_another_fabric_follows(in_memory: dict[str, Any]) -> None:
    """Teardown reaches the strategy once per life; another ``Fabric`` works in the same process."""
    first = Fabric(**in_memory)
    first.launch()
    first.teardown()
    first.teardown()
    strategy: Any = first.strategy
    assert strategy.seen == ["connect 1", "teardown"]
    with Fabric(**in_memory) as second:
        assert second.setup(_model())(torch.ones(1, 4)).shape == (1, 1)


@pytest.mark.parametrize(
    ("changed", "error", "said"),
    [
        ({"strategy": "alnoe"}, UnknownPluginError, "did you mean 'alone'"),
        ({"accelerator": "hots"}, UnknownPluginError, "did you mean 'host'"),
        ({"precision": "plian"}, UnknownPluginError, "did you mean 'plain'"),
        ({"strategy": "alone:patiense=4"}, OptionError, "the options are: patience"),
        ({"strategy": "alone:patience=many"}, OptionError, "patience: int"),
        ({"strategy": "alone:patience"}, RequestError, "options as name=value"),
        ({"strategy": ""}, RequestError, "can't be parsed"),
        ({"devices": 0}, DeviceError, "at least one device"),
        ({"devices": -2}, DeviceError, "can't be negative"),
        ({"devices": 3}, DeviceError, "there are 2"),
        ({"devices": [0, 0]}, DeviceError, "named twice"),
        ({"devices": [2]}, DeviceError, "isn't there"),
        ({"devices": "two"}, DeviceError, "can't be parsed"),
        ({"devices": 2}, PlanError, "at most 1 process"),
        ({"num_nodes": 0}, RequestError, "positive whole number"),
        ({"strategy": 3.5}, RequestError, "can't be parsed"),
    ],
)
def test_bad_arguments_fail_at_construction(
    in_memory: dict[str, Any], changed: dict[str, Any], error: type[Exception], said: str
) -> None:
    """Each wrong argument is an error at construction that says what to write."""
    with pytest.raises(error) as caught:
        Fabric(**{**in_memory, **changed})
    assert said in str(caught.value)


def test_setting_up_twice_is_an_error(in_memory: dict[str, Any]) -> None:
    """What was set up is not set up again."""
    with Fabric(**in_memory) as fabric:
        bare = _model()
        model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=1.0))
        with pytest.raises(SetupError, match="set up before"):
            fabric.setup(model)
        with pytest.raises(SetupError, match="set up before"):
            fabric.setup_optimizers(optimizer)


def test_run_must_be_overridden(in_memory: dict[str, Any]) -> None:
    """``run`` of the base class says what to do; a subclass's is called."""

    class Trainer(Fabric):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            return args

    with pytest.raises(MisuseError, match="def run"):
        Fabric(**in_memory).run()
    assert Trainer(**in_memory).run(1) == (1,)


class Confused(Shelf):
    """Can't tell what it reads."""

    def recognises(self, path: Any) -> bool:
        raise KeyError("header")


@pytest.mark.parametrize("act", ["load", "load_raw", "latest"])
def test_a_format_that_can_t_tell_is_named(in_memory: dict[str, Any], tmp_path: Path, act: str) -> None:
    """With the checkpoint, and what was raised; not as an error of the user's call."""
    path = tmp_path / "state.pt"
    path.touch()
    with Fabric(**{**in_memory, "plugins": [Confused()]}) as fabric:
        fabric.launch()
        call = fabric.load if act != "load_raw" else partial(fabric.load_raw, obj=nn.Linear(2, 2))
        given = tmp_path / "latest" if act == "latest" else path
        with pytest.raises(CheckpointError) as seen:
            call(given)
        assert seen.value.what.startswith("the checkpoint format Confused can't be used: recognises failed: KeyError")
        assert seen.value.where == str(given)
