"""Train a small convolutional network on handwritten digits, on any hardware and strategy.

The data are the 1,797 real 8x8 images that ship with scikit-learn, so nothing is downloaded:

    python docs/examples/digits.py --strategy ddp --devices 2

Apart from the lines with `fabric` in them, this is plain PyTorch. What it writes goes to the folder
`--out`: a checkpoint, the metrics of each epoch, and a picture.
"""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from rich.progress import Progress
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fabric_core import Fabric

TEST_SHARE = 0.2
SPLIT_SEED = 0  # not the training seed: every run is judged by the same images
BATCH_SIZE = 64  # over all processes together, so that their number does not change the training
LEARNING_RATE = 4e-3  # at the start; it falls to zero in a straight line


class Digits(NamedTuple):
    """The data, split: images of shape (count, 1, 8, 8) in [0, 1], labels of shape (count,)."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Epoch(NamedTuple):
    """What one epoch came to: mean training loss, share of the test images recognised, loss scale."""

    epoch: int
    train_loss: float
    test_accuracy: float
    loss_scale: float = 1.0  # only 16-mixed has another


def load_data() -> Digits:
    """Read scikit-learn's digits and split them 80/20, the same way in every run."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test_count = round(TEST_SHARE * len(order))
    test, train = order[:test_count], order[test_count:]
    return Digits(images[train], labels[train], images[test], labels[test])


def build_model() -> nn.Module:
    """Make the classifier: (batch, 1, 8, 8) -> one logit per digit, (batch, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 32, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def build_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer of the model's parameters."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)


def count_correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Count the images that the model recognises, as a tensor of one integer."""
    model.eval()
    with torch.no_grad():
        logits: Tensor = model(images)
        return (logits.argmax(dim=1) == labels).sum()


def evaluate(fabric: Fabric, model: nn.Module, data: Digits) -> float:
    """Compute the exact share of the test images that the model recognises, on all processes.

    Process r of n takes the images r, r + n, r + 2n, ...: each image is counted exactly once, which
    a sampler that pads its shards to equal lengths would not do. Each process runs the model once,
    however many images it got, because a sharded model communicates while it runs.
    """
    shard = slice(fabric.global_rank, None, fabric.world_size)
    images = fabric.to_device(data.test_images[shard])
    labels = fabric.to_device(data.test_labels[shard])
    correct = fabric.all_reduce(count_correct(model, images, labels), reduce_op="sum")
    return int(correct) / len(data.test_labels)


def write_metrics(path: Path, history: Sequence[Epoch]) -> None:
    """Write one line per epoch as comma-separated values."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(Epoch._fields)
        writer.writerows(history)


def draw(path: Path, history: Sequence[Epoch], images: Tensor, labels: Tensor, predictions: Tensor) -> None:
    """Draw the learning curve, and beside it the images with what the model takes them for."""
    # Slow to import, and needed on one process only.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 5), layout="constrained")
    grid = figure.add_gridspec(1, 2, width_ratios=[5, 4])
    left, right = figure.add_subfigure(grid[0]), figure.add_subfigure(grid[1])

    epochs = [row.epoch for row in history]
    loss_axes = left.subplots()
    loss_axes.plot(epochs, [row.train_loss for row in history], "o-", color="tab:blue")
    loss_axes.set_ylim(bottom=0)
    loss_axes.set_xlabel("epoch")
    loss_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss_axes.set_ylabel("training loss", color="tab:blue")
    accuracy_axes = loss_axes.twinx()
    accuracies = [100 * row.test_accuracy for row in history]
    accuracy_axes.plot(epochs, accuracies, "s-", color="tab:orange")
    accuracy_axes.set_ylabel("test accuracy, %", color="tab:orange")
    left.suptitle(f"Learning curve: {accuracies[-1]:.2f} % at the end")

    for axes, image, label, prediction in zip(
        right.subplots(4, 4).flat, images, labels.tolist(), predictions.tolist(), strict=True
    ):
        axes.imshow(image[0].numpy(), cmap="gray_r")
        axes.set_axis_off()
        if prediction == label:
            axes.set_title(f"{prediction}", color="tab:green")
        else:
            axes.set_title(f"{prediction}, is {label}", color="tab:red")
    right.suptitle("Sixteen test images and what they are taken for")
    figure.savefig(path, dpi=120)


def train(fabric: Fabric, epochs: int, seed: int, out: Path) -> float:
    """Train, save, reload and draw; return the share of test images recognised at the end."""
    fabric.launch()
    fabric.print(fabric.plan)
    fabric.seed_everything(seed)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint, metrics, picture = out / "digits.ckpt", out / "metrics.csv", out / "digits.png"

    data = load_data()
    loader = fabric.setup_dataloaders(
        DataLoader(
            TensorDataset(data.train_images, data.train_labels),
            batch_size=max(1, BATCH_SIZE // fabric.world_size),
            shuffle=True,
        )
    )
    model = build_model()
    model, optimizer = fabric.setup(model, build_optimizer(model))

    history = []
    steps = epochs * len(loader)
    with Progress(disable=not fabric.is_global_zero, transient=True) as progress:
        bar = progress.add_task("training", total=steps)
        step = 0
        for epoch in range(1, epochs + 1):
            model.train()
            # Summed up on the device: reading a number in each step would wait for the device.
            loss_sum = torch.zeros((), device=fabric.device)
            for images, labels in loader:
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * (1 - step / steps)
                optimizer.zero_grad()
                loss = F.cross_entropy(model(images), labels)
                fabric.backward(loss)
                optimizer.step()
                loss_sum += loss.detach()
                step += 1
                progress.update(bar, completed=step)

            train_loss = fabric.all_reduce(loss_sum / len(loader), reduce_op="mean").item()
            accuracy = evaluate(fabric, model, data)
            loss_scale = fabric.precision.state_dict().get("scale", 1.0)
            history.append(Epoch(epoch, train_loss, accuracy, loss_scale))
            fabric.print(f"epoch {epoch:2}/{epochs}  loss {train_loss:.4f}  test accuracy {accuracy:7.2%}")

    # Every process calls save, load and the model: which of them writes, or holds which part of a
    # sharded model, is the strategy's business.
    fabric.save(checkpoint, {"model": model, "optimizer": optimizer, "epoch": epochs})
    reloaded = build_model()
    reloaded, reloaded_optimizer = fabric.setup(reloaded, build_optimizer(reloaded))
    state = {"model": reloaded, "optimizer": reloaded_optimizer, "epoch": 0}
    fabric.load(checkpoint, state)
    reloaded_accuracy = evaluate(fabric, reloaded, data)
    if (state["epoch"], reloaded_accuracy) != (epochs, accuracy):
        raise RuntimeError(
            f"{checkpoint}: what was reloaded is not what was saved. Saved: epoch {epochs}, test "
            f"accuracy {accuracy:.2%}. Reloaded: epoch {state['epoch']}, test accuracy "
            f"{reloaded_accuracy:.2%}."
        )

    images, labels = fabric.to_device((data.test_images[:16], data.test_labels[:16]))
    with torch.no_grad():
        predictions = reloaded(images).argmax(dim=1)
    if fabric.is_global_zero:
        write_metrics(metrics, history)
        draw(picture, history, images.cpu(), labels.cpu(), predictions.cpu())
    fabric.print(
        f"test accuracy {accuracy:.2%}, and again {reloaded_accuracy:.2%} when reloaded from the "
        f"checkpoint\ncheckpoint    {checkpoint}\nmetrics       {metrics}\npicture       {picture}"
    )
    return accuracy


def positive(text: str) -> int:
    """Read a positive whole number."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}; write a whole number from 1 on")
    return int(text)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--accelerator", default="auto", help="the hardware (default: the best)")
    parser.add_argument("--strategy", default="auto", help="how processes share the work")
    parser.add_argument("--devices", default="auto", help="how many, or which: 2, 0,1 or auto")
    parser.add_argument("--precision", default="32-true", help="32-true, bf16-mixed, ...")
    parser.add_argument("--epochs", type=positive, default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/digits"), help="folder to write to")
    arguments = parser.parse_args()
    fabric = Fabric(
        accelerator=arguments.accelerator,
        strategy=arguments.strategy,
        devices=arguments.devices,
        precision=arguments.precision,
    )
    train(fabric, epochs=arguments.epochs, seed=arguments.seed, out=arguments.out)


if __name__ == "__main__":
    main()
