"""Fits the numbers between evidence and probability on labelled runs."""

import dataclasses
import math
from collections.abc import Sequence
from types import MappingProxyType
from typing import Final

import torch
from diagnosis_judge import UNEXPLAINED
from diagnosis_runs import Kept
from torch import Tensor

from lightning_spike.diagnosis.calibration import Calibration
from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.constants import UPSTREAM
from lightning_spike.diagnosis.rank import examined
from lightning_spike.diagnosis.weigh import totals, upstream
from lightning_spike.records import Episode

__all__ = ["Seen", "fit", "seen"]

NAMES: Final = tuple(sorted(cause.id for cause in catalogue()))
SPREAD: Final = 0.4
"""Standard deviation of the normal prior on the offsets: a few runs of a cause shall not move it far."""
TEMPER_SPREAD: Final = 0.5
"""… and of that on the log of the temper, about `TEMPER_BEFORE` (science.md 3.2: 0.5 to 0.7)."""
TEMPER_BEFORE: Final = 0.6
UNEXPLAINED_BEFORE: Final = 0.3
NEVER: Final = -60.0
"""Logit of a cause that does not apply."""
ROUNDS: Final = 60


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """The most telling episode of a run, as numbers; all lists by `NAMES`, then "unexplained"."""

    totals: tuple[float, ...]
    applies: tuple[bool, ...]
    above: tuple[tuple[int, ...], ...]
    """By cause the places of those upstream of it that have real evidence."""
    label: int


def seen(found: Kept) -> Seen | None:
    """What there is to fit on in a run; `None` without an episode, and where two faults are in it."""
    if found.store is None or len(found.cell.causes) > 1 or not found.store.episodes:
        return None
    label = found.cell.causes[0] if found.cell.causes else UNEXPLAINED
    case = Case(found.store, _most_severe(found.store.episodes))
    said = examined(case, catalogue(), [])
    sums, above = totals(said), upstream(said)
    raw = {e.cause.id: e.examination.total for e in said}
    places = {name: k for k, name in enumerate(NAMES)}
    if label not in (*places, UNEXPLAINED):
        return None
    return Seen(
        totals=tuple(sums.get(name, 0.0) for name in NAMES),
        applies=tuple(name in sums and math.isfinite(sums[name]) for name in NAMES),
        above=tuple(
            tuple(places[up] for up in above.get(name, ()) if up in places and raw[up] >= UPSTREAM) for name in NAMES
        ),
        label=places.get(label, len(NAMES)),
    )


def _most_severe(episodes: Sequence[Episode]) -> Episode:
    return max(episodes, key=lambda e: e.severity)


def fit(known: Sequence[Seen | None]) -> Calibration:
    """The most probable temper, share of "unexplained" and offsets, given normal priors on them: penalised multinomial logistic regression."""
    data = [one for one in known if one is not None]
    log_temper = torch.tensor(math.log(TEMPER_BEFORE), requires_grad=True)
    logit = torch.tensor(math.log(UNEXPLAINED_BEFORE / (1 - UNEXPLAINED_BEFORE)), requires_grad=True)
    offsets = torch.zeros(len(NAMES), requires_grad=True)
    labels = torch.tensor([one.label for one in data])
    optimizer = torch.optim.LBFGS([log_temper, logit, offsets], max_iter=ROUNDS, line_search_fn="strong_wolfe")
    packed = _Packed.of(data)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = packed.logits(log_temper.exp(), torch.sigmoid(logit), offsets)
        miss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        penalty = (offsets / SPREAD).square().sum() / 2
        penalty = penalty + ((log_temper - math.log(TEMPER_BEFORE)) / TEMPER_SPREAD).square() / 2
        whole: Tensor = miss + penalty
        whole.backward()  # type: ignore[no-untyped-call]
        return whole

    if data:
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    by_name = {name: float(offset) for name, offset in zip(NAMES, offsets.detach(), strict=True)}
    return Calibration(
        temper=float(log_temper.detach().exp()),
        unexplained=float(torch.sigmoid(logit.detach())),
        offsets=MappingProxyType(by_name),
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Packed:
    """All runs as tensors."""

    totals: Tensor
    applies: Tensor
    above: Tensor
    """`(runs, causes, causes)`: whether the third is upstream of the second."""

    @staticmethod
    def of(data: Sequence[Seen]) -> "_Packed":
        above = torch.zeros(len(data), len(NAMES), len(NAMES), dtype=torch.bool)
        for row, one in enumerate(data):
            for name, places in enumerate(one.above):
                above[row, name, list(places)] = True
        return _Packed(
            torch.tensor([one.totals for one in data]).reshape(-1, len(NAMES)).nan_to_num(),
            torch.tensor([one.applies for one in data], dtype=torch.bool).reshape(-1, len(NAMES)),
            above,
        )

    def logits(self, temper: Tensor, unexplained: Tensor, offsets: Tensor) -> Tensor:
        """As `weigh.probabilities` has them before the softmax; shape `(runs, causes + 1)`."""
        share = ((1 - unexplained) / self.applies.sum(1, keepdim=True).clamp(min=1)).log()
        raw = share + offsets + temper * self.totals
        cap = torch.where(self.above, raw.unsqueeze(1) - temper, torch.inf).amin(2)
        capped = torch.where(self.applies, torch.minimum(raw, cap), NEVER)
        return torch.cat([capped, unexplained.log().expand(len(raw), 1)], 1)
