"""Period of repeated events."""

import itertools
from collections.abc import Sequence
from typing import Final

TOLERANCE: Final = 0.02
"""Share of the period by which a distance can differ from it; engineering choice."""
MIN_MEMBERS: Final = 3
"""Members of a family; engineering choice."""
MIN_PERIOD: Final = 3
"""Shortest period; below, it is one trouble; engineering choice."""
MAX_MULTIPLE: Final = 3
"""Periods in one distance, where members in between were too weak; engineering choice."""


def period_of(ordinals: Sequence[int]) -> int | None:
    """Distance between the members of a family, in batches; `None` without a regular one.

    Needs three members, or four for a period below 16, where three are in step by chance too often.

    Args:
        ordinals: Ascending batch numbers.
    """
    if len(ordinals) < MIN_MEMBERS:
        return None
    gaps = [later - earlier for earlier, later in itertools.pairwise(ordinals)]
    period = sorted(gaps)[(len(gaps) - 1) // 4]
    if period < MIN_PERIOD or (period < 16 and len(gaps) < MIN_MEMBERS):  # noqa: PLR2004 - see the docstring
        return None
    allowed = max(1.0, TOLERANCE * period)
    multiples = [max(1, round(gap / period)) for gap in gaps]
    fits = all(
        times <= MAX_MULTIPLE and abs(gap - times * period) <= allowed
        for gap, times in zip(gaps, multiples, strict=True)
    )
    return round((ordinals[-1] - ordinals[0]) / sum(multiples)) if fits else None
