"""A dozen module shapes, each with another way to notice that its training step has been run once more."""

import collections
import random

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

FEATURES, CLASSES = 6, 3


class Plain(LightningModule):
    """An MLP; the shapes below change one thing about it."""

    def __init__(self):
        super().__init__()
        self.net = self.make()

    def make(self):
        return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def training_step(self, batch, batch_idx):
        x, y = batch
        return functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return [optimizer], [
            {"scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20), "interval": "step"}
        ]

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(40, FEATURES, generator=generator)
        y = torch.randint(CLASSES, (40,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


class NormAndDropout(Plain):
    def make(self):
        return nn.Sequential(
            nn.Linear(FEATURES, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)
        )


class Counters(Plain):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.memo = {"by_class": collections.Counter(), "last": {"loss": None}}

    def training_step(self, batch, batch_idx):
        self.calls += 1
        self.seen += len(batch[0])
        self.memo["by_class"].update(batch[1].tolist())
        loss = super().training_step(batch, batch_idx) * (1 + 0.01 * self.calls)
        self.memo["last"]["loss"] = loss.item()
        return loss + 0 * self.seen


class GrowingLists(Plain):
    def __init__(self):
        super().__init__()
        self.outputs, self.recent, self.names = [], collections.deque(maxlen=3), set()
        self.array = np.zeros(4)

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss.detach())
        self.recent.append(loss.detach())
        self.names.add(len(self.outputs))
        self.array[len(self.outputs) % 4] += 1
        return loss + 0.01 * len(self.outputs) + 0.01 * float(self.array.sum())


class Metrics(Plain):
    def __init__(self):
        super().__init__()
        self.mean = MeanMetric()
        self.scores = MetricCollection([MulticlassAccuracy(CLASSES), MulticlassF1Score(CLASSES)])

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self.net(x)
        loss = functional.cross_entropy(logits, y)
        self.mean(loss.detach())
        self.scores.update(logits, y)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict(self.scores, on_step=False, on_epoch=True)
        return loss


class LogsEverything(Plain):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, prog_bar=True, on_step=True, on_epoch=True)
        self.log_dict({"twice": 2 * loss, "thrice": 3 * loss}, on_epoch=True)
        self.logger.log_metrics({"by_hand": loss.item()}, step=self.global_step)
        return loss


class Randomness(Plain):
    def __init__(self):
        super().__init__()
        self.own = torch.Generator().manual_seed(0)
        self.numbers = np.random.default_rng(0)

    def training_step(self, batch, batch_idx):
        x, y = batch
        noise = torch.randn_like(x) + torch.randn(x.shape, generator=self.own)
        # as users do
        scale = random.random() + float(np.random.rand()) + float(self.numbers.random())  # noqa: NPY002, S311
        return functional.cross_entropy(self.net(x + 0.1 * noise), y) * (1 + 0.1 * scale)


class Recurrent(Plain):
    def __init__(self):
        super().__init__()
        self.gru, self.hidden = nn.GRU(FEATURES, 8, batch_first=True), None
        self.head = nn.Linear(8, CLASSES)

    def training_step(self, batch, batch_idx):
        x, y = batch
        output, hidden = self.gru(x.unsqueeze(1).expand(-1, 4, -1), self.hidden)
        self.hidden = hidden.detach()
        return functional.cross_entropy(self.head(output[:, -1]), y)


class Transformer(Plain):
    def make(self):
        layer = nn.TransformerEncoderLayer(FEATURES, 2, 12, dropout=0.1, batch_first=True)
        return nn.Sequential(
            nn.Unflatten(1, (1, FEATURES)), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(FEATURES, CLASSES)
        )


class ChangesModesAndGraph(Plain):
    def training_step(self, batch, batch_idx):
        self.net[0].weight.requires_grad_(not self.net[0].weight.requires_grad)
        self.net[2].train(not self.net[2].training)
        self.net.register_buffer(f"extra_{len(list(self.buffers()))}", torch.ones(1))
        batch[0].mul_(1.01)
        if self.net[2].weight.grad is not None:
            self.net[2].weight.grad.add_(1)
        return super().training_step(batch, batch_idx) + 0.01 * sum(b.sum() for b in self.buffers())


class StepsSomethingElse(Plain):
    """Automatic optimisation, with a network of its own that it trains on the side."""

    def __init__(self):
        super().__init__()
        side = nn.Linear(FEATURES, CLASSES)
        self.side = [side, torch.optim.Adam(side.parameters(), lr=0.1)]

    def training_step(self, batch, batch_idx):
        net, optimizer = self.side
        optimizer.zero_grad()
        functional.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()
        self.trainer.optimizers[0].param_groups[0]["weight_decay"] *= 1.1
        self.trainer.should_stop = self.trainer.should_stop or self.trainer.global_step > 100
        return super().training_step(batch, batch_idx) + functional.mse_loss(self.net(batch[0]), net(batch[0]).detach())


class Ema(Plain):
    """Keeps a moving average of its weights behind a slot and a plain object."""

    class Average:
        __slots__ = ("count", "weights")

        def __init__(self, weights):
            self.count, self.weights = 0, weights

    def __init__(self):
        super().__init__()
        self.average = self.Average([p.detach().clone() for p in self.net.parameters()])

    def training_step(self, batch, batch_idx):
        self.average.count += 1
        for mean, p in zip(self.average.weights, self.net.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.1)
        self.average.weights[0] = self.average.weights[0] * 1.0
        return super().training_step(batch, batch_idx) + sum((m * m).sum() for m in self.average.weights) * 0.01


SHAPES = [
    Plain,
    NormAndDropout,
    Counters,
    GrowingLists,
    Metrics,
    LogsEverything,
    Randomness,
    Recurrent,
    Transformer,
    ChangesModesAndGraph,
    StepsSomethingElse,
    Ema,
]
