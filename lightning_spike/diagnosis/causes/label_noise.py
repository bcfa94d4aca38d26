"""`label_noise`: wrong or shuffled labels in one or several batches."""

import math
from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case, number
from lightning_spike.diagnosis.cause import Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, REFERENCE, SLIGHT, STRONG
from lightning_spike.diagnosis.fixes import dataset_fix, sample_words
from lightning_spike.diagnosis.observations.batch_parts import (
    Unusual,
    class_leaves,
    input_known,
    unusual_input,
    unusual_target,
)
from lightning_spike.diagnosis.observations.measured import all_measured, grown_module
from lightning_spike.diagnosis.observations.order import one_sided
from lightning_spike.diagnosis.observations.tells import (
    batches,
    by_chance,
    jump_without_cause_in_update,
    scattered_batches,
    split_verdict,
    tell,
    without_none,
)
from lightning_spike.records import Change, Evidence, Family

CLEAR: Final = 2.0
"""Factor between a statistic of the input and its usual value from which the input is to blame: harmless augmentation stays below (science.md 2b.6)."""
MANY: Final = 0.25
"""Share of the batch's samples with a higher loss than any of an ordinary batch from which it is not one bad sample."""
FEWEST: Final = 4
"""Samples without which such a share says nothing."""
SOME: Final = 0.25
"""Share of the jump that the lab must give to the batch for its labels to come into question, as in `experiment`."""
LOUD: Final = 5.0
"""Times their usual size from which a module's outputs in that batch are not those of ordinary inputs; an engineering choice."""
SURE: Final = 1.25
"""Times the loss of who guesses by the frequencies of the classes from which the net is sure of another class than the label; 1 is what a net gives that knows nothing."""


class LabelNoise(Cause):
    """Wrong or shuffled labels in one or several batches.

    Seen by: a batch that has a high loss under the weights from before too, though its inputs are as always, and so are the activations that they cause; many of its samples have
    losses higher than any of an ordinary batch; with classes, the loss is even higher than that of guessing by their frequencies: the net is sure, and the labels say otherwise.

    Against it: inputs out of their range; outputs of a module that are many times as large as ever, for labels do not enter the forward pass; a replay that gives the jump to the weights; few
    samples alone.

    Thresholds: ranges are those of the run's own batches; guessing is the entropy of the classes in ordinary batches.

    To do: correct the labels of the samples named, or leave them out; look at how labels are joined to samples.
    """

    id: ClassVar = "label_noise"
    family: ClassVar = Family.DATA
    tested_by: ClassVar = frozenset({"data"})
    title: ClassVar = "Wrong labels"
    explains: ClassVar = frozenset({"bad_batch", "gradient_explosion"})

    @override
    def examine(self, case: Case) -> Examination:
        if not _in_its_samples(case):
            text = "Nothing shows that the samples of that batch have high losses by themselves."
            return Examination(evidence=(tell("batch/sample_loss", text, -STRONG, step=case.step),))
        odd = unusual_input(case)
        if odd is None and (chance := by_chance(case)) is not None:
            return Examination(evidence=(chance,))
        evidence = without_none(
            _inputs(case, odd),
            _targets(case) if odd is None else None,
            _samples(case) if odd is None else None,
            _activations(case) if odd is None else None,
            _above_guessing(case) if odd is None else None,
            _in_the_batch(case) if odd is None else None,
            _finite(case),
            _sorted(case),
            scattered_batches(case, -STRONG),
            split_verdict(
                case,
                {"data": STRONG, "both": SLIGHT, "weights": -STRONG, "noise": -STRONG, "not_reproduced": -FAIR},
            ),
        )
        indices = case.suspect_indices
        return Examination(
            evidence=evidence,
            summary=_summary(case),
            fixes=(
                f"{dataset_fix(case)} Its inputs are ordinary: check the labels.",
                "Look at how labels are joined to samples there: a shifted label file, a join by the wrong key, two classes mixed up.",
                "Until then bear it: label smoothing or a robust loss keeps single wrong labels from pulling hard.",
            ),
            change=Change(setting="drop_samples", value=indices or None),
            confirmed={"data": None, "weights": False}.get(case.split or ""),
        )


def _in_its_samples(case: Case) -> bool:
    """Whether anything shows that it is the batch: the lab's shares, its split, or many samples that stand out. Without it ordinary inputs are a matter of course."""
    if case.blame:
        return case.blame.get("data", 0.0) >= SOME
    if case.lab("split") is not None:
        return case.split in {"data", "both"}
    told = case.suspects or {}
    count, size = number(told.get("count")), number(told.get("batch_size"))
    return count is not None and size is not None and size >= FEWEST and count >= MANY * size


def _finite(case: Case) -> Evidence | None:
    """Wrong labels make a high loss, but none that is not finite."""
    loss = case.at_onset(case.episode.signal)
    if loss is None or math.isfinite(loss):
        return None
    return tell(case.episode.signal, "The first abnormal loss is not finite.", -DECISIVE, step=case.step)


def _sorted(case: Case) -> Evidence | None:
    found = one_sided(case)
    if found is None:
        return None
    text = f"The targets are less mixed than ever in {batches(found[1].count)} in a row: that is a matter of order."
    return tell(found[0], text, -STRONG, step=case.step, observed=found[1].furthest, expected=found[1].usual)


def _inputs(case: Case, odd: Unusual | None) -> Evidence | None:
    if odd is not None:
        weight = -DECISIVE if odd.ratio >= CLEAR else -FAIR
        return tell(odd.signal, odd.text, weight, step=case.step, observed=odd.observed, expected=odd.usual)
    if not input_known(case):
        text = "Of the inputs nothing is known, so that they may as well be to blame."
        return tell("batch/input", text, -STRONG, step=case.step)
    return tell("batch/input", f"The inputs of the batch at step {case.step} are as usual.", FAIR, step=case.step)


def _targets(case: Case) -> Evidence | None:
    """Labels of another make-up on ordinary inputs do not belong to them; only where they are more mixed: fewer kinds are a matter of order."""
    odd = unusual_target(case)
    if odd is None:
        return None
    if odd.statistic == "entropy" and odd.observed > odd.usual:
        return tell(odd.signal, odd.text, FAIR, step=case.step, observed=odd.observed, expected=odd.usual)
    if odd.statistic == "entropy":
        return tell(odd.signal, odd.text, -FAIR, step=case.step, observed=odd.observed, expected=odd.usual)
    return None


def _samples(case: Case) -> Evidence | None:
    """How many samples have a loss above all of an ordinary batch's, under healthy weights."""
    told = _measured(case)
    if told is None:
        return _suspects(case)
    losses, usual = told
    if len(losses) < FEWEST or not usual:
        return None
    high = sum(1 for loss in losses if loss > max(usual))
    share = high / len(losses)
    weight = FAIR if share >= MANY else -FAIR
    text = f"Under healthy weights {high} of the {len(losses)} samples have a loss above all of an ordinary batch's ({max(usual):.3g})."
    return tell("batch/sample_loss", text, weight, step=case.step, observed=max(losses), expected=max(usual))


def _suspects(case: Case) -> Evidence | None:
    told = case.suspects or {}
    count, size = number(told.get("count")), number(told.get("batch_size"))
    if count is None or size is None or size < FEWEST:
        return None
    weight = FAIR if count >= MANY * size else -FAIR
    text = f"{count:.0f} of the {size:.0f} samples of the batch are unlike those of the batches before, under the same weights."
    return tell("batch/sample_loss", text, weight, step=case.step, observed=count)


def _measured(case: Case) -> tuple[list[float], list[float]] | None:
    for detail in all_measured(case):
        lists = [detail.get("losses"), detail.get("usual_losses")]
        if all(isinstance(values, list | tuple) for values in lists):
            losses, usual = ([v for v in map(number, values or ()) if v is not None] for values in lists)
            return losses, usual
    return None


def _activations(case: Case) -> Evidence | None:
    """Whether the net itself found the inputs ordinary: no module's outputs changed, or one's blew up, which labels cannot bring about."""
    grown = grown_module(case)
    if grown is not None and grown[1] >= LOUD:
        text = f"The outputs of '{grown[0]}' were {grown[1]:.3g} times their usual size in that batch: labels do not enter the forward pass."
        return tell("lab/measured", text, -DECISIVE, step=case.step, observed=grown[1], expected=1.0)
    told = next((d for d in all_measured(case) if "modules" in d and "first" in d), None)
    if told is None:
        return None
    if told.get("first") is None:
        text = "The outputs of every module are of the usual size in that batch: its inputs are ordinary to the net, its loss is not."
        return tell("lab/measured", text, FAIR, step=case.step)
    return None


def _above_guessing(case: Case) -> Evidence | None:
    """Cross entropy: who guesses by the frequencies of the classes pays their entropy, a net that is sure of something else pays more."""
    loss = case.at_onset(case.episode.signal)
    before = case.episode.loss_before
    for leaf in class_leaves(case, "target"):
        usual = case.before(f"batch/{leaf}/entropy", REFERENCE)
        if usual.size == 0 or loss is None or before is None or not math.isfinite(loss):
            continue
        guess = float(usual.mean())
        if 0.0 < before < guess and loss >= SURE * guess:
            text = f"The loss of {loss:.3g} is above that of guessing by the frequencies of the classes ({guess:.3g}): the net is sure of other labels than these."
            return tell(case.episode.signal, text, FAIR, step=case.step, observed=loss, expected=guess)
    return None


def _in_the_batch(case: Case) -> Evidence | None:
    return jump_without_cause_in_update(case, sign=1.0, most=FAIR)


def _summary(case: Case) -> str:
    samples = sample_words(case)
    return f"The labels of the batch at step {case.step}{f' ({samples})' if samples else ''} do not fit its inputs, which are ordinary: {case.loss_text}."
