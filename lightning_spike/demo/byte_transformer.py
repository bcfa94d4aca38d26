"""A small causal Transformer that predicts the next byte."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import AdamW
from typing_extensions import override

_BYTES = 256


class ByteTransformer(LightningModule):
    """Pre-norm Transformer over bytes, trained with AdamW at a constant learning rate.

    Args:
        context: Longest window, in bytes.
        dim: Width of the model; a multiple of `heads`.
        heads: Attention heads per layer.
        layers: Number of layers.
        dropout: Dropout in each layer, from 0 to below 1.
        lr: Learning rate.
        weight_decay: Weight decay of AdamW.
    """

    def __init__(
        self,
        *,
        context: int = 128,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
        lr: float = 2e-3,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.weight_decay = weight_decay
        self.embed = nn.Embedding(_BYTES, dim)
        self.position = nn.Parameter(0.02 * torch.randn(context, dim))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim, heads, 4 * dim, dropout=dropout, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, _BYTES)
        self.mask: Tensor
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context), persistent=False)

    @override
    def forward(self, window: Tensor) -> Tensor:
        """Return the logits of the next byte, ``(B, T, 256)``, for int64 bytes ``(B, T)``, T up to `context`."""
        length = window.shape[1]
        hidden = self.embed(window) + self.position[:length]
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask[:length, :length], is_causal=True)
        logits: Tensor = self.head(self.norm(hidden))
        return logits

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross-entropy in nats per byte, a scalar."""
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the mean cross-entropy in nats per byte."""
        self.log("val_loss", self._loss(batch), prog_bar=True)

    @override
    def configure_optimizers(self) -> AdamW:
        """Return AdamW over all parameters."""
        return AdamW(self.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def _loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        window, following = batch
        return functional.cross_entropy(self(window).flatten(0, 1), following.flatten())
