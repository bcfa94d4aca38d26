"""One answer from all experiments: how much of the jump is whose."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from lightning_spike.lab.experiments.attribution import Attribution
from lightning_spike.lab.experiments.cooldown_test import Cooldown
from lightning_spike.lab.experiments.split import SUBSTANTIAL, Split
from lightning_spike.lab.experiments.step_size import Consistency

GROUPS: Mapping[str, str] = MappingProxyType(
    {
        "data": "the batch",
        "learning_rate": "the learning rate of that update",
        "optimizer": "the optimizer's state",
        "clipping": "the clipping of that update",
        "numerics": "low precision",
        "gradient": "a gradient that points up the loss that it was made from",
        "intrinsic": "a step that is too long for this loss surface with everything as usual",
        "outside": "a change from outside the training step",
        "computation": "what is computed, with the same batches and weights",
    }
)
"""Who can be to blame, in words."""


UNKNOWN: Final = 0.5
"""Probability that steps are too long all the time where too few updates say: even odds."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Blame:
    """Shares of the jump by who is to blame, in [0, 1]; they add up to 1 where anything could be told, and are empty where not."""

    shares: Mapping[str, float]

    @property
    def first(self) -> str | None:
        """The largest share's; `None` where nothing could be told."""
        return max(self.shares, key=lambda group: self.shares[group], default=None)


def blame(
    split: Split,
    steps: Consistency | None,
    calm: Cooldown | None,
    damage: Attribution | None,
    *,
    doubt: float = 0.0,
    turned: bool = False,
) -> Blame:
    """Put the parts together; pure.

    The batch's part of the jump (half of what only both together make included) is the data's, as far as it is still there under calmed weights; what is not is
    a step too long all along. The weights' part is shared out as the damage of the located update is, but for two things that are no fault of theirs: an ordinary batch
    whose step did damage, and a momentum or a batch's pull that steps have swung up that are too long all the time. Both count as such steps.

    Where what is computed has changed, a step that is too long with everything as usual is the change's doing: its gradient was of what is computed now.

    Args:
        split: The batch against the weights.
        steps: Whether the updates before did what their gradients promised.
        calm: The batch under calmed weights, where that was tried.
        damage: The factors of the update that did the damage, where there is one.
        turned: The gradient of the update that did the damage points up its own loss: then neither its length nor the momentum that it went into is to blame.
        doubt: Probability that the batch stands out for such steps only, where `calm` would tell and was not tried.
    """
    if split.verdict in ("noise", "not_reproduced"):
        return Blame(shares={})
    data, weights = max(split.batch_part, 0.0), max(split.weights_part, 0.0)
    kept = 1.0 - doubt if calm is None else calm.left
    instead: Mapping[str, str] = {}
    if turned:
        instead = {"intrinsic": "gradient", "optimizer": "gradient"}
    elif damage is not None and split.computation >= SUBSTANTIAL:
        instead = {"intrinsic": "computation"}
    shares = dict.fromkeys(GROUPS, 0.0)
    shares |= {"data": data * kept, "intrinsic": data * (1.0 - kept), "computation": split.computation}
    for group, part in _parts(damage, UNKNOWN if steps is None else steps.p_chronic).items():
        shares[instead.get(group, group)] += weights * part
    total = sum(shares.values())
    return Blame(shares={g: s / total for g, s in shares.items()} if total > 0 else {})


def _parts(damage: Attribution | None, p_chronic: float) -> dict[str, float]:
    """Of an update's damage by group, adding up to 1."""
    if damage is None:  # no single update did it; if steps are too long all the time, they did
        return {"intrinsic": p_chronic}
    parts = dict.fromkeys(GROUPS, 0.0) | {share.group: max(share.share, 0.0) for share in damage.shares}
    excusable = {group: p_chronic * parts[group] for group in ("optimizer", *(["data"] if damage.odd_batch else []))}
    for group, part in excusable.items():
        parts[group] -= part
    parts["intrinsic"] = max(damage.intrinsic, 0.0) + sum(excusable.values())
    if not damage.odd_batch:
        excused = parts.pop("data")
        rest = sum(parts.values())
        # An ordinary batch is what everything else met: its part is theirs. Where nothing else stands out it is the length of the step.
        parts = {g: p * (1.0 + excused / rest) for g, p in parts.items()} if rest > 0 else {"intrinsic": excused}
    whole = sum(parts.values())
    return {group: part / whole for group, part in parts.items()} if whole > 0 else {}


def blame_steps() -> Blame:
    """All of it is the steps': too long all the time, and nothing else stands out."""
    return Blame(shares=dict.fromkeys(GROUPS, 0.0) | {"intrinsic": 1.0})


def blame_outside(kind: str) -> Blame:
    """All of it came from outside: into the optimizer's state, or into weights or gradients.

    Args:
        kind: `"optimizer"`, `"weights"`, or `"momentum_or_gradient"` where the two cannot be told apart: even odds then.
    """
    shares = dict.fromkeys(GROUPS, 0.0)
    parts = {"optimizer": 1.0, "momentum_or_gradient": 0.5}
    shares["optimizer"] = parts.get(kind, 0.0)
    shares["outside"] = 1.0 - shares["optimizer"]
    return Blame(shares=shares)
