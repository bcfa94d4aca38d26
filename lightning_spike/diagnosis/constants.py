"""The numbers by which evidence is weighed, all in one place.

They are set by hand: the shape of the model and the order of the weights follow published likelihoods (science.md 2, 2b.6 and 3: tempered log-linear
naive Bayes, the lab's answers with likelihood ratios of 20 to 50), their exact values are judgement. What makes probabilities of them is fitted
on the diagnosis benchmark and stands in `calibration.json`.
"""

from typing import Final

SLIGHT: Final = 0.7
"""Log likelihood ratio of an observation that is twice as common under the cause as without it."""
FAIR: Final = 1.6
"""… five times as common."""
STRONG: Final = 3.0
"""… twenty times: the lower end of what a replay is worth (science.md 3.3)."""
REPLAYED: Final = 3.9
"""… fifty times: the upper end of what a replay is worth, for one that answers the very question (the same; its noise is taken off before)."""
DECISIVE: Final = 4.6
"""… a hundred times: the cause itself was seen, not its trace."""

LEAST_PROBABILITY: Final = 0.02
"""Verdicts below are left out."""
UPSTREAM: Final = STRONG
"""Evidence for a cause from which on none of its symptoms may rank above it."""

REACH: Final = 16
"""Batches before the onset in which an event of the learning rate may have begun the trouble: its damage grows over some updates."""
NEAR: Final = 4
"""… and in which it nearly certainly has."""
GUARD: Final = 8
"""Batches before the onset that are not taken as healthy: gradients and update sizes lead the loss by 1 to 8 batches (Wortsman et al. 2023)."""
REFERENCE: Final = 128
"""Healthy values with which one of an episode is compared."""
LEAST_RATIO: Final = 1.25
"""A value that differs from its expectation by a smaller factor is not called odd, however steady its series was."""
AFTERSHOCK: Final = 24
"""An episode that begins within so many batches of the end of another may be the rest of the same trouble."""
