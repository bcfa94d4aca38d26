"""Epsilon: would the usual one have kept the step short?"""

import dataclasses
from typing import ClassVar, Final

from typing_extensions import override

from lightning_spike.lab.factors.factor import Around, Factor
from lightning_spike.lab.update import Update

__all__ = ["Epsilon"]

SMALLER: Final = 10.0
"""How many times smaller than the optimizer's own default an epsilon must be to be a suspect."""


class Epsilon(Factor):
    """What is added to the root of the second moment, against the default of the optimizer's class: there is no recent other value of a constant."""

    id: ClassVar = "epsilon"
    group: ClassVar = "optimizer"
    title: ClassVar = "epsilon"

    @override
    def normal(self, update: Update, around: Around) -> Update | None:
        default = around.defaults.get("eps")
        groups = around.oldest.before.optimizers[0]["param_groups"]
        if not isinstance(default, float) or not any(
            group.get("eps", default) * SMALLER <= default for group in groups
        ):
            return None
        settings = tuple([{**group, "eps": default} for group in step] for step in update.settings)
        return dataclasses.replace(update, settings=settings)
