"""What the lab's experiments say, as observers that causes share, and the numbers in them that causes ask for."""

import math
from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.judgement import Group, SplitVerdict
from lightning_spike.diagnosis.observation import Observation, Observer, observer
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.experiments import Experiments, Split, StepSizeTest
from lightning_spike.records import EpisodeKind
from lightning_spike.store import TrainerStateStore

LOST_HOLD: Final = 30.0
"""Factor on a module's outputs in an ordinary batch from which an operation in or before it has lost its hold (x / ~0,
exp); a few updates change far less; engineering choice."""
GREW_WITH_COMPUTATION: Final = 10.0
"""… where the computation is known to have changed: dropout and flat units make outputs larger as well, but by single
factors; engineering choice."""
WILD_SCATTER: Final = math.log(1e4)
"""Scatter of the losses of control batches, or of their logarithms, from which values blow up in some and not in
others: training's own is below 1; engineering choice."""
SELECTION_ERRORS: Final = 2.0
"""Standard deviations that the split takes off a batch's effect, for it was selected as the highest of some."""
CHANCE_SLACK: Final = 0.3
"""By how many standard deviations the highest of so many batches may lie further out still; engineering choice."""


def share_of_jump(groups: frozenset[Group]) -> Observer:
    """The share of the jump that replay gives to these groups."""

    def observe(view: EpisodeView) -> Observation | None:
        share = judgement.tested_share(view.experiments, groups)
        if share is None or view.experiments is None:
            return None
        return Observation(
            level=judgement.share_level(share), text=sentences.jump(view.experiments), signal="lab/attribution",
            step=view.step, observed=share, confirms=judgement.share_confirms(share),
        )  # fmt: skip

    return Observer("share_of_jump", ("confirms", "supports", "undecided", "refutes"), observe)


def split_of_jump(groups: frozenset[Group]) -> Observer:
    """The split of the jump into batch and weights, where no replay went on to share it out.

    Args:
        groups: Those that test the cause (`Cause.tested_by`); a split to the other side refutes it.
    """

    def observe(view: EpisodeView) -> Observation | None:
        found, verdict = view.experiments, view.split
        if view.shares or found is None or verdict is None:
            return None
        share = None if found.split is None else found.split.data
        return Observation(
            level=verdict.value, text=_split_text(found, verdict), signal="lab/split",
            step=view.step, observed=share, confirms=judgement.split_refutes(verdict, groups),
        )  # fmt: skip

    return Observer("split_of_jump", tuple(SplitVerdict), observe)


def _split_text(found: Experiments, verdict: SplitVerdict) -> str:
    if found.outside_change is not None:
        return sentences.outside_change(found.outside_change)
    return "" if found.split is None else sentences.split(found.split, verdict)


@observer("wild")
def control_scatter(view: EpisodeView) -> Observation | None:
    """With the weights of before, control batches have losses orders of magnitude apart.

    The trouble is not in one batch.
    """
    scatter = wild_scatter(view)
    if scatter is None:
        return None
    text = f"Control batches scatter by {sentences.number(scatter)} under the weights from before, so the trouble is not in one batch."
    return Observation(
        level="wild", text=text, signal="lab/split", step=view.step, observed=scatter, expected=view.episode.loss_before
    )


@observer("ordinary maximum")
def chance_maximum(view: EpisodeView) -> Observation | None:
    """Extreme-value check.

    The maximum of n normal losses is about sqrt(2 ln n) sigma, so a single batch no further out is no outlier. Only its
    loss is odd about it.
    """
    split = split_in(view)
    if split is None or view.split is not SplitVerdict.DATA or not view.transient or not split.noise > 0.0:
        return None
    far = split.data * split.jump / split.noise + SELECTION_ERRORS
    highest = math.sqrt(2.0 * math.log(max(view.onset, 2)))
    if far >= highest + CHANCE_SLACK:
        return None
    text = (
        f"The batch lies {far:.2g} standard deviations above the others under healthy weights; "
        f"the highest of {view.onset} ordinary batches lies {highest:.2g} above by chance."
    )
    return Observation(
        level="ordinary maximum", text=text, signal="lab/split", step=view.step, observed=far, expected=highest
    )


def split_in(view: EpisodeView) -> Split | None:
    """The split of this episode; `None` without one."""
    return None if view.experiments is None else view.experiments.split


def grown_module(view: EpisodeView) -> tuple[str, float] | None:
    """The first module in the forward pass whose outputs have changed in size, and the factor by which their root mean square has grown; `None` without one."""
    measured = None if view.experiments is None else view.experiments.modules
    first = None if measured is None else judgement.first_changed_module(measured)
    if first is None or not first.usual.rms > 0.0 or not math.isfinite(first.now.rms):
        return None
    return first.module, first.now.rms / first.usual.rms


def computation_changed(view: EpisodeView) -> bool:
    """Whether the weights and batches of before have another loss than they had in the training."""
    split = split_in(view)
    return split is not None and split.computation >= judgement.SUPPORTING_SHARE


def blown_up(view: EpisodeView) -> tuple[str, float] | None:
    """The module whose outputs are many times as large with the weights and batches of before, and how many times; `None` where the computation has not changed, or not so."""
    grown = grown_module(view) if computation_changed(view) else None
    return grown if grown is not None and grown[1] >= GREW_WITH_COMPUTATION else None


def gradient_fall(view: EpisodeView) -> tuple[str, str, float] | None:
    """How much more the gradient falls off on its way back than it did, where the computation has changed.

    The module that gets least of it, a later one, and the factor; `None` without two that get any.
    """
    measured = None if view.experiments is None else view.experiments.modules
    if measured is None or not computation_changed(view):
        return None
    kept = [
        (m.module, m.now.gradient / m.usual.gradient) for m in measured.modules if m.now.gradient and m.usual.gradient
    ]
    pairs = ((early, late) for k, early in enumerate(kept) for late in kept[k + 1 :])
    falls = [(early[0], late[0], late[1] / early[1]) for early, late in pairs]
    return max(falls, key=lambda fall: fall[2], default=None)


def wild_scatter(view: EpisodeView) -> float | None:
    """How far apart the losses of control batches are with the weights of before, or their logarithms where all are positive; `None` where they are in training's own range.

    That some of them lie orders of magnitude above the others, which had ordinary losses in the training, no single
    batch can bring about.
    """
    split, before = split_in(view), view.episode.loss_before
    if split is None or before is None or not math.isfinite(split.noise):
        return None
    return split.noise if split.noise >= max(WILD_SCATTER, LOST_HOLD * before) else None


def first_long_test(store: TrainerStateStore) -> StepSizeTest | None:
    """The first test without an episode that found steps too long; `None` where there is none."""
    return next((t for t in store.step_size_tests if judgement.steps_too_long_in_quiet_run(t.result)), None)


def step_size_test(view: EpisodeView) -> StepSizeTest | None:
    """The newest test without an episode that found steps too long.

    Up to the onset, and at any time where nothing but a quiet run is known; `None` where there is none.
    """
    until = view.last if view.kind is EpisodeKind.STALL else view.onset
    found = [
        t for t in view.store.step_size_tests
        if t.at.ordinal <= until and judgement.steps_too_long_in_quiet_run(t.result)
    ]  # fmt: skip
    return found[-1] if found else None
