"""`label_noise`: wrong or shuffled labels in one or several batches.

Seen by: a batch with a high loss under the weights from before too, though its inputs are ordinary, and so are the
activations that they cause; many of its samples have losses higher than any of an ordinary batch; with classes, a loss
even higher than that of a class-prior predictor: the model is confident, and the labels disagree.

Against it: inputs out of their range; outputs of a module many times their usual size, for labels do not enter the
forward pass; a replay that gives the jump to the weights; few samples alone.

Thresholds: ranges are those of the run's own batches; a class-prior predictor pays the entropy of the classes in
ordinary batches.

To do: correct the labels of the samples named, or leave them out; look at how labels are joined to samples.
"""

import math
from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.constants import REFERENCE
from lightning_spike.diagnosis.fixes import dataset_fix, sample_words
from lightning_spike.diagnosis.judgement import Group, SplitVerdict
from lightning_spike.diagnosis.observation import Observation, Observer, first_of, observer
from lightning_spike.diagnosis.observations.batch_parts import (
    class_leaves,
    input_known,
    unusual_input,
    unusual_target,
)
from lightning_spike.diagnosis.observations.experiments import (
    chance_maximum,
    control_scatter,
    grown_module,
    split_in,
    split_of_jump,
)
from lightning_spike.diagnosis.observations.sample_order import one_sided
from lightning_spike.diagnosis.observations.shared_evidence import batches, jump_after_ordinary_updates
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Family

CLEARLY_ODD_INPUT: Final = 2.0
"""Factor between a statistic of the input and its usual value from which the input is odd: harmless augmentation stays
below (science.md 2b.6)."""
MANY_SAMPLES_SHARE: Final = 0.25
"""Share of the samples with a higher loss than any of an ordinary batch from which it is not one bad sample;
engineering choice."""
MIN_SAMPLES_FOR_SHARE: Final = 4
"""Samples without which such a share says nothing; engineering choice."""
OVERSIZED_OUTPUTS: Final = 5.0
"""Times their usual size from which a module's outputs are not those of ordinary inputs; engineering choice."""
CONFIDENTLY_WRONG: Final = 1.25
"""Loss / class entropy above which the model is confidently wrong (1 = a class-prior predictor); engineering choice."""


@observer("not in its samples")
def high_loss_of_its_own(view: EpisodeView) -> Observation | None:
    """The premise: the batch's own samples have high losses. Without it ordinary inputs mean nothing."""
    if _in_its_samples(view):
        return None
    text = "Nothing shows that the samples of that batch have high losses of their own."
    return Observation(level="not in its samples", text=text, signal="batch/sample_loss", step=view.step)


@observer("ordinary maximum", name="chance_maximum")
def only_a_chance_maximum(view: EpisodeView) -> Observation | None:
    """A batch with ordinary inputs whose loss is no higher than the highest of so many by chance."""
    return chance_maximum(view) if view.once(unusual_input) is None else None


@observer("clearly odd", "odd", "unknown", "ordinary")
def inputs(view: EpisodeView) -> Observation | None:
    """Whether the inputs of the batch are ordinary."""
    odd = view.once(unusual_input)
    if odd is not None:
        level = "clearly odd" if odd.ratio >= CLEARLY_ODD_INPUT else "odd"
        return Observation(
            level=level, text=odd.text, signal=odd.signal, step=view.step, observed=odd.observed, expected=odd.usual
        )
    if not input_known(view):
        text = "The inputs were not recorded, so they may be the reason as well."
        return Observation(level="unknown", text=text, signal="batch/input", step=view.step)
    text = f"The inputs of the batch at step {view.step} are in their usual range."
    return Observation(level="ordinary", text=text, signal="batch/input", step=view.step)


@observer("more mixed", "less mixed")
def _targets(view: EpisodeView) -> Observation | None:
    """More mixed labels do not belong to ordinary inputs; fewer kinds are a matter of order."""
    odd = unusual_target(view)
    if odd is None or odd.statistic != "entropy":
        return None
    level = "more mixed" if odd.observed > odd.usual else "less mixed"
    return Observation(
        level=level, text=odd.text, signal=odd.signal, step=view.step, observed=odd.observed, expected=odd.usual
    )


@observer("many", "few")
def _sample_losses(view: EpisodeView) -> Observation | None:
    """How many samples have a loss above all of an ordinary batch's, under healthy weights."""
    found = None if view.experiments is None else view.experiments.samples
    losses = () if found is None else tuple(v for v in found.losses if math.isfinite(v))
    usual = () if found is None else tuple(v for v in found.usual_losses if math.isfinite(v))
    if found is None or len(losses) < MIN_SAMPLES_FOR_SHARE or not usual:
        return None
    high = sum(1 for loss in losses if loss > max(usual))
    return Observation(
        level="many" if high >= MANY_SAMPLES_SHARE * len(losses) else "few", text=sentences.samples(found),
        signal="batch/sample_loss", step=view.step, observed=max(losses), expected=max(usual),
    )  # fmt: skip


@observer("many", "few")
def _suspect_samples(view: EpisodeView) -> Observation | None:
    found = view.suspects if view.experiments is None or view.experiments.samples is None else None
    count, size = (None, None) if found is None else (found.number("count"), found.number("batch_size"))
    if count is None or size is None or size < MIN_SAMPLES_FOR_SHARE:
        return None
    level = "many" if count >= MANY_SAMPLES_SHARE * size else "few"
    text = f"{count:.0f} of the {size:.0f} samples differ from those of the batches before, under the same weights."
    return Observation(level=level, text=text, signal="batch/sample_loss", step=view.step, observed=count)


@observer("oversized", "ordinary")
def _activations(view: EpisodeView) -> Observation | None:
    """Whether the inputs are ordinary to the network itself.

    No module's outputs changed, or one's blew up, which labels cannot cause.
    """
    found = None if view.experiments is None else view.experiments.modules
    if found is None:
        return None
    grown = grown_module(view)
    if grown is not None and grown[1] >= OVERSIZED_OUTPUTS:
        level, observed = "oversized", grown[1]
    elif judgement.first_changed_module(found) is None:
        level, observed = "ordinary", 1.0
    else:
        return None
    text = f"{sentences.modules(found)} Labels do not enter the forward pass."
    return Observation(level=level, text=text, signal="lab/modules", step=view.step, observed=observed, expected=1.0)


@observer("confidently wrong")
def _loss_above_prior(view: EpisodeView) -> Observation | None:
    """Cross-entropy above that of a class-prior predictor, which pays the entropy of the classes."""
    loss, before = view.at_onset(view.episode.signal), view.episode.loss_before
    for leaf in class_leaves(view, "target"):
        usual = view.before(f"batch/{leaf}/entropy", REFERENCE)
        if usual.size == 0 or loss is None or before is None or not math.isfinite(loss):
            continue
        prior = float(usual.mean())
        if 0.0 < before < prior and loss >= CONFIDENTLY_WRONG * prior:
            text = f"The loss of {loss:.3g} exceeds that of a class-prior predictor ({prior:.3g}): the model is confident in other labels."
            return Observation(
                level="confidently wrong",
                text=text,
                signal=view.episode.signal,
                step=view.step,
                observed=loss,
                expected=prior,
            )
    return None


def _if_inputs_are_ordinary(*observers: Observer) -> tuple[Observer, ...]:
    """Observers that say nothing where the inputs are odd: then labels are not in question."""

    def guarded(one: Observer) -> Observer:
        return Observer(one.name, one.levels, lambda view: one(view) if view.once(unusual_input) is None else None)

    return tuple(guarded(one) for one in observers)


@observer("non-finite")
def loss_nonfinite(view: EpisodeView) -> Observation | None:
    """Wrong labels make a high loss, but no non-finite one."""
    loss = view.at_onset(view.episode.signal)
    if loss is None or math.isfinite(loss):
        return None
    text = "The first abnormal loss is not finite."
    return Observation(level="non-finite", text=text, signal=view.episode.signal, step=view.step)


@observer("one-sided")
def sorted_samples(view: EpisodeView) -> Observation | None:
    """Targets that are less mixed than ever are a matter of order."""
    found = view.once(one_sided)
    if found is None:
        return None
    text = f"The targets are less mixed than ever in {batches(found[1].count)} in a row: a matter of order."
    return Observation(
        level="one-sided",
        text=text,
        signal=found[0],
        step=view.step,
        observed=found[1].furthest,
        expected=found[1].usual,
    )


def _in_its_samples(view: EpisodeView) -> bool:
    """Whether the shares, the split, or many samples that stand out show that it is the batch."""
    if view.shares:
        return view.shares.get(Group.DATA, 0.0) >= judgement.SUPPORTING_SHARE
    if split_in(view) is not None or view.split is not None:
        return view.split in {SplitVerdict.DATA, SplitVerdict.BOTH}
    found = _suspect_samples(view)
    return found is not None and found.level == "many"


def _summary(view: EpisodeView) -> str:
    samples = sample_words(view)
    named = f" ({samples})" if samples else ""
    return f"The labels of the batch at step {view.step}{named} do not fit its ordinary inputs: {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    return (
        dataset_fix(view, more=" Its inputs are ordinary: check the labels."),
        Fix(
            "Look at how labels are joined to samples: a shifted label file, a join by the wrong key, two classes mixed up."
        ),
        Fix("Until then, label smoothing or a robust loss keeps single wrong labels from pulling hard."),
    )


TESTED_BY: Final = frozenset({Group.DATA})

CAUSE: Final = Cause(
    id="label_noise",
    family=Family.DATA,
    title="Wrong labels",
    meaning="wrong or shuffled labels in one or several batches",
    requires=(high_loss_of_its_own, only_a_chance_maximum),
    observations=(
        inputs,
        *_if_inputs_are_ordinary(
            _targets,
            first_of("samples", _sample_losses, _suspect_samples),
            _activations,
            _loss_above_prior,
            jump_after_ordinary_updates,
        ),
        loss_nonfinite,
        sorted_samples,
        control_scatter,
        split_of_jump(TESTED_BY),
    ),
    summary=_summary,
    fixes=_fixes,
    explains=frozenset({"bad_batch"}),
    tested_by=TESTED_BY,
)
