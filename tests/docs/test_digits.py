"""The parts of docs/examples/digits.py, in plain PyTorch and one process.

tests/distributed/test_digits.py runs the script itself.
"""

import argparse
import csv
import importlib.util
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "docs" / "examples" / "digits.py"


@pytest.fixture(scope="module")
def digits() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_split_is_fixed_and_exact(digits: ModuleType) -> None:
    """A fifth of the images is for testing, the same ones whatever the seed, and none is in both."""
    torch.manual_seed(1)
    data = digits.load_data()
    torch.manual_seed(2)
    again = digits.load_data()
    assert all(torch.equal(one, other) for one, other in zip(data, again, strict=True))
    assert (len(data.train_images), len(data.test_images)) == (1438, 359)
    assert data.test_images.shape == (359, 1, 8, 8)
    assert (data.train_images.min(), data.train_images.max()) == (0, 1)
    assert set(data.test_labels.tolist()) == set(range(10))
    everything = digits.load_digits().images.reshape(-1, 64) / 16
    split = torch.cat([data.train_images, data.test_images]).reshape(-1, 64)
    expected = sorted(map(tuple, everything.tolist()))
    assert sorted(map(tuple, split.double().tolist())) == expected


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 360])
def test_evaluation_counts_each_image_once(digits: ModuleType, world_size: int) -> None:
    """Over any number of processes the counts add up to those of one process."""
    torch.manual_seed(0)
    model, data = digits.build_model(), digits.load_data()
    shares = [
        digits.evaluate(
            SimpleNamespace(
                global_rank=rank,
                world_size=world_size,
                to_device=lambda tensor: tensor,
                all_reduce=lambda tensor, reduce_op: tensor,  # noqa: ARG005 as Fabric.all_reduce
            ),
            model,
            data,
        )
        for rank in range(world_size)
    ]
    correct = digits.count_correct(model, data.test_images, data.test_labels)
    assert sum(round(share * 359) for share in shares) == correct.item()


def test_the_metrics_are_one_line_per_epoch(digits: ModuleType, tmp_path: Path) -> None:
    """The metrics file reads back as what was written."""
    history = [digits.Epoch(1, 2.5, 0.5), digits.Epoch(2, 0.25, 0.97)]
    digits.write_metrics(tmp_path / "metrics.csv", history)
    with (tmp_path / "metrics.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [digits.Epoch(int(r["epoch"]), float(r["train_loss"]), float(r["test_accuracy"])) for r in rows] == history


def test_the_picture_is_drawn_after_a_single_epoch(digits: ModuleType, tmp_path: Path) -> None:
    """The shortest training gives a picture too, right and wrong predictions included."""
    data = digits.load_data()
    predictions = data.test_labels[:16].clone()
    predictions[3] += 1
    digits.draw(
        tmp_path / "digits.png",
        [digits.Epoch(1, 2.5, 0.9375)],
        data.test_images[:16],
        data.test_labels[:16],
        predictions,
    )
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["0", "-1", "two", ""])
def test_a_number_of_epochs_is_positive(digits: ModuleType, text: str) -> None:
    """A number of epochs that trains nothing is refused with what to write."""
    with pytest.raises(argparse.ArgumentTypeError, match="write a whole number from 1 on"):
        digits.positive(text)
