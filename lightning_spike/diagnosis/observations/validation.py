"""The validation curve of a run, as the causes about overfitting read it."""

from collections.abc import Sequence
from typing import Final

from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.records import ValidationPoint, number

CLEAR_RISE: Final = 0.05
"""Share by which the validation loss must be above its best: Prechelt's GL of 5, the strictest of his thresholds
(1998)."""


def curve_of(view: EpisodeView, metric: object = None) -> list[ValidationPoint]:
    """The finite validations of a metric, oldest first; of the first metric by name where this one is not known."""
    known = sorted({p.metric for p in view.store.validations})
    name = metric if metric in known else next(iter(known), None)
    return [p for p in view.store.validations if p.metric == name and number(p.value) is not None]


def best_of(points: Sequence[ValidationPoint]) -> ValidationPoint | None:
    """The validation with the lowest loss; `None` without any."""
    return min(points, key=lambda p: p.value, default=None)
