"""Fits what each level weighs, and the numbers between weights and probabilities, on labelled runs.

The model is the package's own (`lightning_spike.diagnosis.weigh`), by penalised maximum likelihood: every weight is its
hand-set value times a factor whose logarithm has a normal prior about 0, so that a fitted weight keeps its sign and is
shrunk towards the hand-set one; temper, offsets and the share of "unexplained" have normal priors as well.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import Tensor

from labelled_runs.judging import UNEXPLAINED
from labelled_runs.runs import RecordedRun
from lightning_spike.diagnosis import weights as package_weights
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.examine import examine_all
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.diagnosis.weigh import UPSTREAM_EVIDENCE, upstream
from lightning_spike.diagnosis.weights import EVERY_CAUSE, Weights

Key = tuple[str, str, str]
"""Cause (or "every cause"), observer and level of one weight."""

CAUSES: Final = tuple(sorted(cause.id for cause in catalogue()))
PLACES: Final[Mapping[str, int]] = MappingProxyType({name: k for k, name in enumerate(CAUSES)})
WEIGHT_SPREAD: Final = 0.25
"""Standard deviation of the log factor on a hand-set weight: two in three stay within 22 to 28 % of it; engineering
choice."""
OFFSET_SPREAD: Final = 0.4
"""Standard deviation of the normal prior on the offsets: a few runs of a cause shall not move it far; engineering
choice."""
TEMPER_SPREAD: Final = 0.5
"""… and of that on the log of the temper, about `PRIOR_TEMPER` (science.md 3.2: 0.5 to 0.7)."""
PRIOR_TEMPER: Final = 0.6
PRIOR_UNEXPLAINED: Final = 0.3
NEVER: Final = -60.0
"""Logit of a cause that does not apply."""
MAX_ITERATIONS: Final = 80


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """The most severe episode of a run, as the model sees it."""

    evidence: tuple[tuple[int, Key], ...]
    """By place of the cause, what weighs for or against it."""
    applies: frozenset[int]
    """Places of the causes that were examined."""
    label: int
    """Place of the true cause; `len(CAUSES)` for "unexplained"."""


def example(found: RecordedRun) -> Example | None:
    """What there is to fit on in a run; `None` without an episode, and where two faults are in it."""
    if found.store is None or len(found.cell.causes) > 1 or not found.store.episodes:
        return None
    label = found.cell.causes[0] if found.cell.causes else UNEXPLAINED
    if label not in {*PLACES, UNEXPLAINED}:
        return None
    view = EpisodeView(found.store, max(found.store.episodes, key=lambda e: e.severity))
    examined = examine_all(view, catalogue(), _by_hand(), [])
    return Example(
        evidence=tuple(
            (PLACES[e.cause.id], _key(e.cause.id, item.observation, item.level))
            for e in examined
            for item in e.evidence
        ),
        applies=frozenset(PLACES[e.cause.id] for e in examined),
        label=PLACES.get(label, len(CAUSES)),
    )


def fit(examples: Sequence[Example | None]) -> Weights:
    """The most probable weights, temper, share of "unexplained" and offsets."""
    data = [one for one in examples if one is not None]
    packed = _Packed.of(data)
    start = torch.tensor(math.log(PRIOR_TEMPER)), _logit(PRIOR_UNEXPLAINED)
    free = [torch.zeros(len(packed.by_hand)), *start, torch.zeros(len(CAUSES))]
    for parameter in free:
        parameter.requires_grad_()
    factors, log_temper, logit, offsets = free
    optimizer = torch.optim.LBFGS(free, max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = packed.logits(packed.by_hand * factors.exp(), log_temper.exp(), torch.sigmoid(logit), offsets)
        miss = torch.nn.functional.cross_entropy(logits, packed.labels, reduction="sum")
        penalty = (factors / WEIGHT_SPREAD).square().sum() + (offsets / OFFSET_SPREAD).square().sum()
        penalty = penalty + ((log_temper - math.log(PRIOR_TEMPER)) / TEMPER_SPREAD).square()
        whole: Tensor = miss + penalty / 2
        whole.backward()  # type: ignore[no-untyped-call]
        return whole

    if data:
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    fitted = (packed.by_hand * factors.exp()).detach().tolist()
    return Weights(
        temper=float(log_temper.detach().exp()),
        unexplained=float(torch.sigmoid(logit.detach())),
        offsets=MappingProxyType(dict(zip(CAUSES, offsets.detach().tolist(), strict=True))),
        table=_table(dict(zip(packed.keys, fitted, strict=True))),
    )


def as_file(weights: Weights, *, made_by: str, runs: int) -> str:
    """The content of `weights.json`.

    One line for each observer of a cause, each level with its hand-set and its fitted weight.
    """
    by_hand = _by_hand().table
    lines = [
        "{",
        f' "made_by": {json.dumps(made_by)},',
        f' "runs": {runs},',
        f' "temper": {weights.temper:.4f},',
        f' "unexplained": {weights.unexplained:.4f},',
        f' "offsets": {json.dumps({name: round(offset, 3) for name, offset in weights.offsets.items()})},',
        ' "weights": {',
    ]
    for cause, observers in sorted(by_hand.items()):
        rows = [
            f"   {json.dumps(name)}: "
            + json.dumps({level: [hand, round(weights.table[cause][name][level], 2)] for level, hand in levels.items()})
            for name, levels in observers.items()
        ]
        lines += [f"  {json.dumps(cause)}: {{", ",\n".join(rows), "  },"]
    lines[-1] = "  }"
    return "\n".join([*lines, " }", "}", ""])


@functools.cache
def _by_hand() -> Weights:
    return package_weights.parse(package_weights.content(), by_hand=True)


def _key(cause: str, observer: str, level: str) -> Key:
    own = _by_hand().table.get(cause, {})
    return (cause if observer in own else EVERY_CAUSE), observer, level


def _table(values: Mapping[Key, float]) -> Mapping[str, Any]:
    table: dict[str, dict[str, dict[str, float]]] = {}
    for (cause, observer, level), value in values.items():
        table.setdefault(cause, {}).setdefault(observer, {})[level] = value
    return MappingProxyType(table)


def _logit(p: float) -> Tensor:
    return torch.tensor(math.log(p / (1 - p)))


@functools.cache
def _upstream(applies: frozenset[int]) -> Tensor:
    above = torch.zeros(len(CAUSES), len(CAUSES), dtype=torch.bool)
    for name, ups in upstream([cause for cause in catalogue() if PLACES[cause.id] in applies]).items():
        above[PLACES[name], [PLACES[up] for up in ups]] = True
    return above


@dataclasses.dataclass(frozen=True, slots=True)
class _Packed:
    """All examples as tensors; R examples, C causes, W weights."""

    keys: tuple[Key, ...]
    by_hand: Tensor
    """Shape `(W,)`."""
    cells: Tensor
    """Of each piece of evidence the place in a flat `(R, C)` table; shape `(N,)`."""
    which: Tensor
    """… and its weight; shape `(N,)`."""
    applies: Tensor
    """`(R, C)`, bool."""
    upstream: Tensor
    """`(R, C, C)`, bool: whether the third is upstream of the second, among those that apply."""
    labels: Tensor
    """`(R,)`."""

    @staticmethod
    def of(data: Sequence[Example]) -> "_Packed":
        table = _by_hand().table
        keys = tuple((c, o, level) for c, of in table.items() for o, levels in of.items() for level in levels)
        place = {key: k for k, key in enumerate(keys)}
        pairs = [(row * len(CAUSES) + cause, place[key]) for row, one in enumerate(data) for cause, key in one.evidence]
        applies = torch.zeros(len(data), len(CAUSES), dtype=torch.bool)
        for row, one in enumerate(data):
            applies[row, list(one.applies)] = True
        return _Packed(
            keys=keys,
            by_hand=torch.tensor([table[c][o][level] for c, o, level in keys]),
            cells=torch.tensor([cell for cell, _ in pairs], dtype=torch.long),
            which=torch.tensor([weight for _, weight in pairs], dtype=torch.long),
            applies=applies,
            upstream=torch.stack([_upstream(one.applies) for one in data]),
            labels=torch.tensor([one.label for one in data]),
        )

    def logits(self, weights: Tensor, temper: Tensor, unexplained: Tensor, offsets: Tensor) -> Tensor:
        """As `weigh.probabilities` has them before the softmax; shape `(R, C + 1)`."""
        flat = torch.zeros(self.applies.numel()).index_add(0, self.cells, weights[self.which])
        raw = flat.reshape(self.applies.shape)
        present = self.upstream
        explained = torch.where(present, raw.clamp_min(0.0).unsqueeze(1), 0.0).amax(2)
        share = ((1 - unexplained) / self.applies.sum(1, keepdim=True).clamp(min=1)).log()
        logits = share + offsets + temper * (raw - explained)
        strong = present & (raw.unsqueeze(1) >= UPSTREAM_EVIDENCE)
        cap = torch.where(strong, logits.unsqueeze(1) - temper, torch.inf).amin(2)
        capped = torch.where(self.applies, torch.minimum(logits, cap), NEVER)
        return torch.cat([capped, unexplained.log().expand(len(raw), 1)], 1)
