"""The trainings of the diagnosis benchmark.

Images, text, a table, sequences, batches that nest, patches of photographs, the origins of source text, colours, and
tags; real data that other packages bundle.

The causes were written with the first seven before their authors' eyes; "colours" and "tags" were added when they
stood, so that there are two tasks that nobody had looked at.
"""

import argparse
import ast
import dataclasses
import functools
import inspect
import io
import keyword
import math
import tokenize
import typing
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeAlias

import torch
from lightning.pytorch import LightningModule
from shared.models import ByteTransformer, cnn
from shared.models import dataset as bundled
from sklearn.datasets import load_breast_cancer, load_digits, load_sample_images
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from typing_extensions import override

__all__ = ["ADAPTIVE", "NO_HALF", "REGRESSION", "TASKS", "TOKENS", "WEIGHTED", "Kind", "Module", "loaders"]

Batch: TypeAlias = Any
"""A batch or a sample of any structure."""
PIXELS: Final = 24
"""Length of a stretch of an image's row that the recurrent network reads."""
PACKAGES: Final = ("asyncio", "email", "json", "logging", "multiprocessing", "unittest", "urllib", "xml")
STRETCH: Final = 64
"""Bytes of a stretch of a package's source text."""
LINE: Final = 40
"""Characters of a stretch of source text that is tagged."""
SORTS: Final[Mapping[int, int]] = {
    tokenize.NAME: 1,
    tokenize.NUMBER: 3,
    tokenize.STRING: 4,
    tokenize.COMMENT: 5,
    tokenize.OP: 6,
}
"""What a character of source text belongs to, by the kind of its token; 2 is a keyword, 0 all else."""
SIDE: Final = 12
"""Pixels of the side of a square that is coloured."""
HELD: Final = 128
"""Samples kept for the validation."""


class Scanlines(nn.Module):
    """Predicts the next pixel of an image's row from those before it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(3, 32, batch_first=True), nn.Linear(32, 3)

    @override
    def forward(self, row: Tensor) -> Tensor:
        """Float32 of shape `(batch, time, 3)` to the same of the next pixels."""
        out: Tensor = self.head(self.body(row)[0])
        return out


class TwoViews(nn.Module):
    """An image and its two profiles, each through a tower of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.LayerNorm(48), nn.Tanh())
        self.profile = nn.Sequential(nn.Linear(16, 24), nn.Tanh())
        self.head = nn.Sequential(nn.Linear(72, 48), nn.Tanh(), nn.Linear(48, 10))

    @override
    def forward(self, views: Mapping[str, Tensor]) -> Tensor:
        """Logits, shape `(batch, 10)`."""
        out: Tensor = self.head(torch.cat([self.image(views["image"]), self.profile(views["profile"])], dim=1))
        return out


class Origin(nn.Module):
    """Tells which package a stretch of source text is from, by what convolutions find in it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.head = nn.Embedding(128, 16), nn.Linear(48, len(PACKAGES))
        self.body = nn.Sequential(
            nn.Conv1d(16, 32, 5, padding=2), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv1d(32, 48, 5, padding=2), nn.ReLU()
        )

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, shape `(batch, packages)`, of int64 tokens of shape `(batch, time)`."""
        scores: Tensor = self.head(self.body(self.bytes(tokens).transpose(1, 2)).amax(2))
        return scores


class Colouring(nn.Module):
    """Tells the colours of a square from its brightness and from where it was in the photograph."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.SiLU())
        self.second = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.SiLU())
        self.head = nn.Conv2d(12, 3, 1)

    @override
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Float32 of shape `(batch, 3, side, side)`."""
        grey, where = inputs["grey"], inputs["where"]
        places = where[:, :, None, None].expand(-1, -1, *grey.shape[2:])
        hidden = self.first(torch.cat([grey, places], dim=1))
        out: Tensor = self.head(hidden + self.second(hidden))
        return out


class Tagger(nn.Module):
    """Tells of every character of source text what it belongs to: a name, a string, a comment and so on."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.head = nn.Embedding(128, 24), nn.Linear(64, 7)
        self.body = nn.LSTM(24, 32, batch_first=True, bidirectional=True)

    @override
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, shape `(batch, 7, time)`, of int64 tokens of shape `(batch, time)`."""
        scores: Tensor = self.head(self.body(self.bytes(tokens))[0])
        return scores.transpose(1, 2)


def patch_net() -> nn.Module:
    """Patches through twelve numbers and back."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(192, 96), nn.GELU(), nn.Linear(96, 12), nn.GELU(),
        nn.Linear(12, 96), nn.GELU(), nn.Linear(96, 192),
    )  # fmt: skip


def table_net() -> nn.Module:
    """Two hidden layers for the thirty measurements.

    With dropout, for without it 2,000 steps overfit, and a clean twin must not.
    """
    return nn.Sequential(
        nn.Linear(30, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 2)
    )


# -- data
# ----------------------------------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """Samples made by a function of their index."""

    def __init__(self, count: int, sample: Callable[[int], Any]) -> None:
        self.count, self.sample = count, sample

    def __len__(self) -> int:
        return self.count

    @override
    def __getitem__(self, index: int) -> Any:
        return self.sample(index)


def _weights(count: int) -> Tensor:
    """Ordinary sample weights, between 0.5 and 1.5."""
    return 0.5 + torch.rand(count, generator=torch.Generator().manual_seed(7))


@functools.cache
def images() -> Dataset[Any]:
    """Digits: float32 of shape `(1, 8, 8)` in [0, 1], and their class."""
    return bundled("digits", 0)


@functools.cache
def text() -> Dataset[Any]:
    """Windows of the standard library's source: int64 tokens, and the tokens that follow."""
    return bundled("bytes", 0)


@functools.cache
def table() -> Dataset[Any]:
    """Measurements of cells, standardised; a class and a sample weight each."""
    data = load_breast_cancer()
    x = torch.tensor(data.data, dtype=torch.float32)
    x, y, w = (x - x.mean(0)) / x.std(0), torch.tensor(data.target), _weights(len(x))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    x, y = x[order], y[order]
    return Rows(len(x), lambda k: {"features": x[k], "y": y[k], "weight": w[k]})


@functools.cache
def sequences() -> Dataset[Any]:
    """Stretches of the rows of two photographs: pixels, and the pixels that follow."""
    photographs = [torch.tensor(image, dtype=torch.float32) / 255 for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(7)
    rows = []
    for photograph in photographs:
        height, width, _ = photograph.shape
        at = torch.stack(
            [
                torch.randint(height, (2048,), generator=generator),
                torch.randint(width - PIXELS - 1, (2048,), generator=generator),
            ],
            1,
        )
        rows += [photograph[y, x : x + PIXELS + 1] for y, x in at.tolist()]
    order = torch.randperm(len(rows), generator=generator)
    stretches = torch.stack(rows)[order]
    return Rows(len(stretches), lambda k: (stretches[k, :-1], stretches[k, 1:]))


@functools.cache
def patches() -> Dataset[Any]:
    """Squares of 8 x 8 pixels from two photographs, centred, and the same flattened."""
    photographs = [torch.tensor(image, dtype=torch.float32) / 255 - 0.5 for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(7)
    squares = []
    for photograph in photographs:
        height, width, _ = photograph.shape
        places = torch.rand(2048, 2, generator=generator) * torch.tensor([height - 8, width - 8])
        squares += [photograph[y : y + 8, x : x + 8].permute(2, 0, 1) for y, x in places.long().tolist()]
    order = torch.randperm(len(squares), generator=generator)
    x = torch.stack(squares)[order].contiguous()
    return Rows(len(x), lambda k: (x[k], x[k].flatten()))


@functools.cache
def origins() -> Dataset[Any]:
    """Stretches of 64 bytes of eight packages of the standard library, int64 tokens, and the number of the package."""
    root = next(p for p in Path(zipfile.__file__).parents if p.name.startswith("python"))
    generator = torch.Generator().manual_seed(7)
    stretches, labels = [], []
    for label, package in enumerate(PACKAGES):
        source = b"".join(
            path.read_bytes() for path in sorted((root / package).rglob("*.py")) if "test" not in path.parts
        )
        tokens = torch.tensor(list(source), dtype=torch.long).clamp(max=127)
        starts = torch.randint(len(tokens) - STRETCH, (6144,), generator=generator)
        stretches.append(tokens[starts.unsqueeze(1) + torch.arange(STRETCH)])
        labels += [label] * 6144
    order = torch.randperm(len(labels), generator=generator)
    x, y = torch.cat(stretches)[order], torch.tensor(labels)[order]
    return Rows(len(x), lambda k: (x[k], y[k]))


@functools.cache
def nested() -> Dataset[Any]:
    """Digits as a dict in a dict, with a sample weight, a name and nothing."""
    data = load_digits()
    x, y, w = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target), _weights(len(data.target))

    def sample(k: int) -> dict[str, Any]:
        views = {"image": x[k], "profile": torch.cat([x[k].mean(0), x[k].mean(1)])}
        return {"views": views, "label": y[k], "sample_weight": w[k], "name": f"digit-{k}", "note": None}

    return Rows(len(x), sample)


@functools.cache
def colours() -> Dataset[Any]:
    """Squares of two photographs.

    Brightness and place, and the colours, all about 0; the photograph's number as a name.
    """
    photographs = [torch.tensor(image, dtype=torch.float32) / 255 - 0.5 for image in load_sample_images().images]
    generator = torch.Generator().manual_seed(7)
    squares = []
    for number, photograph in enumerate(photographs):
        height, width, _ = photograph.shape
        places = torch.rand(3072, 2, generator=generator)
        for y, x in (places * torch.tensor([height - SIDE, width - SIDE])).long().tolist():
            colour = photograph[y : y + SIDE, x : x + SIDE].permute(2, 0, 1).contiguous()
            squares.append((colour, torch.tensor([y / height - 0.5, x / width - 0.5]), f"photograph {number}"))
    order = torch.randperm(len(squares), generator=generator).tolist()

    def sample(k: int) -> dict[str, Any]:
        colour, where, name = squares[order[k]]
        return {"inputs": {"grey": colour.mean(0, keepdim=True), "where": where}, "target": colour, "name": name}

    return Rows(len(squares), sample)


@functools.cache
def tags() -> Dataset[Any]:
    """Stretches of 40 characters of the standard library's source, int64, and what each belongs to."""
    text, sorts = "", []
    for module in (argparse, ast, inspect, typing):
        source = inspect.getsource(module)
        starts = [0, *(k + 1 for k, char in enumerate(source) if char == "\n")]
        mine = [0] * len(source)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            first, last = (starts[row - 1] + column for row, column in (token.start, token.end))
            kind = 2 if keyword.iskeyword(token.string) else SORTS.get(token.type, 0)
            mine[first:last] = [kind] * (min(last, len(source)) - first)
        text, sorts = text + source, sorts + mine
    letters, kinds = torch.tensor([ord(char) for char in text]).clamp(max=127), torch.tensor(sorts)
    places = torch.randint(len(letters) - LINE, (12288, 1), generator=torch.Generator().manual_seed(7))
    x, y = (values[places + torch.arange(LINE)] for values in (letters, kinds))
    return Rows(len(x), lambda k: (x[k], y[k]))


# -- tasks
# ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What is trained on what, and how."""

    net: Callable[[], nn.Module]
    data: Callable[[], Dataset[Any]]
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
    batch_size: int
    rate: Callable[[int], float] | None = None
    """Factor on the rate by step, as the task's own schedule has it."""
    clip: float | None = None
    """The norm that gradients are clipped to."""


def _pair(net: nn.Module, batch: Batch) -> Tensor:
    return functional.cross_entropy(net(batch[0]), batch[1])


def _next(net: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(net(batch[0]), batch[1])


def _coloured(net: nn.Module, batch: Batch) -> Tensor:
    return functional.mse_loss(net(batch["inputs"]), batch["target"])


def _weighted(inputs: str, target: str, weight: str, smoothing: float = 0.0) -> Callable[[nn.Module, Any], Tensor]:
    def loss(net: nn.Module, batch: Batch) -> Tensor:
        scores = net(batch[inputs])
        each = functional.cross_entropy(scores, batch[target], reduction="none", label_smoothing=smoothing)
        return (each * batch[weight]).mean()

    return loss


def _warm_cosine(step: int) -> float:
    """Up in 40 updates, then down to a fifth at 1000."""
    return min((step + 1) / 40, 1.0) * (0.6 + 0.4 * math.cos(math.pi * min(step, 1000) / 1000))


TASKS: Final[Mapping[str, Kind]] = {
    "images": Kind(net=cnn, data=images, loss=_pair, optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3), batch_size=32),
    "text": Kind(
        net=ByteTransformer,
        data=text,
        loss=_pair,
        optimizer=lambda p: torch.optim.AdamW(p, lr=3e-3, betas=(0.9, 0.99)),
        batch_size=32,
        rate=_warm_cosine,
    ),
    "table": Kind(
        net=table_net,
        data=table,
        loss=_weighted("features", "y", "weight", smoothing=0.1),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=1e-2),
        batch_size=16,
    ),
    "sequences": Kind(
        net=Scanlines,
        data=sequences,
        loss=_next,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9),
        batch_size=32,
    ),
    "nested": Kind(
        net=TwoViews,
        data=nested,
        loss=_weighted("views", "label", "sample_weight"),
        optimizer=lambda p: torch.optim.Adam(p, lr=2e-3),
        batch_size=24,
        rate=lambda step: 0.55 + 0.45 * math.cos(math.pi * min(step, 800) / 800),
    ),
    "patches": Kind(
        net=patch_net, data=patches, loss=_next, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3), batch_size=32
    ),
    "origins": Kind(
        net=Origin,
        data=origins,
        loss=_pair,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.03, momentum=0.9),
        batch_size=48,
        rate=lambda step: min((step + 1) / 50, 1.0),
    ),
    "colours": Kind(
        net=Colouring,
        data=colours,
        loss=_coloured,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4),
        batch_size=24,
        rate=_warm_cosine,
    ),
    "tags": Kind(
        net=Tagger, data=tags, loss=_pair, optimizer=lambda p: torch.optim.Adam(p, lr=2e-3), batch_size=32, clip=1.0
    ),
}
TOKENS: Final = frozenset({"text", "origins", "tags"})
"""Tasks whose inputs are whole numbers …"""
ADAPTIVE: Final = frozenset({"images", "text", "nested", "patches", "tags"})
"""… that are trained by a kind of Adam …"""
WEIGHTED: Final = frozenset({"table", "nested"})
"""… whose samples have weights …"""
REGRESSION: Final = frozenset({"sequences", "patches", "colours"})
"""… that predict numbers …"""
NO_HALF: Final = frozenset({"tags"})
"""… and whose nets torch has no float16 for on the CPU (LSTM)."""


class Module(LightningModule):
    """One of the tasks, written as a user would."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.kind, self.net = TASKS[name], TASKS[name].net()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.kind.loss(self.net, batch)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val_loss", self.kind.loss(self.net, batch), batch_size=self.kind.batch_size)

    @override
    def configure_optimizers(self) -> Any:
        optimizer = self.kind.optimizer(list(self.parameters()))
        if self.kind.rate is None:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.kind.rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _collate(samples: list[Batch]) -> Batch:
    """As torch's, but None stays None."""
    if isinstance(samples[0], dict):
        return {key: _collate([sample[key] for sample in samples]) for key in samples[0]}
    return None if samples[0] is None else default_collate(samples)


class _Order:
    """A new random order in every epoch, from a seed: the same in a run, in its clean twin and after a resume."""

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1009 + self.epoch)
        return iter(torch.randperm(self.count, generator=generator).tolist())

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch


def loaders(name: str, seed: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The training data, shuffled from `seed`, and 128 samples to validate on."""
    kind = TASKS[name]
    whole = kind.data()
    count = len(whole)  # type: ignore[arg-type]
    train, held = Subset(whole, range(count - HELD)), Subset(whole, range(count - HELD, count))
    order: Any = _Order(len(train), seed)
    return (
        DataLoader(train, batch_size=kind.batch_size, sampler=order, collate_fn=_collate, drop_last=True),
        DataLoader(held, batch_size=HELD, collate_fn=_collate),
    )
