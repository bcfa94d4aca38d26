"""Whether the optimizer's state holds an exploded gradient from before the updates that the lab examined."""

import math
from typing import Final

from lightning_spike.diagnosis.batch_ranges import GUARD
from lightning_spike.diagnosis.judgement import CONFIRMING_SHARE, Group
from lightning_spike.diagnosis.view import EpisodeView, Excess

EXPLODED_FACTOR: Final = 10.0
"""Factor over its usual norm from which a gradient has exploded and is not merely large; engineering choice."""


def exploded_gradient_in_state(view: EpisodeView) -> Excess | None:
    """The exploded gradient of an earlier update that the optimizer's state still holds; `None` without one.

    Only where replay gives the damage to the optimizer's state: after a gradient of ten times the usual norm and more,
    the momentum consists mostly of that gradient.
    """
    attribution = view.experiments.attribution
    if attribution is None or view.shares.get(Group.OPTIMIZER, 0.0) < CONFIRMING_SHARE:
        return None
    found = view.worst("grad_norm", view.onset - GUARD, attribution.ordinal - 1)
    return found if found is not None and found.above and EXPLODED_FACTOR <= found.ratio < math.inf else None
