"""The example of the documentation learns as well in mixed precision as in full precision."""

import csv
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fabric_core import Fabric

SCRIPT = Path(__file__).parents[3] / "docs" / "examples" / "digits.py"
EPOCHS = 5


def train(precision: str, out: Path) -> tuple[float, list[float]]:
    """Run the example; give its accuracy in percent, and the loss scale after each epoch."""
    spec = importlib.util.spec_from_file_location("digits", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    with Fabric(accelerator="cpu", devices=1, precision=precision) as fabric:
        accuracy = digits.train(fabric, epochs=EPOCHS, seed=1, out=out)
    with (out / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return 100 * accuracy, [float(row["loss_scale"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So small a model is not faster on several threads, and far slower where others need the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The accuracy in 32 bits, in percent."""
    accuracy, scales = train("32-true", tmp_path_factory.mktemp("full"))
    assert scales == [1.0] * EPOCHS
    return accuracy


@pytest.mark.slow
@pytest.mark.sampled(0.5)
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed:init_scale=131072"])
def test_mixed_precision_learns_the_digits(precision: str, full: float, tmp_path: Path) -> None:
    """The accuracy is within a point of that in 32 bits; the metrics hold the scale, halved after overflows."""
    accuracy, scales = train(precision, tmp_path)
    assert full > 95
    assert abs(accuracy - full) <= 1
    if precision.startswith("16-mixed"):
        assert all(1.0 < scale < 2.0**17 for scale in scales)
    else:
        assert scales == [1.0] * EPOCHS
