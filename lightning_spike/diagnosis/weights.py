"""The fitted model: the weight of each level of an observation for each cause, and the numbers beside the weights.

`weights.json` beside this module has the form that `python benchmarks/diagnosis.py --fit FILE` writes; `made_by` in it
says how its numbers were made. It holds every weight twice, as set by hand and as fitted (shrunk towards the hand-set
value), the temper, the share of "unexplained" and an offset for each cause. Hand-set weights are natural logs of
likelihood ratios: 0.7 for twice as common under the cause, 1.6 for five times, 3.0 to 3.9 for the twenty to fifty times
of a replay (science.md 3.3), 4.6 for a hundred times, where the cause itself was seen.
"""

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

FILE: Final = "weights.json"
EVERY_CAUSE: Final = "every cause"
"""Key of the observers that weigh the same for all causes."""

Table = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Weights by cause, observer and level."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The fitted model.

    The logit of a cause is `log(prior share) + offset + temper * (sum of its weights)`; that of "unexplained" is
    `log(unexplained)`.

    Raises:
        ValueError: A number is not finite, or out of its range.
    """

    temper: float
    """Factor on the sums, below 1 because observations of one episode depend on each other (science.md 3.2)."""
    unexplained: float
    """Prior share of episodes that no cause of the catalogue explains."""
    offsets: Mapping[str, float] = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    """By cause, in logits; 0 for causes that are not listed."""
    table: Table = dataclasses.field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        cells = (w for cause in self.table.values() for levels in cause.values() for w in levels.values())
        numbers = (self.temper, self.unexplained, *self.offsets.values(), *cells)
        if not all(math.isfinite(number) for number in numbers) or not self.temper > 0 or not 0 < self.unexplained < 1:
            msg = (
                "Weights: expected finite numbers, a temper above 0 and unexplained between 0 and 1, "
                f"got temper={self.temper}, unexplained={self.unexplained}. "
                f"Fit {FILE} again: python benchmarks/diagnosis.py --fit {FILE}."
            )
            raise ValueError(msg)

    def of(self, cause: str, observer: str, level: str, own: Mapping[str, Mapping[str, float]]) -> float | None:
        """The weight of one level for a cause; `None` where it is no evidence.

        Args:
            cause: Its id.
            observer: The observer's name.
            level: The observed level.
            own: The cause's own weights, used where the table does not list the cause.
        """
        levels = self.table.get(cause, own).get(observer)
        if levels is None:
            levels = self.table.get(EVERY_CAUSE, {}).get(observer, {})
        return levels.get(level)


def parse(content: Mapping[str, Any], *, by_hand: bool = False) -> Weights:
    """The model in the content of a data file, with the fitted weights or (`by_hand`) those set by hand."""
    place = 0 if by_hand else 1
    table = {
        cause: {observer: {level: pair[place] for level, pair in levels.items()} for observer, levels in of.items()}
        for cause, of in content["weights"].items()
    }
    return Weights(
        temper=content["temper"],
        unexplained=content["unexplained"],
        offsets=MappingProxyType(dict(content["offsets"])),
        table=MappingProxyType(table),
    )


def content() -> dict[str, Any]:
    """The content of the package's data file; reads a file."""
    text = importlib.resources.files(__package__).joinpath(FILE).read_text("utf-8")
    whole: dict[str, Any] = json.loads(text)
    return whole


@functools.cache
def fitted() -> Weights:
    """The package's fitted model; reads the file at the first call."""
    return parse(content())
