"""Whether things that happened again and again happened at equal distances."""

import itertools
from collections.abc import Sequence
from typing import Final

TOLERANCE: Final = 0.02
"""Share of the period by which a distance may differ from it."""
LEAST_MEMBERS: Final = 3
SHORTEST: Final = 3
"""Distances below this are one trouble, not a family."""
MOST_MISSED: Final = 3
"""A distance of up to this many periods counts: members in between were too weak to be seen."""


def period_of(ordinals: Sequence[int]) -> int | None:
    """Distance between the members of a family, in batches; `None` where they keep no time.

    At least three members are needed, four where the period is below 16 (three in step by chance are then too likely).

    Args:
        ordinals: Ascending batch numbers.
    """
    if len(ordinals) < LEAST_MEMBERS:
        return None
    gaps = [later - earlier for earlier, later in itertools.pairwise(ordinals)]
    period = sorted(gaps)[(len(gaps) - 1) // 4]
    if period < SHORTEST or (period < 16 and len(gaps) < LEAST_MEMBERS):  # noqa: PLR2004 - see the docstring
        return None
    allowed = max(1.0, TOLERANCE * period)
    multiples = [max(1, round(gap / period)) for gap in gaps]
    fits = all(
        times <= MOST_MISSED and abs(gap - times * period) <= allowed
        for gap, times in zip(gaps, multiples, strict=True)
    )
    return round((ordinals[-1] - ordinals[0]) / sum(multiples)) if fits else None
