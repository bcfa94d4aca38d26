"""Distances and ranges that several observers share.

The weights of levels stand in `weights.json`; thresholds of experiments in `judgement`.
"""

from typing import Final

REACH: Final = 16
"""Batches before the onset in which an event of the learning rate can have caused the episode: its damage grows over
some updates; engineering choice."""
NEAR: Final = 4
"""Batches before the onset in which such an event nearly certainly caused it; engineering choice."""
GUARD: Final = 8
"""Batches before the onset that are not taken as healthy: gradients and update sizes lead the loss by 1 to 8 batches
(Wortsman et al. 2023)."""
REFERENCE: Final = 128
"""Healthy values that a value of an episode is compared with; engineering choice."""
MIN_ODD_RATIO: Final = 1.25
"""Factor from its usual value from which a value can be unusual, however steady its series is; engineering choice."""
AFTERSHOCK: Final = 24
"""Batches after the end of an episode within which the next one may have the same cause; engineering choice."""
