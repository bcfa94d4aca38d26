"""A small convolutional network for 8 x 8 images, with SGD or AdamW and optional cosine warm restarts."""

from typing import Literal

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts
from typing_extensions import override


class DigitsCNN(LightningModule):
    """Two convolutions and two linear layers; cross-entropy on ten digits.

    Args:
        width: Channels of the first convolution; the second has twice as many.
        batch_norm: Normalise after each convolution.
        dropout: Share of the features dropped before the last layer, from 0 to below 1.
        optimizer: ``"sgd"`` (with momentum) or ``"adamw"``.
        lr: Learning rate; with `restart_every` it is the peak that each restart comes back to.
        momentum: Momentum of SGD; AdamW does not use it.
        weight_decay: Weight decay of the optimizer.
        restart_every: Length of a cosine cycle in optimizer steps; None keeps the learning rate constant.
        restart_lr_min: Learning rate at the end of a cosine cycle.
    """

    def __init__(  # noqa: PLR0913 - hyper-parameters, each an option of the command line
        self,
        *,
        width: int = 16,
        batch_norm: bool = True,
        dropout: float = 0.0,
        optimizer: Literal["sgd", "adamw"] = "sgd",
        lr: float = 0.05,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        restart_every: int | None = None,
        restart_lr_min: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.optimizer = optimizer
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.restart_every = restart_every
        self.restart_lr_min = restart_lr_min
        self.net = nn.Sequential(
            *_convolution(1, width, batch_norm=batch_norm),
            *_convolution(width, 2 * width, batch_norm=batch_norm),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(2 * width * 4 * 4, 4 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(4 * width, 10),
        )

    @override
    def forward(self, images: Tensor) -> Tensor:
        """Return the logits, ``(B, 10)``, of images ``(B, 1, 8, 8)``."""
        logits: Tensor = self.net(images)
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch, a scalar."""
        images, labels = batch
        loss = functional.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean cross-entropy and the accuracy."""
        images, labels = batch
        logits = self(images)
        self.log("val_loss", functional.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True)

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, with its schedule stepped after every optimizer step."""
        optimizer = self._optimizer()
        if self.restart_every is None:
            return optimizer
        cosine = CosineAnnealingWarmRestarts(optimizer, T_0=self.restart_every, eta_min=self.restart_lr_min)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cosine, "interval": "step"}}

    def _optimizer(self) -> Optimizer:
        if self.optimizer == "adamw":
            return AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)
        return SGD(self.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)


def _convolution(inputs: int, outputs: int, *, batch_norm: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=not batch_norm)]
    if batch_norm:
        layers.append(nn.BatchNorm2d(outputs))
    return [*layers, nn.ReLU()]
