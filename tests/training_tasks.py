"""Small real trainings that many tests share.

Digits from scikit-learn, written as a user would write them, with nothing of ours in them.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from torch.utils.data import DataLoader, TensorDataset


def digits(count: int = 512) -> TensorDataset:
    data = load_digits()
    images = torch.tensor(data.images[:count], dtype=torch.float32).unsqueeze(1) / 16
    return TensorDataset(images, torch.tensor(data.target[:count]))


def spoilt_digits(count: int = 1024) -> TensorDataset:
    """The digits with one image blown up.

    Once an epoch its batch is extreme, so episodes, dumps and replays really happen.
    """
    dataset = digits(count)
    dataset.tensors[0][200] *= 500
    return dataset


class Digits(LightningModule):
    """CNN with BatchNorm and dropout."""

    burst: int | None = None
    """A step whose loss is a thousand times too large, as from a sample weight gone wrong."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(512, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        if self.global_step == self.burst:
            loss = loss * 1000
        self.log("train_loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class DigitsTransformer(Digits):
    """The rows of an image as a sequence of eight tokens."""

    def __init__(self, lr: float = 0.002) -> None:
        super().__init__(lr)
        self.embed = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.encoder(self.embed(x.squeeze(1))))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class TwoByHand(LightningModule):
    """Manual optimisation: an encoder and a classifier with an optimizer each, and a loss each."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh())
        self.decoder = nn.Linear(16, 64)
        self.head = nn.Linear(16, 10)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        x, y = batch
        first, second = self.optimizers()
        code = self.encoder(x)
        first.zero_grad()
        self.manual_backward(F.mse_loss(self.decoder(code), x.flatten(1)))
        self.clip_gradients(first, gradient_clip_val=1.0)
        first.step()
        second.zero_grad()
        self.manual_backward(F.cross_entropy(self.head(self.encoder(x).detach()), y))
        second.step()

    def configure_optimizers(self) -> Any:
        body = [*self.encoder.parameters(), *self.decoder.parameters()]
        return [torch.optim.Adam(body, lr=0.003), torch.optim.SGD(self.head.parameters(), lr=0.1)]


TASKS: dict[str, tuple[Callable[[], LightningModule], dict[str, Any]]] = {
    "cnn": (Digits, {}),
    "transformer": (DigitsTransformer, {"gradient_clip_val": 1.0}),
    "accumulation": (
        Digits,
        {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
    ),
    "two_by_hand": (TwoByHand, {}),
}
"""Name → (module, further arguments of the Trainer)."""


def train(
    module: LightningModule,
    callbacks: list[Callback],
    root: Path,
    *,
    dataset: TensorDataset | None = None,
    batch_size: int = 16,
    validate: bool = False,
    **trainer: Any,
) -> Trainer:
    """Train as a user would, on one core.

    What the tests are not about (logger, bar, checkpoints) is off unless asked for.
    """
    dataset = dataset or digits()
    options = {
        "max_epochs": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": root,
    }
    fit = Trainer(**(options | trainer), callbacks=callbacks)
    generator = torch.Generator().manual_seed(3)
    loaders = [DataLoader(dataset, batch_size=batch_size, shuffle=True, generator=generator)]
    if validate:
        loaders.append(DataLoader(dataset, batch_size=64))
    fit.fit(module, *loaders)
    return fit


def build(task: str, seed: int = 0) -> tuple[LightningModule, dict[str, Any]]:
    """A task's module with weights from `seed`, and its Trainer arguments.

    The global generators stand at `seed` afterwards.
    """
    seed_everything(seed, verbose=False)
    make, options = TASKS[task]
    module = make()
    seed_everything(seed, verbose=False)
    return module, dict(options)
