"""Loss curves of real trainings, healthy or with one fault, small enough for two CPU cores, without a download."""

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

__all__ = ["FAULTS", "TASKS", "Curve", "Fault", "real_curve"]

Curve: TypeAlias = list[tuple[float, int]]
"""Loss and batch size of every step."""
Batch: TypeAlias = tuple[Tensor, Tensor]
Fault: TypeAlias = Callable[[nn.Module, torch.optim.Optimizer, int], None]
"""Changes model or optimizer before the update `since` steps after its onset."""
CONTEXT: Final = 12


def _epochs(inputs: Tensor, targets: Tensor, size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Shuffled epochs for ever; the last batch of each is short."""
    while True:
        for chosen in torch.randperm(len(inputs), generator=generator).split(size):
            if len(chosen) > 1:  # BatchNorm cannot train on one sample
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


def _digits_norm(size: int, generator: torch.Generator) -> tuple[nn.Module, Iterator[Batch]]:
    _, batches = _digits(size, generator)
    hidden = (nn.Flatten(), nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.BatchNorm1d(64))
    return nn.Sequential(*hidden, nn.ReLU(), nn.Linear(64, 10)), batches


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
    "digits BatchNorm": _digits_norm,
    "diabetes MLP": _diabetes,
    "byte Transformer": _transformer,
    "byte GRU": _gru,
}


def _rates(factor: float, length: int) -> Fault:
    def fault(_: nn.Module, optimizer: torch.optim.Optimizer, since: int) -> None:
        if since < length:
            for group in optimizer.param_groups:
                group["lr"] *= factor

    return fault


def _weights(scale: float) -> Fault:
    def fault(model: nn.Module, _: torch.optim.Optimizer, since: int) -> None:
        if since == 0:
            with torch.no_grad():
                for weight in model.parameters():
                    weight.add_(scale * weight.std(correction=0) * torch.randn(weight.shape, generator=_noise()))

    return fault


def _flip(model: nn.Module, _: torch.optim.Optimizer, since: int) -> None:
    """One weight of the last layer becomes 100, as a flipped bit of its exponent makes it."""
    if since == 0:
        with torch.no_grad():
            list(model.parameters())[-2].view(-1)[0] = 100.0


def _noise() -> torch.Generator:
    return torch.Generator().manual_seed(0)


FAULTS: Final[dict[str, Fault | None]] = {
    "labels drawn anew, one batch": None,
    "inputs spoilt, one batch": None,
    "rate x 30, one step": _rates(30.0, 1),
    "rate x 30, five steps": _rates(30.0, 5),
    "rate x 10 to the end": _rates(10.0, 1_000_000),
    "weights + 50 % noise": _weights(0.5),
    "one weight flipped": _flip,
}
"""What goes wrong; the first two change the batch, see `_spoilt`."""


def _spoilt(fault: str, batch: Batch) -> Batch:
    inputs, targets = batch
    draw = _noise()
    if fault.startswith("labels"):
        return inputs, targets[torch.randperm(len(targets), generator=draw)] if targets.is_floating_point() else (
            torch.randint(0, int(targets.max()) + 1, targets.shape, generator=draw)
        )
    if inputs.is_floating_point():
        return 30.0 * torch.randn(inputs.shape, generator=draw), targets
    return torch.randint(0, 128, inputs.shape, generator=draw), targets


def real_curve(
    task: str, size: int, steps: int, seed: int, *, fault: str | None = None, at: int = 0, rate: float = 2e-3
) -> Curve:
    """Train with AdamW, a short warm-up and a cosine decay, clipped at 1; returns what was seen on the way.

    Args:
        task: One of `TASKS`.
        size: Samples per batch.
        steps: Batches.
        seed: Of weights and order; a run with a fault is its healthy twin up to `at`.
        fault: One of `FAULTS`, or none.
        at: Step of the fault.
        rate: Peak learning rate.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    model, batches = TASKS[task](size, torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 50) * (0.55 + 0.45 * math.cos(math.pi * step / steps)),
    )
    measure = functional.mse_loss if task == "diabetes MLP" else functional.cross_entropy
    change = None if fault is None else FAULTS[fault]
    curve: Curve = []
    for step in range(steps):
        batch = next(batches)
        if fault is not None and change is None and step == at:
            batch = _spoilt(fault, batch)
        if change is not None and step >= at:
            change(model, optimizer, step - at)
        inputs, targets = batch
        loss = measure(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        curve.append((float(loss.detach()), len(inputs)))
    return curve
