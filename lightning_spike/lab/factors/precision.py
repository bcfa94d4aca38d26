"""Precision: would the same update in float32 have done the same?"""

import dataclasses
from typing import ClassVar

from typing_extensions import override

from lightning_spike.lab.factors.factor import Around, Factor
from lightning_spike.lab.update import Update

__all__ = ["Precision"]


class Precision(Factor):
    """Autocast, against none; a run that has none is at its normal already."""

    id: ClassVar = "precision"
    group: ClassVar = "numerics"
    title: ClassVar = "the low precision"

    @override
    def normal(self, update: Update, around: Around) -> Update | None:
        return dataclasses.replace(update, in_float32=True) if around.is_mixed else None
