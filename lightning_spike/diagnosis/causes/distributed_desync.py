"""`distributed_desync`: the ranks hold different weights, or did not average the same gradients.

Seen by: checksums of every parameter and every averaged gradient, exchanged between the ranks every few batches, that
differ; ranks that are at different steps or learning rates.

Against it: one process; ranks that were equal before the episode and after it.

Thresholds: none; under DDP weights and averaged gradients are equal to the bit. The ranks may have parted any time
after the last look at which they were equal, so this may have caused any episode since. A loss that is an outlier on
one rank may be due to its data, and weighs little.

To do: if gradients differ, find what keeps DDP from averaging; if only weights differ, find code that writes on some
ranks. Go on from a checkpoint from before the difference.
"""

from typing import Final

from lightning_spike.diagnosis.cause import LOSS_ROSE, Cause, Fix
from lightning_spike.diagnosis.observation import Observation, Observer, observer
from lightning_spike.diagnosis.observations.outside import last_that_matters
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import Change, EpisodeKind, Family, Finding

WEIGHTS: Final = "weights_differ"
GRADIENTS: Final = "gradient_differs"
COUNTERS: Final = "counters_differ"
KINDS: Final = (GRADIENTS, WEIGHTS, COUNTERS, "rank_outlier")
LOOKS: Final = "ranks/weights"
"""Layer rows with one row per comparison of the ranks."""
FIXES: Final = {
    GRADIENTS: (
        "Look at what keeps DDP from averaging: a `no_sync()` that covers the last micro-batch too, a forward pass "
        "through the bare module rather than its DDP wrapper, gradients changed on some ranks after the backward pass, "
        "parameters that DDP was told to ignore."
    ),
    WEIGHTS: (
        "Look for code that changes weights on some ranks only: under `if trainer.is_global_zero`, with another seed "
        "for each rank, or from a file that one rank has read. Do it on all ranks, or broadcast from rank 0 "
        "(`torch.distributed.broadcast`) after it. Gradients that are not averaged in some batches only look the same."
    ),
    COUNTERS: (
        "Look at what differs between the ranks: number of batches (`DistributedSampler(drop_last=True)`), steps that "
        "are skipped on some ranks only, a schedule that is stepped by a metric of one rank's own."
    ),
}


@observer("one process", "equal after the onset", "unknown", signal=LOOKS)
def ranks_differ(view: EpisodeView) -> Observation | None:
    """The premise: several ranks, and a comparison that found a difference."""
    if view.facts.world_size == 1:
        return Observation("There is one process.", level="one process", signal="ranks")
    if view.once(_findings):
        return None
    looks = [row.at.ordinal for row in view.store.layers.get(LOOKS, ())]
    if not any(ordinal >= view.onset for ordinal in looks):
        return Observation("Nothing shows that the ranks have parted.", level="unknown")
    text = f"The ranks were compared {len(looks)} times, after step {view.step} too, and were equal to the bit."
    return Observation(text, level="equal after the onset", observed=0.0, expected=0.0)


def _difference(kind: str) -> Observer:
    """Observe one kind of difference between the ranks."""

    def observe(view: EpisodeView) -> Observation | None:
        found = view.once(_findings).get(kind)
        if found is None:
            return None
        count, text = found.number("count"), f"At step {found.at.step}: {found.text}"
        return Observation(text, step=found.at.step, observed=count, expected=None if count is None else 0.0)

    return Observer(kind, ("found",), observe, f"ranks/{kind}")


def _findings(view: EpisodeView) -> dict[str, Finding]:
    return {kind: found for kind in KINDS if (found := last_that_matters(view, "ranks", kind)) is not None}


def _summary(view: EpisodeView) -> str:
    found = next(iter(view.once(_findings).values()), None)
    kind, step = ("", view.step) if found is None else (found.kind, found.at.step)
    kinds = {GRADIENTS: "do not get the same averaged gradients", WEIGHTS: "no longer hold the same weights"}
    what = kinds.get(kind, "are not at the same place in the training")
    ranks = () if found is None else found.whole_numbers("ranks")
    apart = f" (apart: {', '.join(map(str, ranks))})" if ranks else ""
    return f"The {view.facts.world_size} ranks {what}{apart}, as seen at step {step}{view.consequence}."


def _fixes(view: EpisodeView) -> tuple[Fix, ...]:
    found = view.once(_findings)
    if not found:
        return ()
    worst = next((kind for kind in (GRADIENTS, WEIGHTS) if kind in found), COUNTERS)
    place = {GRADIENTS: "all_reduce", WEIGHTS: "weights"}.get(worst)
    change = None if place is None else Change(setting="code", value=place)
    equal = (found.get(WEIGHTS) or found.get(GRADIENTS) or next(iter(found.values()))).number("last_equal")
    since = "the start of the run" if equal is None else f"batch {equal:.0f}"
    back = f"Go on from a checkpoint from {since} or before, when the ranks were equal: averaging does not restore it."
    return Fix(FIXES[worst], change), Fix(back)


CAUSE: Final = Cause(
    id="distributed_desync",
    family=Family.ENVIRONMENT,
    title="The ranks have drifted apart",
    meaning="ranks hold different weights, or did not average the same gradients",
    requires=(ranks_differ,),
    observations=tuple(map(_difference, KINDS)),
    summary=_summary,
    fixes=_fixes,
    applies_to=LOSS_ROSE | {EpisodeKind.STALL, EpisodeKind.OVERFIT},
    explains=frozenset({
        "warmup_too_short", "gradient_vanishing", "activation_saturation", "weight_blowup", "stale_second_moment",
        "adam_epsilon_too_small", "momentum_reversal", "optimizer_state_corruption", "overfitting",
        "post_overfit_oscillation", "code_bug",
    }),
    sufficient_findings=frozenset(("ranks", kind) for kind in (WEIGHTS, GRADIENTS, COUNTERS)),
)  # fmt: skip
