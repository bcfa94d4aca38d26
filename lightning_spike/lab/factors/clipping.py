"""The clipping: would the recent one have kept the step short?"""

import dataclasses
from collections import Counter
from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.lab.factors.factor import Around, Factor
from lightning_spike.lab.update import CLIP, PLACE, Settings, Update

__all__ = ["Clipping"]

FEWEST: Final = 4
"""Steps without which there is no recent clipping, as with the learning rate."""


class Clipping(Factor):
    """What the trainer clipped gradients by, value and algorithm, against what most of the steps before were clipped by.

    It is another only where `trainer.gradient_clip_val` was changed in the run. What a module clips by on its own (`configure_gradient_clipping`, manual optimisation) is not
    noted; then it is no factor.
    """

    id: ClassVar = "clipping"
    group: ClassVar = "clipping"
    title: ClassVar = "the clipping"

    @override
    def normal(self, update: Update, around: Around) -> Update | None:
        settings = tuple(_as_usual(step, around) for step in update.settings)
        return None if settings == update.settings else dataclasses.replace(update, settings=settings)


def _as_usual(step: Settings, around: Around) -> Settings:
    if not step or CLIP not in step[0]:
        return step
    before = [tuple(o[0][CLIP]) for o in around.settings if o and CLIP in o[0] and o[0][PLACE] == step[0][PLACE]]
    usual = Counter(before).most_common(1)[0][0] if len(before) >= FEWEST else tuple(step[0][CLIP])
    return step if usual == tuple(step[0][CLIP]) else [{**group, CLIP: usual} for group in step]
