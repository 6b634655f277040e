"""A load that can't be done changes nothing: what doesn't fit is found before anything is read into place."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric, around
from fabric_core.conformance.pool import RankPool, RankRaised
from fabric_core.errors import CheckpointError


def _model(seed: int, width: int = 4, more: bool = False) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, width), nn.Linear(width, 2))
    return model.append(nn.Linear(2, 2)) if more else model


def _set_up(fabric: Fabric, model: nn.Module, groups: int = 1) -> Any:
    parts = list(model) if groups > 1 else [model]  # type: ignore[call-overload]
    return fabric.setup(model, torch.optim.SGD([{"params": part.parameters()} for part in parts], lr=0.1, momentum=0.9))


def _step(fabric: Fabric, model: Any, optimizer: Any) -> None:
    fabric.backward(model(torch.ones(2, 4)).square().sum())
    optimizer.step()
    optimizer.zero_grad()


def _everything(fabric: Fabric, model: Any, optimizer: Any) -> list[Any]:
    state = fabric.strategy.optimizer_state(optimizer.optimizer, full=True)
    return [
        *(one.tolist() for one in fabric.strategy.module_state(model.module, full=True).values()),
        [entry["momentum_buffer"].tolist() for entry in state.get("state", {}).values()],
        fabric.precision.state_dict(),
    ]


class _OtherState:
    """Saves what is no state of the precision."""

    @around.precision
    def state_dict(self) -> Any:
        yield
        return {"other": 1}


def _fails(strategy: str, devices: int, path: Path, case: str) -> tuple[bool, str]:
    """Give whether a failed load has left everything as it was, and what it said."""
    others = [_OtherState()] if case == "precision" else []
    precision = "16-mixed:init_scale=32"
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices, precision=precision, plugins=others) as fabric:
        fabric.launch()
        model, optimizer = _set_up(fabric, _model(0))
        _step(fabric, model, optimizer)
        fabric.save(path, {"model": model, "optimizer": optimizer})
    with Fabric(accelerator="cpu", strategy=strategy, devices=devices, precision="16-mixed:init_scale=64") as fabric:
        fabric.launch()
        width, more = (3 if case == "shape" else 4), case == "name"
        model, optimizer = _set_up(fabric, _model(5, width, more), groups=2 if case == "groups" else 1)
        _step(fabric, model, optimizer)
        asked = {"model": model, "optimizer": optimizer}
        if case == "entry":
            asked["absent"] = 1
        if case == "kind":
            asked = {"optimizer": model, "model": optimizer}
        before = _everything(fabric, model, optimizer)
        with pytest.raises(RuntimeError) as caught:
            fabric.load(path, asked)
        assert isinstance(caught.value, CheckpointError)
        return before == _everything(fabric, model, optimizer), str(caught.value)


_SAID = {
    "entry": "has no 'absent'",
    "name": "missing: '2.bias', '2.weight'",
    "shape": "0.weight is (4, 4) there and (3, 4) here",
    "groups": "[4] there and [2, 2] here",
    "kind": "missing: '0.bias'",
    "precision": "not of the precision that is used now",
}


@pytest.mark.parametrize("case", _SAID)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp:state_dict_type=sharded"])
def test_a_failed_load_changes_nothing(strategy: str, case: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """An entry, a name, a shape, groups or a precision that differ: nothing has changed, and the error says which."""
    for same, said in two_ranks.run(_fails, strategy, 2, tmp_path / "checkpoint", case):
        assert _SAID[case] in said
        assert same


def _loads_what_it_can(path: Path) -> Any:
    with Fabric(accelerator="cpu", strategy="fsdp:state_dict_type=sharded", devices=2) as fabric:
        fabric.launch()
        fabric.save(path, {"model": fabric.setup(_model(0))})
        model = fabric.setup(_model(5, more=True))
        fabric.load(path, {"model": model, "absent": 1}, strict=False)
        return [one.tolist() for one in fabric.strategy.module_state(model.module, full=True).values()]


def test_without_strict_names_may_differ(two_ranks: RankPool, tmp_path: Path) -> None:
    """What both have is loaded; the rest stays as it was."""
    rest = [one.tolist() for one in _model(5, more=True).state_dict().values()][4:]
    expected = [*(one.tolist() for one in _model(0).state_dict().values()), *rest]
    assert two_ranks.run(_loads_what_it_can, tmp_path / "checkpoint")[0] == expected


def _raw(path: Path) -> None:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        model = fabric.setup(_model(5, width=3))
        before = fabric.strategy.module_state(model.module, full=True)
        try:
            fabric.load_raw(path, model)
        finally:
            after = fabric.strategy.module_state(model.module, full=True)
            assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_bare_state_that_does_not_fit_changes_nothing(two_ranks: RankPool, tmp_path: Path) -> None:
    """``load_raw`` looks before it loads, too."""
    torch.save(_model(0).state_dict(), tmp_path / "bare.pt")
    with pytest.raises(RankRaised, match=r"CheckpointError[\s\S]*0\.weight is \(4, 4\) there"):
        two_ranks.run(_raw, tmp_path / "bare.pt")


class _Renamed(nn.Linear):
    """Takes a state in which its weight still has its old name."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self.register_load_state_dict_pre_hook(_rename)


def _rename(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if f"{prefix}kernel" in state:
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")


@pytest.mark.parametrize("strategy", ["single_device", "ddp"])
def test_a_model_that_takes_old_names_is_given_them(strategy: str, tmp_path: Path) -> None:
    """Where a hook renames what it loads, other names than today's are no misfit."""
    old = {"kernel": torch.ones(2, 4), "bias": torch.ones(2)}
    with Fabric(accelerator="cpu", strategy=strategy, devices=1) as fabric:
        model = fabric.setup(nn.Sequential(_Renamed()))
        torch.save({"model": {f"0.{name}": value for name, value in old.items()}}, tmp_path / "file")
        fabric.load(tmp_path / "file", {"model": model})
        assert fabric.strategy.module_state(model.module, full=True)["0.weight"].tolist() == torch.ones(2, 4).tolist()
