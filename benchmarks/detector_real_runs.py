"""Loss curves of real healthy trainings, small enough for two CPU cores, without a download."""

import math
import random
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, TypeAlias

import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["TASKS", "Curve", "real_curve"]

Curve: TypeAlias = list[tuple[float, int]]
"""Loss and batch size of every step."""
Batch: TypeAlias = tuple[Tensor, Tensor]
CONTEXT: Final = 12


def _epochs(inputs: Tensor, targets: Tensor, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Shuffled epochs for ever; the last batch of each is short."""
    while True:
        for chosen in torch.randperm(len(inputs), generator=generator).split(size):
            yield inputs[chosen], targets[chosen]


def _digits(size: int, generator: torch.Generator) -> tuple[nn.Module, Iterator[Batch]]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    return model, _epochs(images, torch.tensor(digits.target), size, generator)


def _diabetes(size: int, generator: torch.Generator) -> tuple[nn.Module, Iterator[Batch]]:
    inputs, targets = load_diabetes(return_X_y=True)
    scaled = torch.tensor((targets - targets.mean()) / targets.std(), dtype=torch.float32)
    features = torch.tensor(inputs * math.sqrt(len(inputs)), dtype=torch.float32)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1), nn.Flatten(0))
    return model, _epochs(features, scaled, size, generator)


def _text() -> Tensor:
    """Bytes of some modules of the standard library."""
    source = Path(zipfile.__file__).parent
    while source.name.startswith("zipfile"):
        source = source.parent
    text = b"".join((source / name).read_bytes() for name in ("argparse.py", "ast.py", "inspect.py", "typing.py"))
    return torch.tensor(list(text), dtype=torch.long).clamp(max=127)


def _windows(size: int, generator: torch.Generator) -> Iterator[Batch]:
    text = _text()
    while True:
        starts = torch.randint(len(text) - CONTEXT - 1, (size,), generator=generator)
        window = text[starts.unsqueeze(1) + torch.arange(CONTEXT + 1)]
        yield window[:, :-1], window[:, 1:]


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(128, 32)
        self.places = nn.Parameter(torch.zeros(CONTEXT, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(32, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT)
        scores: Tensor = self.head(self.body(self.bytes(tokens) + self.places, mask=mask, is_causal=True))
        return scores.transpose(1, 2)


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bytes = nn.Embedding(128, 24)
        self.body = nn.GRU(24, 48, batch_first=True)
        self.head = nn.Linear(48, 128)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.head(self.body(self.bytes(tokens))[0])
        return scores.transpose(1, 2)


def _transformer(size: int, generator: torch.Generator) -> tuple[nn.Module, Iterator[Batch]]:
    return _Transformer(), _windows(size, generator)


def _gru(size: int, generator: torch.Generator) -> tuple[nn.Module, Iterator[Batch]]:
    return _Recurrent(), _windows(size, generator)


TASKS: Final[dict[str, Callable[[int, torch.Generator], tuple[nn.Module, Iterator[Batch]]]]] = {
    "digits CNN": _digits,
    "diabetes MLP": _diabetes,
    "byte Transformer": _transformer,
    "byte GRU": _gru,
}


def real_curve(task: str, size: int, steps: int, seed: int) -> Curve:
    """Train with AdamW, a short warm-up and a cosine decay, clipped at 1; returns what was seen on the way."""
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model, batches = TASKS[task](size, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
    )
    measure = functional.mse_loss if task == "diabetes MLP" else functional.cross_entropy
    curve: Curve = []
    for _ in range(steps):
        inputs, targets = next(batches)
        loss = measure(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append((float(loss.detach()), len(inputs)))
    return curve
