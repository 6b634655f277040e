"""Objects anywhere in the state are saved and restored in place, and what can't be meant is refused."""

import collections
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fabric_core import Fabric, Wrapper
from fabric_core.conformance.pool import RankPool, RankRaised
from fabric_core.errors import CheckpointError, CheckpointKeyError


def _things(fabric: Fabric, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    bare = nn.Linear(2, 2)
    model, optimizer = fabric.setup(bare, torch.optim.Adam(bare.parameters(), lr=float(seed)))
    fabric.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1 + seed)
    data: Any = list(range(8))
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(data, shuffle=True))
    batches = iter(loader)
    for _ in range(2 * seed):
        next(batches)
    return {
        "model": model,
        "list": [nn.Linear(1, 1), seed, {"optimizer": optimizer, "epoch": seed}],
        "pair": (scheduler, seed),
        "ordered": collections.OrderedDict(bare=nn.Linear(1, 1), value=seed),
        "loaders": {"train": loader},
        "plain": {"a": [seed]},
    }


def _leaves(value: Any) -> list[Any]:
    if isinstance(value, torch.utils.data.DataLoader):
        return []  # where it is shows in what it gives next
    if callable(getattr(value, "state_dict", None)):
        return [repr(value.state_dict())]
    if isinstance(value, Mapping):
        return [leaf for one in value.values() for leaf in _leaves(one)]
    return [leaf for one in value for leaf in _leaves(one)] if isinstance(value, list | tuple) else [value]


def _objects(value: Any) -> list[int]:
    if callable(getattr(value, "state_dict", None)):
        return [id(value)]
    if isinstance(value, Mapping):
        return [one for part in value.values() for one in _objects(part)]
    return [one for part in value for one in _objects(part)] if isinstance(value, list | tuple) else []


@pytest.mark.parametrize("form", ["single_file", "distributed"])
def test_nested_objects_come_back_in_place(form: str, tmp_path: Path) -> None:
    """Models, optimizers, schedulers and loaders in lists, tuples and dicts keep their identity and get the state."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        saved, state = _things(fabric, 1), _things(fabric, 2)
        fabric.save(tmp_path / "state", saved, format=form)
        before, inner = _objects(state), state["list"]
        assert fabric.load(tmp_path / "state", state) == {}
        assert _leaves(state) == _leaves(saved)
        assert _objects(state) == before
        assert state["list"] is inner
        assert len(list(state["loaders"]["train"])) == 6, "it goes on after two of eight batches"


def test_what_a_nested_state_lacks_is_named(tmp_path: Path) -> None:
    """Deep entries and lengths of lists count, too; then nothing has changed."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.save(tmp_path / "state", {"a": {"model": nn.Linear(1, 1)}, "b": [nn.Linear(1, 1)]})
        model = nn.Linear(1, 1)
        before = model.weight.item()
        for state in ({"a": {"model": model, "more": nn.Linear(1, 1)}}, {"a": {"model": model}, "b": [model, model]}):
            with pytest.raises(CheckpointKeyError, match=r"has no 'a'\['more'\]|has no 'b' with 2 elements"):
                fabric.load(tmp_path / "state", state)
        assert model.weight.item() == before


@pytest.mark.parametrize(
    ("state", "filters", "said"),
    [
        ({"model": 1}, {"modle": bool}, "'modle', which the state doesn't have"),
        ({"model": {"a": 1}}, {"model": 3}, "can't be called"),
        ({"epoch": 3}, {"epoch": lambda _key, _value: True}, "no named entries"),
        ({"fabric.about": 3}, {}, "reserved"),
        ([1], {}, "is a dict"),
    ],
)
def test_what_cannot_be_meant_is_refused(state: Any, filters: Any, said: str, tmp_path: Path) -> None:
    """An unknown name in a filter, a filter that is no function or has nothing to filter, a reserved name, a list."""
    with Fabric(accelerator="cpu", devices=1) as fabric, pytest.raises(CheckpointError, match=said):
        fabric.save(tmp_path / "state", state, filter=filters)
    assert not (tmp_path / "state").exists()


def test_a_filter_works_on_models_and_plain_values(tmp_path: Path) -> None:
    """What a filter doesn't want isn't saved, of a plain dict as of a model."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        state = {"model": nn.Linear(1, 1), "meta": {"keep": 1, "drop": 2}}
        want = {"model": lambda key, _: key == "bias", "meta": lambda key, value: key == "keep" and value == 1}
        fabric.save(tmp_path / "state", state, filter=want)
        back = fabric.load(tmp_path / "state")
    assert list(back["model"]) == ["bias"]
    assert back["meta"] == {"keep": 1}


class _Average:
    """A moving average of a model's parameters, sharded as they are."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        self.shadow = {name: one.detach() * factor for name, one in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow, "deep": [self.shadow["weight"]]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, one in state["shadow"].items():
            self.shadow[name].copy_(one)


def _average(path: Path, form: str) -> Any:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        torch.manual_seed(0)
        model = fabric.setup(nn.Linear(4, 6))
        whole = fabric.strategy.module_state(model.module, True)
        average: Any = _Average(model.module, 3.0)
        fabric.save(path, {"model": model, "ema": average, "plain": average.shadow["bias"]}, format=form)
        other: Any = _Average(model.module, 0.0)
        fabric.load(path, {"model": model, "ema": other})
        same = all(
            torch.equal(one.full_tensor(), other.shadow[name].full_tensor()) for name, one in average.shadow.items()
        )
        return same, {name: (3.0 * one).tolist() for name, one in whole.items()}


@pytest.mark.parametrize("form", ["single_file", "distributed"])
def test_sharded_tensors_anywhere_are_saved_whole(form: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """An average under fsdp comes back on two ranks, and one process reads all of it."""
    got = two_ranks.run(_average, tmp_path / "state", form)
    assert [same for same, _ in got] == [True, True]
    with Fabric(accelerator="cpu", devices=1) as fabric:
        back = fabric.load(tmp_path / "state")
    assert {name: one.tolist() for name, one in back["ema"]["shadow"].items()} == got[0][1]
    assert back["ema"]["deep"][0].tolist() == got[0][1]["weight"]
    assert back["plain"].tolist() == got[0][1]["bias"]


def _meta(path: Path) -> None:
    with Fabric(accelerator="cpu", strategy="fsdp", devices=2) as fabric:
        fabric.launch()
        with fabric.init_module(empty_init=True):
            model = nn.Linear(4, 6)
        with pytest.raises(CheckpointError, match=r"fabric\.setup"):
            fabric.load(path, {"model": model})
        fabric.load_raw(path.with_name("bare"), model)


def test_a_model_without_memory_is_loaded_after_setup(two_ranks: RankPool, tmp_path: Path) -> None:
    """Both ``load`` and ``load_raw`` say so."""
    torch.save({"model": nn.Linear(4, 6).state_dict()}, tmp_path / "state")
    torch.save(nn.Linear(4, 6).state_dict(), tmp_path / "bare")
    with pytest.raises(RankRaised, match="made on the meta device"):
        two_ranks.run(_meta, tmp_path / "state")


class _Counter(Wrapper):
    """Counts, and saves its count."""

    count = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.count = state["count"]


@pytest.mark.parametrize("form", ["single_file", "distributed"])
def test_wrappers_states_travel_unasked(form: str, tmp_path: Path) -> None:
    """Two wrappers of one name keep apart."""
    counts = [_Counter(), _Counter()]
    counts[0].count, counts[1].count = 3, 4
    with Fabric(accelerator="cpu", devices=1, wrappers=counts) as fabric:
        fabric.save(tmp_path / "state", {"value": 1}, format=form)
    fresh = [_Counter(), _Counter()]
    with Fabric(accelerator="cpu", devices=1, wrappers=fresh) as fabric:
        fabric.load(tmp_path / "state", {"value": 0})
    assert [one.count for one in fresh] == [3, 4]


class _Refuses:
    def state_dict(self) -> dict[str, Any]:
        return {"a": 1}

    def load_state_dict(self, state: Any) -> None:
        raise ZeroDivisionError("not today")


class _Held:
    def __init__(self, value: int) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


def _own_values(path: Path) -> list[Any]:
    values: list[list[Any]] = [
        [7, torch.tensor(7)],
        [torch.tensor(1), torch.tensor(1.0)],
        [[1, 2], [1, 3]],
        [{"a": 1}, {"b": 1}],
        [torch.ones(2), torch.ones(2)],
    ]
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        state: dict[str, Any] = {f"{i}": _Held(pair[fabric.global_rank]) for i, pair in enumerate(values)}
        fabric.save(path, state)
        for one in state.values():
            one.value = None
        fabric.load(path, state)
        return [one.value for one in state.values()]


def test_each_rank_gets_its_own_values_back(two_ranks: RankPool, tmp_path: Path) -> None:
    """Where an object's state differs between the ranks, if only in its type; what is alike is saved once."""
    first, second = two_ranks.run(_own_values, tmp_path / "state")
    assert [type(one) for one in (first[0], second[0])] == [int, torch.Tensor]
    assert [one.dtype for one in (first[1], second[1])] == [torch.int64, torch.float32]
    assert (first[2:4], second[2:4]) == ([[1, 2], {"a": 1}], [[1, 3], {"b": 1}])
    with Fabric(accelerator="cpu", devices=1) as fabric:
        assert (
            fabric.load(tmp_path / "state")["4"]["value"].tolist() == first[4].tolist() == second[4].tolist() == [1, 1]
        )


@pytest.mark.parametrize("form", ["single_file", "distributed"])
def test_what_was_loaded_before_a_failure_goes_back(form: str, tmp_path: Path) -> None:
    """An object whose own code refuses: those before it, the optimizer and the model are as they were."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        saved = _things(fabric, 1)
        fabric.save(tmp_path / "state", {**saved, "held": _Held(1), "refuses": _Refuses()}, format=form)
        state = {**_things(fabric, 2), "held": _Held(2), "refuses": _Refuses()}
        before = _leaves(state)
        with pytest.raises(CheckpointError, match="ZeroDivisionError: not today"):
            fabric.load(tmp_path / "state", state)
        assert _leaves(state) == before


def _fails_on(rank: int, path: Path, what: str) -> Any:
    class Odd(_Held):
        def state_dict(self) -> dict[str, Any]:
            if what == "save" and fabric.global_rank == rank:
                raise ZeroDivisionError("odd")
            return super().state_dict()

        def load_state_dict(self, state: Any) -> None:
            super().load_state_dict(state)
            if what == "load" and fabric.global_rank == rank and state["value"] == 1:
                raise MemoryError

    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        odd, model = Odd(1), fabric.setup(nn.Linear(1, 1))
        try:
            fabric.save(path, {"odd": odd, "model": model})
            odd.value = 2
            fabric.load(path, {"odd": odd, "model": model})
        except CheckpointError as error:
            return str(error), odd.value
    return None


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["save", "load"])
def test_one_rank_fails_and_all_say_so(what: str, rank: int, two_ranks: RankPool, tmp_path: Path) -> None:
    """An error of any class on any rank is a ``CheckpointError`` on both; nobody waits, and nothing has changed."""
    got = two_ranks.run(_fails_on, rank, tmp_path / "state", what)
    name = {"save": "ZeroDivisionError", "load": "MemoryError"}[what]
    assert all(name in one[0] for one in got)
    assert f"on rank {rank}" in got[1 - rank][0]
    assert [one[1] for one in got] == ([1, 1] if what == "save" else [2, 2])


def _each_its_own(path: Path, form: str) -> Any:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        fabric.save(path, {"own": _Held(10 + fabric.global_rank)}, format=form)
        held = _Held(0)
        fabric.load(path, {"own": held})
        return held.value


@pytest.mark.parametrize("form", ["single_file", "distributed"])
def test_a_state_that_differs_by_rank_comes_back_to_its_rank(form: str, two_ranks: RankPool, tmp_path: Path) -> None:
    """Such as that of a random generator, or of a loader's workers."""
    assert two_ranks.run(_each_its_own, tmp_path / "state", form) == [10, 11]


def _other_tensors(path: Path) -> None:
    with Fabric(accelerator="cpu", strategy="ddp", devices=2) as fabric:
        fabric.launch()
        fabric.save(path, {"tensor": torch.ones(1 + fabric.global_rank)}, format="distributed")


def test_ranks_with_other_tensors_are_refused(two_ranks: RankPool, tmp_path: Path) -> None:
    """What only one rank has would be lost in a sharded checkpoint."""
    with pytest.raises(RankRaised, match="hold different tensors"):
        two_ranks.run(_other_tensors, tmp_path / "state")
