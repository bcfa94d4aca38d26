"""What the optimizer's state holds when the lab gives a damage to it: an exploded gradient that came before."""

import math
from typing import Final

from lightning_spike.diagnosis.constants import GUARD
from lightning_spike.diagnosis.judgement import CONFIRMING_SHARE, Group
from lightning_spike.diagnosis.view import EpisodeView, Excess

EXPLODED: Final = 10.0
"""Factor over its usual norm from which a gradient has exploded and is not merely large; engineering choice."""


def exploded_gradient_in_state(view: EpisodeView) -> Excess | None:
    """The exploded gradient of an update before the first one that the lab examined, where it gives the damage of the later ones to the optimizer's state.

    A state holds what gradients have put into it: with one of ten and more times the usual norm among the last few,
    momenta are made of that one.
    """
    attribution = None if view.experiments is None else view.experiments.attribution
    if attribution is None or view.shares.get(Group.OPTIMIZER, 0.0) < CONFIRMING_SHARE:
        return None
    found = view.worst("grad_norm", view.onset - GUARD, attribution.ordinal - 1)
    exploded = found is not None and found.above and EXPLODED <= found.ratio < math.inf
    return found if exploded else None
