"""What the experiments say, in sentences for a person."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from lightning_spike.lab.experiments.attribution import Attribution, Share
from lightning_spike.lab.experiments.blame import GROUPS, Blame
from lightning_spike.lab.experiments.cooldown_test import Cooldown
from lightning_spike.lab.experiments.outside_change import ChangeKind, OutsideChange
from lightning_spike.lab.experiments.remedies import Remedy
from lightning_spike.lab.experiments.step_size import Consistency
from lightning_spike.lab.replay.compare import Difference
from lightning_spike.record.outside_writes import OutsideWrite

FACTORS: Mapping[str, str] = MappingProxyType(
    {
        "batch": "the batch",
        "samples": "the samples that stand out",
        "learning_rate": "the learning rate",
        "clipping": "the clipping",
        "optimizer_state": "the optimizer's state",
        "momentum": "the momentum",
        "second_moments": "the second moments",
        "epsilon": "epsilon",
        "precision": "the low precision",
    }
)
REMEDIES: Mapping[str, str] = MappingProxyType(
    {
        "lower_rate": "{value:g} times the learning rate",
        "clip": "clipping the gradients at {value:.3g}, their usual norm",
        "reset_state": "an empty optimizer state",
        "float32": "float32",
    }
)
CHANGED: Mapping[ChangeKind, str] = MappingProxyType(
    {
        "weights": "Between two updates the weights were changed",
        "optimizer": "Between two updates the optimizer's state was changed",
        "momentum_or_gradient": "The optimizer's state was changed, or a gradient that went into it",
        "result": "Weights, batch and random state were the same up to this very batch, and its forward pass gave another result",
    }
)
NAMED: Final = 3
"""Tensors named at most in one sentence."""
HELPED: Final = 0.25
"""Share of the damage from which a remedy is said to help."""
MOST: Final = 0.5
"""Share from which the greater part is left."""


def factors_text(found: Attribution) -> str:
    """Which update did it, and what about it."""
    worse = f"made the loss of ordinary batches {math.exp(min(found.damage, 99)):.3g} times as high"
    parts = [_share(share) for share in found.shares]
    rest = f"with all of that as usual {max(found.intrinsic, 0.0):.0%} of the damage is left"
    normal = [FACTORS.get(name, name) for name in found.normal]
    as_usual = f" As usual: {_listed(normal)}." if normal else ""
    excused = "" if found.odd_batch else " The batch had an ordinary loss before it."
    which = f"The update at step {found.step}"
    if found.updates > 1:
        which = f"The {found.updates} updates from step {found.step} on"
    closer = f" Looked at more closely, {_listed([_share(share) for share in found.finer])}." if found.finer else ""
    return f"{which} {worse}. Of that {_listed(parts)}; {rest}.{closer}{as_usual}{excused}"


def blame_text(whose: Blame) -> str:
    """Who is to blame, the largest share first."""
    shares = sorted(((g, s) for g, s in whose.shares.items() if s >= 0.05), key=lambda pair: -pair[1])  # noqa: PLR2004 - a share of one in twenty
    if not shares:
        return "The experiments do not say whose the jump is."
    return f"By experiment the jump is due to {_listed([f'{GROUPS[g]} ({s:.0%})' for g, s in shares])}."


def consistency_text(steps: Consistency) -> str:
    """Whether the steps before were too long."""
    return (
        f"Of the {steps.updates} updates before, {round(steps.worsened * steps.updates)} made the loss of their own batch worse (in a healthy run about one in "
        f"twenty), and the change was {steps.rho:.2g} times what the gradients promised (usually 0.8 to 1)."
    )


def calm_text(calm: Cooldown) -> str:
    """What became of the batch's excess."""
    itself, weights = (
        "the batch itself is out of the ordinary",
        "it was the weights, thrown about by steps that are too long",
    )
    told = f"After {calm.steps} steps with a tenth of the learning rate, {calm.left:.0%} of the batch's excess over ordinary batches was left"
    return f"{told}: {itself if calm.left >= MOST else weights}."


def remedies_text(tried: Sequence[Remedy]) -> str:
    """What would have helped."""
    helped = [r for r in tried if r.repaired >= HELPED]
    words = [
        f"{REMEDIES[r.remedy].format(value=r.value or 0.0)} ({min(r.repaired, 1.0):.0%} less damage)" for r in helped
    ]
    if not helped:
        return "None of the usual remedies would have helped at that update."
    return f"At that update would have helped: {_listed(words)}. That is no sign of what was wrong."


def differences_text(differences: Sequence[Difference], writes: Sequence[OutsideWrite]) -> str:
    """Which tensors are not what they would have been."""
    words = _different(differences)
    told = _written(writes)
    return f"Most different now: {words}.{told}" if words else told.strip()


def outside_text(
    change: OutsideChange | None, writes: Sequence[OutsideWrite], differences: Sequence[Difference]
) -> str:
    """What was changed, as far as the experiment found it."""
    if change is None:
        return differences_text(differences, writes)
    words = f": {_different(differences)}" if differences else ""
    alone = "" if change.loss is None else f" With nothing but this put into the re-run the loss is {change.loss:.3g}."
    return f"{CHANGED[change.kind]}{words}.{_written(writes)}{alone}"


def repaired_text(repaired: float | None) -> str:
    """What the re-run, which has everything else, has left of the jump."""
    return "" if repaired is None else f"Without the change {repaired:.0%} of the jump is gone."


def _different(differences: Sequence[Difference]) -> str:
    words = [
        f"{d.name} (by {d.relative:.2g} of its size)" if math.isfinite(d.relative) else f"{d.name} (not finite)"
        for d in differences[:NAMED]
    ]
    return _listed(words) if words else ""


def _written(writes: Sequence[OutsideWrite]) -> str:
    seen = [f"{_listed(w.names[:NAMED])}{' and others' if len(w.names) > NAMED else ''}" for w in writes]
    return f" Somebody other than the training step wrote into {_listed(seen)}." if seen else ""


def _share(share: Share) -> str:
    error = f" ± {share.error:.0%}" if math.isfinite(share.error) else ""
    return f"{share.share:.0%}{error} is due to {FACTORS.get(share.factor, share.factor)}"


def _listed(words: Sequence[str]) -> str:
    if len(words) < 2:  # noqa: PLR2004 - a list needs two
        return words[0] if words else "nothing"
    return f"{', '.join(words[:-1])} and {words[-1]}"
