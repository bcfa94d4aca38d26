"""Distances and ranges that several observers share.

What a level weighs stands in `weights.json`; what an experiment means, in `judgement`.
"""

from typing import Final

REACH: Final = 16
"""Batches before the onset in which an event of the learning rate may have begun the trouble: its damage grows over
some updates; engineering choice."""
NEAR: Final = 4
"""Batches before the onset in which such an event nearly certainly has; engineering choice."""
GUARD: Final = 8
"""Batches before the onset that are not taken as healthy: gradients and update sizes lead the loss by 1 to 8 batches
(Wortsman et al. 2023)."""
REFERENCE: Final = 128
"""Healthy values that one of an episode is compared with; engineering choice."""
MIN_ODD_RATIO: Final = 1.25
"""A value that differs from its expectation by a smaller factor is not called odd, however steady its series was;
engineering choice."""
AFTERSHOCK: Final = 24
"""An episode that begins within so many batches of the end of another may be the rest of the same trouble; engineering
choice."""
