"""`distributed_desync`: the ranks of a training no longer hold the same weights, or did not average the same gradients."""

import math
from collections.abc import Mapping
from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.diagnosis.case import Case
from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Examination
from lightning_spike.diagnosis.constants import DECISIVE, FAIR, SLIGHT, STRONG
from lightning_spike.diagnosis.observations.outside import last_that_matters
from lightning_spike.diagnosis.observations.tells import tell
from lightning_spike.records import Change, EpisodeKind, Evidence, Family, Finding

WEIGHTS: Final = "weights_differ"
GRADIENTS: Final = "gradient_differs"
WORTH: Final[Mapping[str, float]] = {
    GRADIENTS: DECISIVE + FAIR,
    WEIGHTS: DECISIVE + FAIR,
    "counters_differ": STRONG,
    "rank_outlier": SLIGHT,
}
"""What each finding of the ranks' comparison weighs: weights and averaged gradients are equal to the bit or something is wrong; one rank's loss may stand out by its data."""
LOOKS: Final = "ranks/weights"
"""Layer rows of which there is one for every look at the ranks."""


class DistributedDesync(Cause):
    """The ranks of a training no longer hold the same weights, or did not average the same gradients.

    Seen by: checksums of every parameter and of every averaged gradient, exchanged between the ranks every few batches, that are not equal; ranks that are at different steps or learning
    rates.

    Against it: one process; ranks that were compared and were equal before the trouble and after it.

    Thresholds: none; under DDP weights and averaged gradients are equal to the bit. They may have parted any time after the last look at which they were equal, so an episode from
    then on may be theirs. A loss that stands out on one rank may be its data, and weighs little.

    To do: with gradients that differ, whatever keeps DDP from averaging; with weights alone, code that writes on some ranks only. Go on from a checkpoint of when they were equal.
    """

    id: ClassVar = "distributed_desync"
    family: ClassVar = Family.ENVIRONMENT
    title: ClassVar = "The ranks have drifted apart"
    applies_to: ClassVar = LOSS_ROSE | {EpisodeKind.STALL, EpisodeKind.OVERFIT}
    explains: ClassVar = frozenset(
        {
            "lr_too_high",
            "warmup_too_short",
            "gradient_explosion",
            "gradient_vanishing",
            "numerical_instability",
            "activation_saturation",
            "weight_blowup",
            "stale_second_moment",
            "adam_epsilon_too_small",
            "momentum_reversal",
            "optimizer_state_corruption",
            "overfitting",
            "post_overfit_oscillation",
            "code_bug",
        }
    )
    standing: ClassVar = frozenset({("ranks", WEIGHTS), ("ranks", GRADIENTS), ("ranks", "counters_differ")})

    @override
    def examine(self, case: Case) -> Examination:
        if case.facts.world_size == 1:
            alone = tell("ranks", "There is one process, and nothing to part from.", -DECISIVE, step=case.step)
            return Examination(evidence=(alone,))
        found = {kind: f for kind in WORTH if (f := last_that_matters(case, "ranks", kind)) is not None}
        if not found:
            return Examination(evidence=(_equal(case),))
        place = _place(found)
        return Examination(
            evidence=tuple(_evidence(kind, f) for kind, f in found.items()),
            summary=_summary(case, found),
            fixes=(_fix(found), _go_back(found)),
            change=None if place is None else Change(setting="code", value=place),
        )


def _evidence(kind: str, found: Finding) -> Evidence:
    text = found.detail.get("text")
    words = text if isinstance(text, str) else f"The comparison of the ranks found: {kind.replace('_', ' ')}."
    count = found.detail.get("count")
    observed = float(count) if isinstance(count, int | float) and math.isfinite(count) else None
    expected = None if observed is None else 0.0
    return tell(
        f"ranks/{kind}",
        f"At step {found.at.step}: {words}",
        WORTH[kind],
        step=found.at.step,
        observed=observed,
        expected=expected,
    )


def _equal(case: Case) -> Evidence:
    looks = [row.at.ordinal for row in case.store.layers.get(LOOKS, ())]
    if any(ordinal >= case.onset for ordinal in looks):
        text = f"The ranks were compared {len(looks)} times, after step {case.step} too, and had the same weights and gradients to the bit."
        return tell(LOOKS, text, -DECISIVE, step=case.step, observed=0.0, expected=0.0)
    return tell(LOOKS, "Nothing shows that the ranks have parted.", -FAIR, step=case.step)


def _place(found: Mapping[str, Finding]) -> str | None:
    return "all_reduce" if GRADIENTS in found else "weights" if WEIGHTS in found else None


def _summary(case: Case, found: Mapping[str, Finding]) -> str:
    hit = found.get(GRADIENTS) or found.get(WEIGHTS)
    if hit is None:
        what = f"The {case.facts.world_size} ranks are not at the same place in the training, as seen at step {next(iter(found.values())).at.step}"
    else:
        thing = "do not get the same averaged gradients" if GRADIENTS in found else "no longer hold the same weights"
        ranks = hit.detail.get("ranks")
        apart = f" (apart: {', '.join(map(str, ranks))})" if isinstance(ranks, list | tuple) and ranks else ""
        what = f"The {case.facts.world_size} ranks {thing}{apart}, as seen at step {hit.at.step}"
    return f"{what}; {case.loss_text}." if case.store.episodes else f"{what}."


def _fix(found: Mapping[str, Finding]) -> str:
    if GRADIENTS in found:
        return (
            "Look at what keeps DDP from averaging: a `no_sync()` that covers the last micro-batch too, a forward pass through the bare module rather than its DDP wrapper, gradients "
            "changed on some ranks after the backward pass, parameters that DDP was told to ignore."
        )
    if WEIGHTS in found:
        return (
            "Look for code that changes weights on some ranks only: under `if trainer.is_global_zero`, with another seed for each rank, or from a file that one rank has read. Do it on all ranks, or "
            "broadcast from rank 0 (`torch.distributed.broadcast`) after it. If gradients are not averaged in some batches only, this looks the same."
        )
    return "Look at what differs between the ranks: number of batches (`DistributedSampler(drop_last=True)`), steps that are skipped on some ranks only, a schedule that is stepped by a metric of one rank's own."


def _go_back(found: Mapping[str, Finding]) -> str:
    hit = found.get(WEIGHTS) or found.get(GRADIENTS) or next(iter(found.values()))
    equal = hit.detail.get("last_equal")
    since = f"batch {equal}" if isinstance(equal, int) else "the start of the run"
    return f"Go on from a checkpoint of {since} or before, when the ranks were last seen equal: averaged gradients do not bring them together again."
