# mypy: ignore-errors
"""A trainer class with callbacks and loggers: ``python trainer.py FOLDER DEVICES``.

Written as for Lightning Fabric; ``switch.py`` says which library it runs on.
"""

import sys
from pathlib import Path

import torch
from switch import (
    AttributeDict,
    CSVLogger,
    Fabric,
    move_data_to_device,
    seed_everything,
    suggested_max_num_workers,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler


class Trainer:
    """Fits models that say what to do in a step."""

    def __init__(self, max_epochs, accumulate=1, clip=None, **fabric):
        self.fabric = Fabric(**fabric)
        self.max_epochs, self.accumulate, self.clip = max_epochs, accumulate, clip
        self.epoch = self.step = 0
        self.should_stop = False

    def fit(self, model, loader, checkpoint=None):
        fabric = self.fabric
        fabric.launch()
        fabric.seed_everything(3, workers=True)
        fabric.call("on_fit_start", trainer=self, model=model)
        optimizer, schedule = model.configure()
        model, optimizer = fabric.setup(model, optimizer)
        loader = fabric.setup_dataloaders(loader, use_distributed_sampler=True)
        state = AttributeDict(model=model, optimizer=optimizer, schedule=schedule, trainer_epoch=0)
        if checkpoint is not None:
            self.epoch = fabric.load(checkpoint, state).get("unused", 0) + state.trainer_epoch
        while self.epoch < self.max_epochs and not self.should_stop:
            for index, batch in enumerate(loader):
                fabric.call("on_batch_start", batch, index)
                updating = (index + 1) % self.accumulate == 0
                with fabric.no_backward_sync(model, enabled=not updating):
                    loss = model.training_step(batch, index)
                    fabric.backward(loss)
                if updating:
                    if self.clip:
                        fabric.clip_gradients(model, optimizer, clip_val=self.clip)
                    optimizer.step()
                    optimizer.zero_grad()
                    self.step += 1
                fabric.call("on_batch_end", loss=loss.detach(), step=self.step, trainer=self)
            schedule.step()
            self.epoch += 1
            state.trainer_epoch = self.epoch
            fabric.call("on_epoch_end", trainer=self, epoch=self.epoch, state=state)
        fabric.call("on_fit_end")
        return model


class Model(nn.Module):
    """Tells classes of points apart."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x):
        return self.layers(x)

    def training_step(self, batch, _index):
        x, y = batch
        return F.cross_entropy(self(x), y)

    def configure(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.8)


class Printing:
    """Says what happens."""

    def on_fit_start(self, trainer):
        trainer.fabric.print(f"on {trainer.fabric.world_size}, {trainer.fabric.device}")

    def on_batch_end(self, loss, step, trainer):
        value = trainer.fabric.all_reduce(loss)
        trainer.fabric.log("loss", value, step)
        trainer.fabric.print(f"step {step} loss {value.item():.6f}")


class Saving:
    """Saves after each epoch, and stops after the third."""

    def __init__(self, folder):
        self.folder = folder

    def on_epoch_end(self, trainer, epoch, state):
        trainer.fabric.save(self.folder / f"{epoch}.ckpt", state)
        trainer.should_stop = epoch >= 3

    def on_fit_end(self):
        pass


def data():
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return TensorDataset(x, y)


def main():
    folder, devices = Path(sys.argv[1]), int(sys.argv[2])
    assert suggested_max_num_workers(1) >= 1
    seed_everything(2, verbose=False)
    given = {"accelerator": "cpu", "devices": devices, "strategy": "ddp" if devices > 1 else "auto"}
    loader = DataLoader(data(), batch_size=10 // devices)
    callbacks = [Printing(), Saving(folder)]
    trainer = Trainer(5, accumulate=2, clip=0.1, callbacks=callbacks, loggers=CSVLogger(folder, name="fit"), **given)
    model = trainer.fit(Model(), loader)
    trainer.fabric.barrier()
    fabric = trainer.fabric
    fabric.print(f"stopped after {trainer.epoch} epochs and {trainer.step} steps")
    again = Trainer(4, callbacks=[Printing()], **given)
    again.fit(Model(), loader, checkpoint=folder / "2.ckpt")
    weighted = WeightedRandomSampler([1.0] * 60, 20)
    count = sum(len(x) for x, _ in again.fabric.setup_dataloaders(DataLoader(data(), sampler=weighted, batch_size=5)))
    fabric.print(f"{count} of a weighted sampler")
    x, _ = move_data_to_device(data()[:3], fabric.device)
    fabric.print(model(x).shape)


if __name__ == "__main__":
    main()
