"""The layer whose outputs went flat most around an episode: dead behind a ReLU, or saturated in a sigmoid or tanh."""

import dataclasses
from typing import Final

import numpy as np

from lightning_spike.diagnosis.constants import GUARD
from lightning_spike.diagnosis.observations.layers import layer_table, usual_of
from lightning_spike.diagnosis.view import EpisodeView

SIGNALS: Final = {"activation_zeros": "dead", "activation_dead": "dead", "activation_saturated": "saturated"}
"""Recorded shares of flat outputs, and what such units are called."""
BATCHES_AFTER: Final = 128
"""Batches after the onset in which flat units are looked for: activations are measured every 50 batches; engineering
choice."""
BATCHES_BEFORE: Final = 100
"""… and before it."""
FLAT_SHARE: Final = 0.8
"""Share of a layer's outputs in the flat parts from which it hardly computes anything (TheDeepChecker: 0.85)."""
ALIVE_LEFT: Final = 0.25
"""Share of the outputs that were not flat before that is left, at the most, for that to be new: half of a healthy
ReLU's outputs are 0; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlatUnits:
    """The layer whose outputs went flat most."""

    name: str
    signal: str
    ordinal: int
    share: float
    """Of its outputs that are flat."""
    before: float

    @property
    def kind(self) -> str:
        """`"dead"` or `"saturated"`."""
        return SIGNALS[self.signal]

    @property
    def grown(self) -> float:
        """By how much the flat share grew."""
        return self.share - self.before

    @property
    def nearly_all(self) -> bool:
        """Hardly anything is left of what the layer computed."""
        return self.share >= FLAT_SHARE and 1.0 - self.share <= ALIVE_LEFT * (1.0 - self.before)


def flattest_layer(view: EpisodeView) -> FlatUnits | None:
    """The layer of which least is left against its earlier outputs, from the rows around the onset on."""
    found = [flat for signal in SIGNALS if (flat := _flattest_of(view, signal)) is not None]
    return min(found, key=lambda f: (1.0 - f.share) / max(1.0 - f.before, 1e-9), default=None)


def _flattest_of(view: EpisodeView, signal: str) -> FlatUnits | None:
    quiet = not view.store.episodes
    usual = usual_of(view, signal, view.onset - BATCHES_BEFORE if quiet else None)
    table = layer_table(view, signal, _first(view), max(view.last, view.onset + BATCHES_AFTER))
    if usual is None or not np.isfinite(table.values).any():
        return None
    left = (1.0 - table.values) / np.maximum(1.0 - usual, 1e-9)
    left = np.where(np.isfinite(left), left, np.inf)
    if not np.isfinite(left).any():
        return None
    row, column = np.unravel_index(int(left.argmin()), left.shape)
    return FlatUnits(
        name=table.names[column],
        signal=signal,
        ordinal=int(table.ordinals[row]),
        share=float(table.values[row, column]),
        before=float(usual[column]),
    )


def _first(view: EpisodeView) -> int:
    return view.onset - (GUARD if view.store.episodes else BATCHES_BEFORE)


def first_flat(view: EpisodeView, flat: FlatUnits) -> int:
    """Ordinal of the first look at which the layer was at least half as flat as it got."""
    table = layer_table(view, flat.signal, _first(view), flat.ordinal)
    shares = table.values[:, table.names.index(flat.name)]
    places = np.flatnonzero(shares - flat.before >= 0.5 * flat.grown)
    return int(table.ordinals[places[0]]) if places.size else flat.ordinal


def share_after_onset(view: EpisodeView, flat: FlatUnits) -> tuple[int, float] | None:
    """The first look at the layer after the loss had risen.

    Its ordinal, and the flat share; `None` without one before the layer got flattest.
    """
    table = layer_table(view, flat.signal, view.onset + 1, flat.ordinal - 1)
    if len(table.values) == 0 or flat.name not in table.names:
        return None
    return int(table.ordinals[0]), float(table.values[0, table.names.index(flat.name)])


def rms_growth(view: EpisodeView, name: str, at: int, layers: int = 1) -> tuple[float, float, float] | None:
    """The smallest factor by which the output size of a layer (and of the ones behind it) had grown at a look, with its size then and usually; `None` where it is not known.

    Args:
        view: The episode.
        name: The layer.
        at: Ordinal of the look.
        layers: How many are asked: a layer may stand for what goes into its activation, which comes next.
    """
    usual, table = usual_of(view, "activation_rms", at), layer_table(view, "activation_rms", at, at)
    if usual is None or len(table.values) == 0 or name not in table.names:
        return None
    place = table.names.index(name)
    here = slice(place, place + layers)
    factors = table.values[0, here] / np.where(usual[here] > 0.0, usual[here], np.nan)
    return float(np.min(factors)), float(table.values[0, place]), float(usual[place])
