"""Attributes the damage of updates to their factors, by replays with one factor reset to its normal value."""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from lightning_spike.diagnosis.judgement import SUPPORTING_SHARE
from lightning_spike.experiments import Attribution, FactorShare
from lightning_spike.lab.experiments.damage_location import Damage
from lightning_spike.lab.experiments.factors import (
    Baselines,
    Batch,
    Clipping,
    Epsilon,
    Factor,
    LearningRate,
    Momentum,
    NamedSamples,
    OptimizerState,
    Precision,
    SecondMoments,
)
from lightning_spike.lab.experiments.sample_exchange import name_samples, passes_to_name
from lightning_spike.lab.replay.evaluate import Numbers, log_scale, losses_under
from lightning_spike.lab.replay.loss_after_updates import loss_after_updates
from lightning_spike.lab.replay.reproduce import ReplayedUpdate, Reproduction
from lightning_spike.lab.replay.update import Update
from lightning_spike.lab.scene import Scene
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.sandbox.isolation import Sandbox

BASELINE_STEPS: Final = 32
"""Optimizer steps whose median rate is the recent normal one (science.md 2b.4)."""
FIRST: Final[tuple[Factor, ...]] = (LearningRate(), OptimizerState(), Batch(), Clipping())
"""The factors that are always tried, together: 2^3 outcomes (science.md 2b.4), for the clipping is hardly ever
another."""
FURTHER: Final[Mapping[str, tuple[Factor, ...]]] = {
    "batch": (NamedSamples(),),
    "optimizer_state": (Momentum(), SecondMoments(), Epsilon()),
    "intrinsic": (Epsilon(), Precision()),
}
"""Factors tested if one of the first factors, or the remainder, has a large enough share."""
SUFFICIENT_SHARE: Final = 0.85
"""Share of the damage from which a factor is sufficient or necessary; engineering choice."""
RESERVED: Final = 16
"""Passes that are kept for the step-size experiment, which bears on the shares of the jump; engineering choice."""

MAX_BATCHES_WITH_NAMED_SAMPLES: Final = 2
"""Batches up to which samples are named: each costs two to three passes; engineering choice."""
ODD_BATCH_ERRORS: Final = 2.0
"""Standard deviations of ordinary batches above which a batch is odd, as in `lab.experiments.split`."""


def recent_baselines(scene: Scene, replay: Reproduction, leg: int, controls: Sequence[RingEntry]) -> Baselines:
    """Returns the normal values before one of the kept updates.

    Args:
        scene: The episode.
        replay: Its replay.
        leg: The place of the update in `replay.updates_replayed`.
        controls: Ordinary batches, the most ordinary first.
    """
    before = replay.updates_replayed[leg].update.ordinal
    ordinals = sorted(k for k in scene.settings if k < before)[-BASELINE_STEPS:]
    optimizer = scene.trainer.optimizers[0]
    return Baselines(
        updates_replayed=replay.updates_replayed[: leg + 1],
        controls=controls,
        settings=[step for k in ordinals for step in scene.settings[k]],
        defaults=_defaults(type(optimizer)),
        is_mixed="mixed" in str(scene.trainer.precision),
    )


def attribute(
    sandbox: Sandbox,
    damage: Damage,
    updates_replayed: Sequence[ReplayedUpdate],
    baselines: Baselines,
    controls: Sequence[RingEntry],
    *,
    like: RingEntry,
    scatter: float,
) -> Attribution:
    """Which of the factors made the damage of an update, alone and together.

    Every combination of the factors that were not normal is run: those in it as they were, the others at their recent
    normal value; the worth of a combination is the control batches' loss after the update. The shares are Shapley
    values, batch by batch of the controls, which gives their uncertainty. Where one factor is both enough and needed,
    two combinations tell and the others are not run; where one takes nearly all of the damage away by itself, it is not
    combined with others. Costs up to 2^3 updates and evaluations, and as many again where one factor is looked into; an
    update that is known already is not made again.

    Args:
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        damage: The update's, from `damage_on_the_way`.
        updates_replayed: The updates that did it.
        baselines: What was normal before the first of them.
        controls: The batches that `damage` was measured on.
        like: Whose random state all evaluations are given.
        scatter: Standard deviation of the log-loss from batch to batch.
    """
    cells = _Cells(sandbox, updates_replayed, baselines, controls, like, damage)
    odd_batch = _is_odd(sandbox, updates_replayed, controls, like=like, scatter=scatter)
    # An ordinary batch is at its normal value: to exchange it would double the combinations, and blame it for what
    # everything else met.
    shares, normal, intrinsic = cells.shares([f for f in FIRST if odd_batch or f.group != "data"])
    normal += [f.id for f in FIRST if f.group == "data" and not odd_batch]
    largest = max(shares, key=lambda s: s.share, default=None)
    closer = "intrinsic" if largest is None or intrinsic > largest.share else largest.factor
    finer: list[FactorShare] = []
    if closer in FURTHER and max(intrinsic, largest.share if largest else 0.0) >= SUPPORTING_SHARE:
        finer, further = cells.closer(closer)
        normal += further
    at = updates_replayed[0].update.entries[-1].at
    return Attribution(
        ordinal=at.ordinal,
        step=at.step,
        updates=len(updates_replayed),
        damage=damage.log_rise,
        shares=tuple(shares),
        finer=tuple(finer),
        odd_batch=odd_batch,
        intrinsic=intrinsic,
        at_baseline=tuple(normal),
    )


class _Cells:
    """The outcomes of one update under combinations of factors, each made once."""

    def __init__(
        self,
        sandbox: Sandbox,
        updates_replayed: Sequence[ReplayedUpdate],
        baselines: Baselines,
        controls: Sequence[RingEntry],
        like: RingEntry,
        damage: Damage,
    ) -> None:
        self._bench, self._legs, self._around = sandbox, updates_replayed, baselines
        self._controls, self._like, self._damage = controls, like, damage
        self._known: dict[frozenset[str], Numbers] = {frozenset(): damage.after}

    def shares(self, factors: Sequence[Factor]) -> tuple[list[FactorShare], list[str], float]:
        """Shares of the factors that were not normal, the largest first.

        The names of those that were; and what is left with all of them normal.
        """
        active = self._active(factors)
        normal = [factor.id for factor in factors if factor not in active]
        alone = next((found for factor in active if (found := self._alone(factor, active)) is not None), None)
        if alone is not None:
            return [alone], normal, max(1.0 - alone.share, 0.0)
        by_id = {factor.id: factor for factor in active}
        cure = self._cure(active)

        def rise(actual: frozenset[str]) -> Numbers:
            usual = [f for f in active if f.id not in actual]
            return self._rise([cure] if cure in usual else usual)

        shares = [self._share(by_id[name], part) for name, part in shapley(list(by_id), rise).items()]
        return sorted(shares, key=lambda s: -s.share), normal, self._part(rise(frozenset()))

    def closer(self, name: str) -> tuple[list[FactorShare], list[str]]:
        """Divides a factor's damage among finer factors.

        Nothing where that does not fit into the sandbox's allowance.
        """
        if name == "batch":
            self._name_samples()
        factors = FURTHER[name]
        combinations = 2 ** len(self._active(factors)) - 1
        made = sum(len(leg.update.entries) for leg in self._legs)
        passes = RESERVED + combinations * len(self._controls)
        if combinations and not self._bench.affords("what that is made of", updates=combinations * made, passes=passes):
            return [], []
        finer, normal, _ = self.shares(factors)
        return finer, normal

    def _cure(self, active: Sequence[Factor]) -> Factor | None:
        """A factor that takes nearly all of the damage away by itself.

        What others at their normal values take of the rest is not worth as many runs again.
        """
        return next((f for f in active if 1.0 - self._part(self._rise([f])) >= SUFFICIENT_SHARE), None)

    def _name_samples(self) -> None:
        """Look for samples that stand out in the batches of the updates, where these are few."""
        entries = [entry for leg in self._legs for entry in leg.update.entries]
        weights, needed = self._legs[0].before.weights, sum(map(passes_to_name, entries))
        if len(entries) > MAX_BATCHES_WITH_NAMED_SAMPLES or not self._bench.affords(
            "samples that stand out in that batch", gradients=needed
        ):
            return
        named = {e.at.ordinal: name_samples(self._bench, weights, e, self._controls) for e in entries}
        self._around = dataclasses.replace(self._around, named=named)

    def _alone(self, factor: Factor, active: Sequence[Factor]) -> FactorShare | None:
        """The factor's share if it is sufficient (all others normal) and necessary (it alone normal), else `None`.

        Then other combinations are not needed: without interaction the Shapley value lies between the two.
        """
        enough = self._rise([other for other in active if other is not factor])
        if self._part(enough) < SUFFICIENT_SHARE:
            return None
        needed = self._rise([]) - self._rise([factor])
        return self._share(factor, (enough + needed) / 2) if self._part(needed) >= SUFFICIENT_SHARE else None

    def _share(self, factor: Factor, rise: Numbers) -> FactorShare:
        return FactorShare(factor=factor.id, group=factor.group, share=self._part(rise), error=self._error(rise))

    def _active(self, factors: Sequence[Factor]) -> list[Factor]:
        """The factors that were not normal on one rank at least."""
        ranks = self._bench.ranks
        return [f for f in factors if ranks.any(f.id, mine=self._is_changed(f))]

    def _is_changed(self, factor: Factor) -> bool:
        return any(factor.normal(leg.update, self._around) is not None for leg in self._legs)

    def _rise(self, normal: Sequence[Factor]) -> Numbers:
        """Rise of the control batches' losses over the update with these factors normal, batch by batch."""
        names = frozenset(factor.id for factor in normal)
        if names not in self._known:
            self._known[names] = self._outcome(normal)
        before, after = self._damage.before, self._known[names]
        scale = log_scale(before, self._damage.after)
        return np.asarray(scale(after) - scale(before), dtype=np.float64)

    def _outcome(self, normal: Sequence[Factor]) -> Numbers:
        updates = [self._changed(leg.update, normal, place) for place, leg in enumerate(self._legs)]
        after = loss_after_updates(self._bench, self._legs[0].before, updates, self._controls, like=self._like)
        return np.full(len(self._controls), math.nan) if after is None else after

    def _changed(self, update: Update, normal: Sequence[Factor], place: int) -> Update:
        for factor in normal:
            update = factor.normal(update, self._around) or update
        # The state is put back before the first of them; from then on it is what the updates make of it.
        return update if place == 0 else dataclasses.replace(update, optimizers=None)

    def _part(self, rise: Numbers) -> float:
        whole = self._damage.log_rise
        return float(rise.mean()) / whole if whole > 0 else 0.0

    def _error(self, rise: Numbers) -> float:
        whole = self._damage.log_rise
        return float(rise.std(ddof=1) / math.sqrt(len(rise))) / whole if whole > 0 and len(rise) > 1 else math.nan


def _is_odd(
    sandbox: Sandbox,
    updates_replayed: Sequence[ReplayedUpdate],
    controls: Sequence[RingEntry],
    *,
    like: RingEntry,
    scatter: float,
) -> bool:
    """Whether a batch of the updates had a loss out of the ordinary for the weights that it met.

    After a first blow all losses are high.
    """
    for leg in updates_replayed:
        usual = losses_under(sandbox, leg.before.weights, controls, like=like, held=True)
        own = np.array(leg.made.losses)
        scale = log_scale(own, usual)
        apart = float(scale(usual).std(ddof=1)) if len(usual) > 1 else 0.0
        if float(scale(own).max() - scale(usual).mean()) > ODD_BATCH_ERRORS * max(scatter, apart):
            return True
    return False


def _defaults(kind: type) -> Mapping[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def combinations(players: Sequence[str]) -> list[frozenset[str]]:
    """All subsets, the empty one first."""
    sizes = range(len(players) + 1)
    return [frozenset(chosen) for size in sizes for chosen in itertools.combinations(players, size)]


def shapley(players: Sequence[str], value: Callable[[frozenset[str]], Numbers]) -> dict[str, Numbers]:
    """Each player's mean contribution over all orders in which they can come (Shapley 1953).

    They add up to the value of all together less that of none; a player who never changes the value gets 0.

    Args:
        players: Names, each once; the cost grows as 2^n.
        value: Of a coalition; any array, the same shape for all. The values are taken entry by entry, so that a row of
            repetitions gives a row of shares.
    """
    n = len(players)
    worth = {coalition: np.asarray(value(coalition), dtype=np.float64) for coalition in combinations(players)}
    weight = [math.factorial(k) * math.factorial(n - k - 1) / math.factorial(n) for k in range(n)]
    return {
        player: np.asarray(
            sum(weight[len(s)] * (worth[s | {player}] - worth[s]) for s in worth if player not in s), dtype=np.float64
        )
        for player in players
    }
