"""Observers of the lab's experiments that causes share, and single results that causes ask for."""

import math
from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.judgement import Group, SplitVerdict
from lightning_spike.diagnosis.observation import Observation, Observer, observer
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.experiments import StepSizeTest
from lightning_spike.records import EpisodeKind
from lightning_spike.store import TrainerStateStore

BLOWN_UP_FACTOR: Final = 30.0
"""Factor over the loss before from which control batches scatter because an operation blows up (x / ~0, exp): a few
updates change far less; engineering choice."""
GREW_WITH_COMPUTATION: Final = 10.0
"""Factor on a module's outputs from which it has blown up where the computation has changed: dropout and flat units
make outputs larger by single factors; engineering choice."""
WILD_SCATTER: Final = math.log(1e4)
"""Scatter of the control batches' log losses from which values blow up in some of them: in ordinary training it is
below 1; engineering choice."""
CHANCE_SLACK: Final = 0.3
"""Standard deviations by which a batch may exceed the expected maximum and still be chance; engineering choice."""


def share_of_jump(groups: frozenset[Group]) -> Observer:
    """Observe the share of the jump that replay gives to these groups."""

    def observe(view: EpisodeView) -> Observation | None:
        share = judgement.tested_share(view.experiments, groups)
        if share is None:
            return None
        level, confirms = judgement.share_level(share), judgement.share_confirms(share)
        return Observation(sentences.jump(view.experiments), level=level, observed=share, confirms=confirms)

    return Observer("share_of_jump", ("confirms", "supports", "undecided", "refutes"), observe, "lab/attribution")


def split_of_jump(groups: frozenset[Group]) -> Observer:
    """Observe the split of the jump into batch and weights, where replay gives no shares.

    Args:
        groups: Those that test the cause (`Cause.tested_by`); a split to the other side refutes it.
    """

    def observe(view: EpisodeView) -> Observation | None:
        found, verdict = view.experiments, view.split
        if view.shares or verdict is None:
            return None
        text = sentences.split_or_change(found)
        share = None if found.split is None else found.split.data
        confirms = judgement.split_refutes(verdict, groups)
        return Observation(text, level=verdict.value, observed=share, confirms=confirms)

    return Observer("split_of_jump", tuple(SplitVerdict), observe, "lab/split")


@observer("wild", signal="lab/split")
def control_scatter(view: EpisodeView) -> Observation | None:
    """Under the snapshot's weights, control losses lie orders of magnitude apart: the trouble is not in one batch."""
    scatter = wild_scatter(view)
    if scatter is None:
        return None
    text = f"Under the snapshot's weights control losses scatter by {sentences.number(scatter)}: not one batch is bad."
    return Observation(text, observed=scatter, expected=view.episode.loss_before)


@observer("ordinary maximum", signal="lab/split")
def chance_maximum(view: EpisodeView) -> Observation | None:
    """Extreme-value check: the maximum of n normal losses is about sqrt(2 ln n) sigma.

    A single batch that lies no further out, and is odd in nothing but its loss, is no outlier.
    """
    split = view.experiments.split
    if split is None or view.split is not SplitVerdict.DATA or not view.transient or not split.noise > 0.0:
        return None
    far = split.data * split.jump / split.noise + judgement.SELECTION_ERRORS
    highest = math.sqrt(2.0 * math.log(max(view.onset, 2)))
    if far >= highest + CHANCE_SLACK:
        return None
    text = (
        f"The batch lies {far:.2g} standard deviations above the others under healthy weights; "
        f"the highest of {view.onset} ordinary batches lies {highest:.2g} above by chance."
    )
    return Observation(text, observed=far, expected=highest)


def grown_module(view: EpisodeView) -> tuple[str, float] | None:
    """The first module with changed outputs, and the factor on their RMS; `None` without one."""
    measured = view.experiments.modules
    first = None if measured is None else judgement.first_changed_module(measured)
    if first is None or not first.usual.rms > 0.0 or not math.isfinite(first.now.rms):
        return None
    return first.module, first.now.rms / first.usual.rms


def computation_changed(view: EpisodeView) -> bool:
    """Whether the old weights and batches now give another loss than the training recorded."""
    split = view.experiments.split
    return split is not None and split.computation >= judgement.SUPPORTING_SHARE


def blown_up(view: EpisodeView) -> tuple[str, float] | None:
    """The module whose outputs blew up although weights and batches are the old ones, and the factor; else `None`."""
    grown = grown_module(view) if computation_changed(view) else None
    return grown if grown is not None and grown[1] >= GREW_WITH_COMPUTATION else None


def gradient_fall(view: EpisodeView) -> tuple[str, str, float] | None:
    """How much more the gradient falls off between two modules than before, where the computation has changed.

    Returns:
        The earlier module, the later one and the factor; `None` without two modules that get a gradient.
    """
    measured = view.experiments.modules
    if measured is None or not computation_changed(view):
        return None
    kept = [
        (m.module, m.now.gradient / m.usual.gradient) for m in measured.modules if m.now.gradient and m.usual.gradient
    ]
    pairs = ((early, late) for k, early in enumerate(kept) for late in kept[k + 1 :])
    falls = [(early[0], late[0], late[1] / early[1]) for early, late in pairs]
    return max(falls, key=lambda fall: fall[2], default=None)


def wild_scatter(view: EpisodeView) -> float | None:
    """Scatter of the control losses (of their logarithms where all are positive), if far above that of training.

    The controls had ordinary losses in the training, so no single batch can cause this.
    """
    split, before = view.experiments.split, view.episode.loss_before
    if split is None or before is None or not math.isfinite(split.noise):
        return None
    return split.noise if split.noise >= max(WILD_SCATTER, BLOWN_UP_FACTOR * before) else None


def finer_shares(view: EpisodeView) -> dict[str, float]:
    """Shares of the parts of the largest factor (momentum, second moments, …); empty where they were not measured."""
    attribution = view.experiments.attribution
    return {} if attribution is None else {share.factor: share.share for share in attribution.finer}


def first_long_test(store: TrainerStateStore) -> StepSizeTest | None:
    """The first step-size test without an episode that found steps too long; `None` where there is none."""
    return next((t for t in store.step_size_tests if judgement.steps_too_long_in_quiet_run(t.result)), None)


def step_size_test(view: EpisodeView) -> StepSizeTest | None:
    """The newest step-size test up to the onset that found steps too long; `None` where there is none.

    In a run without an episode later tests count too.
    """
    until = view.last if view.kind is EpisodeKind.STALL else view.onset
    tests = [t for t in view.store.step_size_tests if t.at.ordinal <= until]
    return next((t for t in reversed(tests) if judgement.steps_too_long_in_quiet_run(t.result)), None)
