"""The factors of an update: each can be reset to its normal value with all else unchanged."""

import dataclasses
import math
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

from torch import Tensor
from typing_extensions import override

from lightning_spike.lab.experiments.sample_exchange import with_samples_exchanged
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.lab.replay.update import Update
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.update_settings import CLIP, PLACE, Settings
from lightning_spike.sandbox.state import TrainState


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Baselines:
    """The normal values around an update."""

    updates_replayed: Sequence[ReplayedUpdate]
    """The updates that were made again, oldest first, up to the one in question, which is the last."""
    controls: Sequence[RingEntry]
    """Ordinary batches, the most ordinary one first."""
    settings: Sequence[Settings]
    """Settings of up to 32 earlier steps of the same optimizer, oldest first."""
    defaults: Mapping[str, Any]
    """The optimizer's hyperparameters as its class has them where the user gives none."""
    is_mixed: bool
    """Whether the training runs under autocast."""
    named: Mapping[int, Sequence[int]] = dataclasses.field(default_factory=dict)
    """Positions of outlier samples by the batch's ordinal, for examined batches."""

    @property
    def oldest(self) -> ReplayedUpdate:
        """The first of the updates that were made again."""
        return self.updates_replayed[0]


class Factor(ABC):
    """One thing about an update.

    Its normal value is what it recently was, not what would be safer: with a tenth of the learning rate the damage goes
    away whatever made it (75 of 75, science.md 2b.6). What was normal already is no factor: then `normal` is `None`,
    and no run is spent on it.
    """

    id: ClassVar[str]
    """Its name in findings and causes."""
    group: ClassVar[str]
    """`"data"`, `"learning_rate"`, `"optimizer"`, `"clipping"` or `"numerics"`: who is to blame if it was this."""
    title: ClassVar[str]
    """For a sentence: "the batch"."""

    @abstractmethod
    def normal(self, update: Update, baselines: Baselines) -> Update | None:
        """The update with this factor at its recent normal value, all else as given; `None` where it was normal."""


class Batch(Factor):
    """The batches of the update, against ordinary ones from before."""

    id: ClassVar = "batch"
    group: ClassVar = "data"
    title: ClassVar = "the batch"

    @override
    def normal(self, update: Update, baselines: Baselines) -> Update | None:
        if not baselines.controls:
            return None
        ordinary = (baselines.controls[k % len(baselines.controls)] for k in range(len(update.entries)))
        entries = tuple(
            dataclasses.replace(was, batch=entry.batch, rng=entry.rng, ids=entry.ids)
            for was, entry in zip(update.entries, ordinary, strict=True)
        )
        return dataclasses.replace(update, entries=entries)


class NamedSamples(Factor):
    """The named samples of the update's batches, against ordinary ones in their places; the rest of the batches stays.

    Named are those whose losses are out of what is usual for the weights before the update
    (`lab.experiments.sample_exchange`). Where none are named, or the batches do not fit together, it is no factor.
    """

    id: ClassVar = "samples"
    group: ClassVar = "data"
    title: ClassVar = "the samples that stand out"

    @override
    def normal(self, update: Update, baselines: Baselines) -> Update | None:
        changed = {
            entry.at.ordinal: with_samples_exchanged(entry, named, baselines.controls)
            for entry in update.entries
            if (named := baselines.named.get(entry.at.ordinal))
        }
        if not any(changed.values()):
            return None
        return dataclasses.replace(
            update, entries=tuple(changed.get(entry.at.ordinal) or entry for entry in update.entries)
        )


MIN_RATE_CHANGE: Final = 1.05
"""Ratio to the recent median from which a rate has changed; engineering choice. Smooth schedules move by less in 32
steps."""
MIN_RATES: Final = 4
"""Steps without which there is no recent rate; engineering choice."""


class LearningRate(Factor):
    """The rate that the update was made with, against the median of the steps before."""

    id: ClassVar = "learning_rate"
    group: ClassVar = "learning_rate"
    title: ClassVar = "the learning rate"

    @override
    def normal(self, update: Update, baselines: Baselines) -> Update | None:
        usual = [_usual_rates(step, baselines.settings) for step in update.settings]
        if not any(_is_changed(step, rates) for step, rates in zip(update.settings, usual, strict=True)):
            return None
        settings = tuple(_with_rates(step, rates) for step, rates in zip(update.settings, usual, strict=True))
        return dataclasses.replace(update, settings=settings)


def _usual_rates(step: Settings, before: Sequence[Settings]) -> list[float]:
    """The median rate of every parameter group in the steps of the same optimizer.

    The step's own where these are too few.
    """
    own = [_rate(group) for group in step]
    like = [other for other in before if _place(other) == _place(step) and len(other) == len(step)]
    return (
        own
        if len(like) < MIN_RATES
        else [statistics.median(_rate(other[k]) for other in like) for k in range(len(own))]
    )


def _with_rates(step: Settings, rates: Sequence[float]) -> Settings:
    return [{**group, "lr": rate} if "lr" in group else group for group, rate in zip(step, rates, strict=True)]


def _is_changed(step: Settings, usual: Sequence[float]) -> bool:
    return any(
        not (rate / MIN_RATE_CHANGE <= _rate(group) <= rate * MIN_RATE_CHANGE)
        for group, rate in zip(step, usual, strict=True)
    )


def _rate(group: Mapping[str, Any]) -> float:
    rate = group.get("lr", 0.0)
    return float(rate) if isinstance(rate, int | float | Tensor) else 0.0


def _place(step: Settings) -> object:
    return step[0].get(PLACE) if step else None


FIRST: Final = ("exp_avg", "momentum_buffer")
"""State keys of torch's optimizers for the momentum."""
SECOND: Final = ("exp_avg_sq", "square_avg")
"""… and the running mean of the squared gradients."""
MIN_GRADIENTS: Final = 4
"""Updates whose gradients make a new second moment; engineering choice."""

MIN_STALE_RATIO: Final = 1.5
"""Recent mean square of a tensor's gradients over its second moment from which that is stale; engineering choice. A
step is then a fifth too long."""

States = list[dict[str, Any]]


class Momentum(Factor):
    """The momentum, against that of the oldest update that was made again."""

    id: ClassVar = "momentum"
    group: ClassVar = "optimizer"
    title: ClassVar = "the momentum"

    @override
    def normal(self, update: Update, baselines: Baselines) -> Update | None:
        return _replaced(
            update, baselines, FIRST, lambda k, place, key, _: _entry(baselines.oldest.before, k, place, key)
        )


class SecondMoments(Factor):
    """The second moments, against such as have kept up with the gradients of the last updates.

    A second moment that lags behind gradients that grew (1 / (1 - beta2) steps) is stale, and was as stale a dozen
    steps ago; so its normal value is not its recent one. It is multiplied by how much larger the mean squared gradient
    since then is, over the whole tensor (element by element a dozen gradients are noise); the difference of two states
    of it gives that mean.
    """

    id: ClassVar = "second_moments"
    group: ClassVar = "optimizer"
    title: ClassVar = "the second moments"

    @override
    def normal(self, update: Update, baselines: Baselines) -> Update | None:
        steps = len(baselines.updates_replayed) - 1
        if steps < MIN_GRADIENTS:
            return None

        def kept_up(optimizer: int, place: int, key: str, now: Tensor) -> Tensor | None:
            then = _entry(baselines.oldest.before, optimizer, place, key)
            decay = _decay(baselines, optimizer, place)
            if then is None or decay is None or not 0.0 < decay < 1.0:
                return None
            faded = decay**steps
            held = float(now.mean()) / _filled(baselines, optimizer, place, key, decay)
            fresh = float((now - faded * then).mean()) / (1.0 - faded)
            return now * (fresh / held) if 0.0 < MIN_STALE_RATIO * held < fresh < math.inf else None

        return _replaced(update, baselines, SECOND, kept_up)


class OptimizerState(Factor):
    """Both together: whatever the optimizer remembers."""

    id: ClassVar = "optimizer_state"
    group: ClassVar = "optimizer"
    title: ClassVar = "the optimizer's state"

    @override
    def normal(self, update: Update, baselines: Baselines) -> Update | None:
        first = Momentum().normal(update, baselines)
        second = SecondMoments().normal(first or update, baselines)
        return second or first


def _replaced(
    update: Update, baselines: Baselines, keys: tuple[str, ...], value: Callable[[int, int, str, Tensor], Tensor | None]
) -> Update | None:
    """The update with some tensors of the optimizers' states replaced; `None` without these or without a history."""
    if len(baselines.updates_replayed) < 2:  # noqa: PLR2004 - the update itself and one before
        return None
    found = False

    def exchanged(optimizer: int, place: int, entry: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal found
        out = dict(entry)
        for key in keys:
            if isinstance(entry.get(key), Tensor) and (new := value(optimizer, place, key, entry[key])) is not None:
                out[key], found = new, True
        return out

    states: States = update.optimizers or baselines.updates_replayed[-1].before.optimizers
    changed = [
        {**state, "state": {place: exchanged(k, place, entry) for place, entry in state["state"].items()}}
        for k, state in enumerate(states)
    ]
    return dataclasses.replace(update, optimizers=changed) if found else None


def _entry(state: TrainState, optimizer: int, place: int, key: str) -> Tensor | None:
    held = state.optimizers[optimizer]["state"].get(place, {}).get(key)
    return held if isinstance(held, Tensor) else None


def _decay(baselines: Baselines, optimizer: int, place: int) -> float | None:
    """beta2 of the parameter's group: `betas` of Adam's kind, `alpha` of RMSprop."""
    groups = baselines.oldest.before.optimizers[optimizer]["param_groups"]
    group: Mapping[str, Any] = next((g for g in groups if place in g["params"]), {})
    betas = group.get("betas")
    decay = betas[1] if isinstance(betas, tuple | list) and len(betas) > 1 else group.get("alpha")
    return float(decay) if decay is not None else None


def _filled(baselines: Baselines, optimizer: int, place: int, key: str, decay: float) -> float:
    """Sum of the weights in a second moment's average.

    Adam's begins at zero and is corrected for that, RMSprop's is not (Kingma and Ba 2015, section 3).
    """
    step = baselines.updates_replayed[-1].before.optimizers[optimizer]["state"].get(place, {}).get("step")
    if key != "exp_avg_sq" or step is None or not float(step) > 0.0:
        return 1.0
    return float(1.0 - decay ** float(step))


MIN_CLIPPINGS: Final = 4
"""Steps without which there is no recent clipping, as `MIN_RATES`; engineering choice."""


class Clipping(Factor):
    """The trainer's gradient clipping (value and algorithm), compared with that of most earlier steps.

    It is another only where `trainer.gradient_clip_val` was changed in the run. What a module clips by on its own
    (`configure_gradient_clipping`, manual optimisation) is not noted; then it is no factor.
    """

    id: ClassVar = "clipping"
    group: ClassVar = "clipping"
    title: ClassVar = "the clipping"

    @override
    def normal(self, update: Update, baselines: Baselines) -> Update | None:
        settings = tuple(_as_usual(step, baselines) for step in update.settings)
        return None if settings == update.settings else dataclasses.replace(update, settings=settings)


def _as_usual(step: Settings, baselines: Baselines) -> Settings:
    if not step or CLIP not in step[0]:
        return step
    before = [tuple(o[0][CLIP]) for o in baselines.settings if o and CLIP in o[0] and o[0][PLACE] == step[0][PLACE]]
    usual = Counter(before).most_common(1)[0][0] if len(before) >= MIN_CLIPPINGS else tuple(step[0][CLIP])
    return step if usual == tuple(step[0][CLIP]) else [{**group, CLIP: usual} for group in step]


MIN_EPSILON_RATIO: Final = 10.0
"""Default epsilon of the optimizer over its own from which that is a suspect; engineering choice."""


class Epsilon(Factor):
    """The epsilon of the update's denominator, compared with the default of the optimizer's class.

    There is no recent other value of a constant.
    """

    id: ClassVar = "epsilon"
    group: ClassVar = "optimizer"
    title: ClassVar = "epsilon"

    @override
    def normal(self, update: Update, baselines: Baselines) -> Update | None:
        default = baselines.defaults.get("eps")
        groups = baselines.oldest.before.optimizers[0]["param_groups"]
        if not isinstance(default, float) or not any(
            group.get("eps", default) * MIN_EPSILON_RATIO <= default for group in groups
        ):
            return None
        settings = tuple([{**group, "eps": default} for group in step] for step in update.settings)
        return dataclasses.replace(update, settings=settings)


class Precision(Factor):
    """Autocast, against none; a run that has none is at its normal already."""

    id: ClassVar = "precision"
    group: ClassVar = "numerics"
    title: ClassVar = "the low precision"

    @override
    def normal(self, update: Update, baselines: Baselines) -> Update | None:
        return dataclasses.replace(update, in_float32=True) if baselines.is_mixed else None
