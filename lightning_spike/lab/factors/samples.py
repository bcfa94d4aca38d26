"""The samples that stand out: would the update have done the same without these few?"""

import dataclasses
from typing import ClassVar

from typing_extensions import override

from lightning_spike.lab.factors.factor import Around, Factor
from lightning_spike.lab.named_samples import with_samples_exchanged
from lightning_spike.lab.update import Update

__all__ = ["NamedSamples"]


class NamedSamples(Factor):
    """The named samples of the update's batches, against ordinary ones in their places; the rest of the batches stays.

    Named are those whose losses are out of what is usual for the weights before the update (`lab.named_samples`). Where none are named, or the batches do not fit
    together, it is no factor.
    """

    id: ClassVar = "samples"
    group: ClassVar = "data"
    title: ClassVar = "the samples that stand out"

    @override
    def normal(self, update: Update, around: Around) -> Update | None:
        changed = {
            entry.at.ordinal: with_samples_exchanged(entry, named, around.controls)
            for entry in update.entries
            if (named := around.named.get(entry.at.ordinal))
        }
        if not any(changed.values()):
            return None
        return dataclasses.replace(
            update, entries=tuple(changed.get(entry.at.ordinal) or entry for entry in update.entries)
        )
