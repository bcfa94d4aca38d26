"""What the optimizer's state holds when the lab gives a damage to it: an exploded gradient that came before."""

import math
from typing import Final

from lightning_spike.diagnosis.case import Case, Excess, number
from lightning_spike.diagnosis.constants import GUARD

EXPLODED: Final = 10.0
"""Factor over its usual norm from which a gradient has exploded and is not merely large."""
SHARE: Final = 0.5
"""Share of the jump that the lab must give to the optimizer's state, as elsewhere to confirm a cause."""


def held_gradient(case: Case) -> Excess | None:
    """The exploded gradient of an update before the first one that the lab examined, where it gives the damage of the later ones to the optimizer's state.

    A state holds what gradients have put into it: with one of ten and more times the usual norm among the last few, momenta are made of that one.
    """
    first = number((case.lab("factors") or {}).get("ordinal"))
    if first is None or case.blame.get("optimizer", 0.0) < SHARE:
        return None
    found = case.worst("grad_norm", case.onset - GUARD, int(first) - 1)
    exploded = found is not None and found.above and EXPLODED <= found.ratio < math.inf
    return found if exploded else None
