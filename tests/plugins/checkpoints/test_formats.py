"""Which format is written, what it holds, and where it may lie."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fabric_core import Fabric
from fabric_core.contracts import ABOUT
from fabric_core.errors import CheckpointError, NoCheckpointError
from fabric_plugins.checkpoints import DistributedCheckpoint, SafetensorsCheckpoint, SingleFileCheckpoint


def _linear(value: float = 1.0) -> nn.Linear:
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(value)
    return model


def test_the_format_is_chosen_by_name_by_ending_or_by_the_strategy(tmp_path: Path) -> None:
    """And read back by what lies there."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.save(tmp_path / "a", {"model": _linear()})
        fabric.save(tmp_path / "b", {"model": _linear()}, format="distributed")
        fabric.save(tmp_path / "c.safetensors", {"model": _linear()})
        with pytest.raises(CheckpointError, match=r"no such checkpoint format[\s\S]*'distributed'"):
            fabric.save(tmp_path / "d", {"model": _linear()}, format="zip")
        kinds = (SingleFileCheckpoint(), DistributedCheckpoint(), SafetensorsCheckpoint())
        for name, kind in zip(("a", "b", "c.safetensors"), kinds, strict=True):
            assert [one.recognises(tmp_path / name) for one in kinds] == [one is kind for one in kinds]
            model = _linear(0.0)
            fabric.load(tmp_path / name, {"model": model})
            assert model.weight.eq(1).all()
            about = kind.describe(tmp_path / name)[ABOUT]
            assert about["world_size"] == 1
            assert about["versions"]["torch"] == torch.__version__
            assert {choice["kind"] for choice in about["plan"]["choices"]} >= {"accelerator", "strategy", "precision"}
    assert torch.load(tmp_path / "a", weights_only=True).keys() == {"model"}


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("form", ["single_file", "distributed", "safetensors"])
def test_views_that_change_what_is_read_come_back(form: str, asynchronous: bool, tmp_path: Path) -> None:
    """Conjugated and negated views, whose bytes are those of what they show, transposed and expanded ones."""
    views = {
        "conjugated": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "negated": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "negated whole": torch._neg_view(torch.arange(3.0)),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "expanded": torch.ones(1).expand(4),
    }
    with Fabric(accelerator="cpu", devices=1) as fabric:
        handle = fabric.save(tmp_path / "state", {"views": views}, format=form, asynchronous=asynchronous)
        if handle is not None:
            handle.result()
        back = fabric.load(tmp_path / "state")["views"]
    for name, view in views.items():
        torch.testing.assert_close(back[name], view.resolve_conj().resolve_neg(), rtol=0, atol=0)


def test_without_the_checksums_of_pytorch(tmp_path: Path) -> None:
    """Told to leave them out, a single file is refused rather than unreadable; what others wrote so is read."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        torch.serialization.set_crc32_options(False)
        try:
            torch.save({"model": _linear(5.0).state_dict()}, tmp_path / "theirs")
            with pytest.raises(CheckpointError, match=r"without checksums[\s\S]*set_crc32_options\(True\)"):
                fabric.save(tmp_path / "ours", {"model": _linear()})
            fabric.save(tmp_path / "folder", {"model": _linear(6.0)}, format="distributed")
        finally:
            torch.serialization.set_crc32_options(True)
        model = _linear(0.0)
        for name, value in (("theirs", 5), ("folder", 6)):
            fabric.load(tmp_path / name, {"model": model})
            assert model.weight.eq(value).all()
        assert not (tmp_path / "ours").exists()


def test_safetensors_has_the_models_own_names(tmp_path: Path) -> None:
    """As Hugging Face reads them, tied weights too; several models go under theirs."""
    model = nn.Sequential(_linear(2.0), nn.ReLU())
    model.append(model[0])
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.save(tmp_path / "one.safetensors", {"model": model})
        fabric.save(tmp_path / "two.safetensors", {"model": _linear(3.0), "ema": _linear(4.0)})
        state = {"model": _linear(0.0), "ema": _linear(0.0)}
        fabric.load(tmp_path / "two.safetensors", state)
        assert state["ema"].weight.eq(4).all()
    assert set(load_file(tmp_path / "one.safetensors")) == set(model.state_dict())
    assert set(load_file(tmp_path / "two.safetensors")) == {"model.weight", "model.bias", "ema.weight", "ema.bias"}


def test_safetensors_refuses_what_it_cannot_hold(tmp_path: Path) -> None:
    """Plain values and optimizers, by name."""
    model = _linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        for more in ({"epoch": 1}, {"optimizer": optimizer}, {"list": [torch.ones(1)]}):
            with pytest.raises(CheckpointError, match=f"entry '{next(iter(more))}'"):
                fabric.save(tmp_path / "a.safetensors", {"model": model, **more})
    assert list(tmp_path.iterdir()) == []


def test_transformers_reads_the_parts(tmp_path: Path) -> None:
    """A model of Hugging Face, saved in parts, comes back by ``from_pretrained``; one saved by it, by ``load_raw``."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=32, n_positions=8)
    model = GPT2LMHeadModel(config)
    SafetensorsCheckpoint(max_shard_size=2000).write(tmp_path / "ours", {"model": model.state_dict()})
    assert (tmp_path / "ours" / "model.safetensors.index.json").exists()
    config.save_pretrained(tmp_path / "ours")
    model.train(False)
    tokens = torch.arange(8)[None]
    again = GPT2LMHeadModel.from_pretrained(tmp_path / "ours").train(False)
    torch.testing.assert_close(again(tokens).logits, model(tokens).logits)
    model.save_pretrained(tmp_path / "theirs")
    other = GPT2LMHeadModel(config).train(False)
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.load_raw(tmp_path / "theirs", other, strict=False)
    torch.testing.assert_close(other(tokens).logits, model(tokens).logits)


def test_the_newest_stay(tmp_path: Path) -> None:
    """``keep`` counts those whose names differ in numbers alone; everything else stays."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        fabric.save(tmp_path / "other-1", {"value": 0})
        (tmp_path / "step-0").write_text("no checkpoint")
        for step in (8, 9, 10, 11):
            form = "distributed" if step % 2 else "single_file"
            fabric.save(tmp_path / f"step-{step}", {"value": step}, keep=2, format=form)
        assert sorted(one.name for one in tmp_path.iterdir()) == ["other-1", "step-0", "step-10", "step-11"]
        assert fabric.load(tmp_path / "latest") == {"value": 11}
        for keep, path in ((0, "step-1"), (True, "step-1"), (2, "step")):
            with pytest.raises(CheckpointError, match=r"keep|number"):
                fabric.save(tmp_path / path, {"value": 1}, keep=keep)
        with pytest.raises(NoCheckpointError, match="no checkpoint in the folder"):
            fabric.load(tmp_path / "nowhere" / "latest")


def test_the_best_stay(tmp_path: Path) -> None:
    """With a score, the lowest ones and the one that was just saved."""
    with Fabric(accelerator="cpu", devices=1) as fabric:
        for step, score in enumerate([0.5, 0.1, 0.9, 0.3]):
            fabric.save(tmp_path / f"step-{step}", {"value": step}, keep=2, score=score)
        assert sorted(one.name for one in tmp_path.iterdir()) == ["step-1", "step-3"]
