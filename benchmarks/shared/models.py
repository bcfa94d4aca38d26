"""Small real trainings that the benchmarks share.

Five nets on scikit-learn's digits and on the standard library's source text.
"""

import dataclasses
import functools
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

__all__ = ["MOMENTUM", "NETS", "ByteGRU", "ByteTransformer", "Net", "Task", "cnn", "dataset", "loader", "mlp"]

CONTEXT: Final = 16
WINDOWS: Final = 8192
MOMENTUM: Final = 0.9


class ByteGRU(nn.Module):
    """Predicts the next byte."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.body, self.head = nn.Embedding(128, 32), nn.GRU(32, 64, batch_first=True), nn.Linear(64, 128)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, shape `(batch, 128, time)`, of int64 tokens of shape `(batch, time)`."""
        scores: Tensor = self.head(self.body(self.bytes(tokens))[0])
        return scores.transpose(1, 2)


class ByteTransformer(nn.Module):
    """The same with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.head = nn.Embedding(128, 32), nn.Linear(32, 128)
        self.places = nn.Parameter(0.02 * torch.randn(CONTEXT, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """As `ByteGRU`."""
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        hidden = self.body(self.bytes(tokens) + self.places, mask=mask, is_causal=True)
        scores: Tensor = self.head(hidden)
        return scores.transpose(1, 2)


def mlp() -> nn.Module:
    """Two hidden layers on the digits."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def cnn() -> nn.Module:
    """A small convolutional network with BatchNorm and dropout on the digits."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(512, 10)
    )  # fmt: skip


def autoencoder() -> nn.Module:
    """Digits through eight numbers and back."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8), nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64)
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Net:
    """What is trained on what, and the rates at which it trains well, by optimizer."""

    make: Callable[[], nn.Module]
    data: str
    """`"digits"`, `"images"` (digits as their own targets) or `"bytes"`."""
    rates: Mapping[str, float]


NETS: Final[Mapping[str, Net]] = {
    "mlp": Net(make=mlp, data="digits", rates={"SGD": 0.05, "AdamW": 1e-3}),
    "cnn": Net(make=cnn, data="digits", rates={"SGD": 0.01, "AdamW": 2e-3}),
    "gru": Net(make=ByteGRU, data="bytes", rates={"SGD": 0.5, "AdamW": 4e-3}),
    "transformer": Net(make=ByteTransformer, data="bytes", rates={"SGD": 0.2, "AdamW": 2e-3}),
    "autoencoder": Net(make=autoencoder, data="images", rates={"SGD": 0.2, "AdamW": 2e-3}),
}


class Task(LightningModule):
    """One of the nets, with SGD or AdamW.

    Args:
        net: A key of `NETS`.
        optimizer: `"SGD"` or `"AdamW"`.
        batch_size: Rates are for 32; with smaller batches they go with the square root for AdamW and in proportion for
            SGD.
        faster: Factor on the rate.
        momentum: SGD's momentum, AdamW's first beta.
    """

    def __init__(
        self, net: str, optimizer: str, batch_size: int, faster: float = 1.0, momentum: float = MOMENTUM
    ) -> None:
        super().__init__()
        self.momentum = momentum
        self.net = NETS[net].make()
        self.kind, self.optimizer_name = NETS[net].data, optimizer
        scale = batch_size / 32
        self.rate = NETS[net].rates[optimizer] * (scale if optimizer == "SGD" else scale**0.5) * faster

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        out = self.net(x)
        return functional.mse_loss(out, y) if self.kind == "images" else functional.cross_entropy(out, y)

    @override
    def configure_optimizers(self) -> Any:
        if self.optimizer_name == "SGD":
            return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=self.momentum)
        return torch.optim.AdamW(self.parameters(), lr=self.rate, betas=(self.momentum, 0.999))


@functools.cache
def dataset(kind: str, seed: int) -> TensorDataset:
    """`"digits"`, `"images"` (digits as their own targets) or `"bytes"` (windows of source text drawn from `seed`)."""
    if kind == "bytes":
        source = Path(next(p for p in Path(zipfile.__file__).parents if p.name.startswith("python")))
        text = b"".join((source / name).read_bytes() for name in ("argparse.py", "ast.py", "inspect.py", "typing.py"))
        tokens = torch.tensor(list(text), dtype=torch.long).clamp(max=127)
        starts = torch.randint(len(tokens) - CONTEXT - 1, (WINDOWS,), generator=torch.Generator().manual_seed(seed))
        windows = tokens[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
        return TensorDataset(windows[:, :-1].contiguous(), windows[:, 1:].contiguous())
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    return TensorDataset(images, images.flatten(1) if kind == "images" else torch.tensor(digits.target))


def loader(net: str, batch_size: int, seed: int) -> DataLoader[Any]:
    """The net's data, shuffled from `seed`; the short last batch left out."""
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset(NETS[net].data, seed), batch_size=batch_size, shuffle=True, generator=generator, drop_last=True
    )
