"""The fitted numbers between evidence and probability, read from the data file `calibration.json` beside this module."""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

FILE: Final = "calibration.json"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How sums of log likelihood ratios become probabilities.

    The logit of a cause is `log(share) + offset + temper * sum`, that of "unexplained" `log(unexplained)`; `share` is the cause's part of `1 - unexplained`.
    """

    temper: float
    """Factor on the sums: observations of one moment depend on one another, so they count less than if each stood alone (science.md 3.2)."""
    unexplained: float
    """Share of episodes, before anything is known of them, that no cause of the catalogue explains."""
    offsets: Mapping[str, float] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """By cause what its own evidence claims too little (above 0) or too much, in logits; 0 for one that is not listed, as of another package."""

    def __post_init__(self) -> None:
        numbers = (self.temper, self.unexplained, *self.offsets.values())
        if not all(math.isfinite(number) for number in numbers) or not self.temper > 0 or not 0 < self.unexplained < 1:
            msg = f"Calibration: expected a finite temper above 0, unexplained between 0 and 1 and finite offsets, got {self}. Make the file anew: {FILE} names the command."
            raise ValueError(msg)

    @staticmethod
    def of(content: Mapping[str, Any]) -> "Calibration":
        """From the content of a data file; further keys (how it was made, on what) are for readers."""
        return Calibration(
            temper=content["temper"],
            unexplained=content["unexplained"],
            offsets=MappingProxyType(dict(content["offsets"])),
        )


@functools.cache
def fitted() -> Calibration:
    """What came with the package; reads the file at the first call."""
    text = importlib.resources.files(__package__).joinpath(FILE).read_text("utf-8")
    return Calibration.of(json.loads(text))
