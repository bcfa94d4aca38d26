"""`label_noise`: wrong or shuffled labels in one or several batches.

Seen by: a batch with a high loss under the old weights too, although its inputs and their activations are ordinary;
many of its samples have losses higher than any of an ordinary batch; with classes, a loss even higher than that of a
class-prior predictor: the model is confident, and the labels disagree.

Against it: inputs out of their range; outputs of a module many times their usual size, as labels do not enter the
forward pass; a replay that gives the jump to the weights; few samples alone.

Thresholds: ranges are those of the run's own batches; a class-prior predictor has the entropy of the classes in
ordinary batches as its loss.

To do: correct the labels of the named samples, or leave them out; look at how labels are joined to samples.
"""

import math
from typing import Final

from lightning_spike.diagnosis import judgement, sentences
from lightning_spike.diagnosis.batch_ranges import REFERENCE
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.fixes import dataset_fix, sample_words
from lightning_spike.diagnosis.judgement import Group, SplitVerdict
from lightning_spike.diagnosis.observation import Observation, first_of, observer, only_if, premise
from lightning_spike.diagnosis.observations.batch_parts import (
    MIN_SAMPLES_FOR_SHARE,
    class_leaves,
    differing_samples,
    input_known,
    unusual_input,
    unusual_target,
)
from lightning_spike.diagnosis.observations.experiments import (
    chance_maximum,
    control_scatter,
    grown_module,
    split_of_jump,
)
from lightning_spike.diagnosis.observations.sample_order import sorted_samples
from lightning_spike.diagnosis.observations.shared_evidence import CLEARLY_ODD, jump_after_ordinary_updates
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Family

MANY_SAMPLES_SHARE: Final = 0.25
"""Share of the samples with a higher loss than any of an ordinary batch from which it is more than one bad sample;
engineering choice."""
OVERSIZED_OUTPUTS: Final = 5.0
"""Multiple of their usual size from which a module's outputs do not come from ordinary inputs; engineering choice."""
CONFIDENTLY_WRONG: Final = 1.25
"""Loss / class entropy above which the model is confidently wrong (1 = a class-prior predictor); engineering choice."""


@observer("clearly odd", "odd", "unknown", "ordinary", signal="batch/input")
def inputs(view: EpisodeView) -> Observation | None:
    """Whether the inputs of the batch are ordinary."""
    odd = view.once(unusual_input)
    if odd is not None:
        level = "clearly odd" if odd.ratio >= CLEARLY_ODD else "odd"
        return Observation(odd.text, level=level, signal=odd.signal, observed=odd.observed, expected=odd.usual)
    if not input_known(view):
        return Observation("The inputs were not recorded, so they may be the cause as well.", level="unknown")
    text = f"The inputs of the batch at step {view.step} are in their usual range."
    return Observation(text, level="ordinary")


@observer("more mixed", "less mixed")
def _targets(view: EpisodeView) -> Observation | None:
    """More mixed labels do not belong to ordinary inputs; less mixed ones are sorted samples."""
    odd = unusual_target(view)
    if odd is None or odd.statistic != "entropy":
        return None
    level = "more mixed" if odd.observed > odd.usual else "less mixed"
    return Observation(odd.text, level=level, signal=odd.signal, observed=odd.observed, expected=odd.usual)


@observer("many", "few", signal="batch/sample_loss")
def _sample_losses(view: EpisodeView) -> Observation | None:
    """How many samples have a loss above all of an ordinary batch's, under healthy weights."""
    found = view.experiments.samples
    losses = () if found is None else tuple(v for v in found.losses if math.isfinite(v))
    usual = () if found is None else tuple(v for v in found.usual_losses if math.isfinite(v))
    if found is None or len(losses) < MIN_SAMPLES_FOR_SHARE or not usual:
        return None
    high = sum(1 for loss in losses if loss > max(usual))
    level = "many" if high >= MANY_SAMPLES_SHARE * len(losses) else "few"
    return Observation(sentences.samples(found), level=level, observed=max(losses), expected=max(usual))


@observer("many", "few", signal="batch/sample_loss")
def _suspect_samples(view: EpisodeView) -> Observation | None:
    found = differing_samples(view) if view.experiments.samples is None else None
    if found is None:
        return None
    count, size, text = found
    return Observation(text, level="many" if count >= MANY_SAMPLES_SHARE * size else "few", observed=count)


@observer("oversized", "ordinary", signal="lab/modules")
def _activations(view: EpisodeView) -> Observation | None:
    """Whether the inputs are ordinary to the network: no module's outputs changed, or one's blew up."""
    found = view.experiments.modules
    if found is None:
        return None
    level, grown = "ordinary", grown_module(view)
    if grown is not None and grown[1] >= OVERSIZED_OUTPUTS:
        level = "oversized"
    elif judgement.first_changed_module(found) is not None:
        return None
    text = f"{sentences.modules(found)} Labels do not enter the forward pass."
    seen = grown[1] if grown is not None and level == "oversized" else 1.0
    return Observation(text, level=level, observed=seen, expected=1.0)


@observer("confidently wrong")
def _loss_above_prior(view: EpisodeView) -> Observation | None:
    """A cross-entropy above that of a class-prior predictor, which is the entropy of the classes."""
    loss, before = view.at_onset(view.episode.signal), view.episode.loss_before
    if loss is None or before is None or not math.isfinite(loss):
        return None
    usual = (view.before(f"batch/{leaf}/entropy", REFERENCE) for leaf in class_leaves(view, "target"))
    priors = (float(entropy.mean()) for entropy in usual if entropy.size)
    prior = next((p for p in priors if 0.0 < before < p and loss >= CONFIDENTLY_WRONG * p), None)
    if prior is None:
        return None
    text = f"The loss of {loss:.3g} exceeds that of a class-prior predictor ({prior:.3g}): confidently wrong."
    return Observation(text, observed=loss, expected=prior)


def _inputs_are_ordinary(view: EpisodeView) -> bool:
    """Whether the inputs are ordinary; odd inputs explain the loss without wrong labels."""
    return view.once(unusual_input) is None


@observer("non-finite")
def loss_nonfinite(view: EpisodeView) -> Observation | None:
    """Wrong labels make a high loss, but no non-finite one."""
    loss = view.at_onset(view.episode.signal)
    return None if loss is None or math.isfinite(loss) else Observation("The first abnormal loss is not finite.")


def _in_its_samples(view: EpisodeView) -> bool:
    """Whether shares, split or many outlier samples show that the batch itself has the high loss."""
    if view.shares:
        return view.shares.get(Group.DATA, 0.0) >= judgement.SUPPORTING_SHARE
    if view.experiments.split is not None or view.split is not None:
        return view.split in {SplitVerdict.DATA, SplitVerdict.BOTH}
    found = _suspect_samples(view)
    return found is not None and found.level == "many"


high_loss_of_its_own = premise(
    "high_loss_of_its_own", _in_its_samples, "not in its samples",
    "Nothing shows that the samples of that batch have high losses of their own.", signal="batch/sample_loss",
)  # fmt: skip
"""The premise: the batch's own samples have high losses. Without it ordinary inputs mean nothing."""


def _summary(view: EpisodeView) -> str:
    samples = sample_words(view)
    named = f" ({samples})" if samples else ""
    return f"The labels of the batch at step {view.step}{named} do not fit its ordinary inputs: {view.loss_text}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    return (
        dataset_fix(view, more=" Its inputs are ordinary: check the labels."),
        Fix("Check how labels are joined to samples: a shifted label file, a wrong join key, two classes mixed up."),
        Fix("Until then, label smoothing or a robust loss limits the effect of single wrong labels."),
    )


TESTED_BY: Final = frozenset({Group.DATA})

CAUSE: Final = Cause(
    id="label_noise",
    family=Family.DATA,
    title="Wrong labels",
    meaning="wrong or shuffled labels in one or several batches",
    requires=(high_loss_of_its_own, only_if(_inputs_are_ordinary, chance_maximum)),
    observations=(
        inputs,
        only_if(_inputs_are_ordinary, _targets),
        only_if(_inputs_are_ordinary, first_of("samples", _sample_losses, _suspect_samples)),
        only_if(_inputs_are_ordinary, _activations),
        only_if(_inputs_are_ordinary, _loss_above_prior),
        only_if(_inputs_are_ordinary, jump_after_ordinary_updates),
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
