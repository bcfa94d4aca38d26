"""The batch: would another one have done the same?"""

import dataclasses
from typing import ClassVar

from typing_extensions import override

from lightning_spike.lab.factors.factor import Around, Factor
from lightning_spike.lab.update import Update

__all__ = ["Batch"]


class Batch(Factor):
    """The batches of the update, against ordinary ones from before."""

    id: ClassVar = "batch"
    group: ClassVar = "data"
    title: ClassVar = "the batch"

    @override
    def normal(self, update: Update, around: Around) -> Update | None:
        if not around.controls:
            return None
        ordinary = (around.controls[k % len(around.controls)] for k in range(len(update.entries)))
        entries = tuple(
            dataclasses.replace(was, batch=entry.batch, rng=entry.rng, ids=entry.ids)
            for was, entry in zip(update.entries, ordinary, strict=True)
        )
        return dataclasses.replace(update, entries=entries)
