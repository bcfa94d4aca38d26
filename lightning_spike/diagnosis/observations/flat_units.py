"""The layer whose outputs went flat most around an episode: dead behind a ReLU, or saturated in a sigmoid or tanh."""

import dataclasses
from typing import Final

import numpy as np

from lightning_spike.diagnosis.batch_ranges import GUARD
from lightning_spike.diagnosis.observations.layers import layer_table, usual_of
from lightning_spike.diagnosis.view import EpisodeView

SIGNALS: Final = {"activation_zeros": "dead", "activation_dead": "dead", "activation_saturated": "saturated"}
"""Recorded shares of flat outputs, and what such units are called."""
BATCHES_AFTER: Final = 128
"""Batches after the onset in which flat units are looked for: activations are measured every 50 batches;
engineering choice."""
BATCHES_BEFORE: Final = 100
"""Batches before the onset in which they are looked for in a run without an episode; engineering choice."""
FLAT_SHARE: Final = 0.8
"""Share of flat outputs from which a layer hardly computes anything (TheDeepChecker: 0.85)."""
MAX_ALIVE_LEFT: Final = 0.25
"""Share of the once active outputs that may still be active: half of a healthy ReLU's outputs are 0, so a high flat
share alone is not new; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FlatUnits:
    """The layer whose outputs went flat most."""

    name: str
    signal: str
    ordinal: int
    share: float
    """Share of its outputs that are flat."""
    before: float
    """The usual share."""

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
        """Whether hardly any output is still active."""
        return self.share >= FLAT_SHARE and 1.0 - self.share <= MAX_ALIVE_LEFT * (1.0 - self.before)


def flattest_layer(view: EpisodeView) -> FlatUnits | None:
    """The layer with the smallest part of its active outputs left, among the looks around the onset."""
    found = [flat for signal in SIGNALS if (flat := _flattest_of(view, signal)) is not None]
    return min(found, key=lambda f: (1.0 - f.share) / max(1.0 - f.before, 1e-9), default=None)


def _flattest_of(view: EpisodeView, signal: str) -> FlatUnits | None:
    usual = usual_of(view, signal, None if view.store.episodes else view.onset - BATCHES_BEFORE)
    table = layer_table(view, signal, _first(view), max(view.last, view.onset + BATCHES_AFTER))
    if usual is None or table.values.size == 0:
        return None
    left = (1.0 - table.values) / np.maximum(1.0 - usual, 1e-9)
    left = np.where(np.isfinite(left), left, np.inf)
    row, column = np.unravel_index(int(left.argmin()), left.shape)
    if not np.isfinite(left[row, column]):
        return None
    name, ordinal = table.names[column], int(table.ordinals[row])
    share, before = float(table.values[row, column]), float(usual[column])
    return FlatUnits(name=name, signal=signal, ordinal=ordinal, share=share, before=before)


def _first(view: EpisodeView) -> int:
    return view.onset - (GUARD if view.store.episodes else BATCHES_BEFORE)


def first_flat(view: EpisodeView, flat: FlatUnits) -> int:
    """Ordinal of the first look at which the flat share had grown at least half as far as it went."""
    table = layer_table(view, flat.signal, _first(view), flat.ordinal)
    shares = table.values[:, table.names.index(flat.name)]
    places = np.flatnonzero(shares - flat.before >= 0.5 * flat.grown)
    return int(table.ordinals[places[0]]) if places.size else flat.ordinal


def share_after_onset(view: EpisodeView, flat: FlatUnits) -> tuple[int, float] | None:
    """Ordinal and flat share of the first look after the onset; `None` without one before the layer got flattest."""
    table = layer_table(view, flat.signal, view.onset + 1, flat.ordinal - 1)
    if len(table.values) == 0 or flat.name not in table.names:
        return None
    return int(table.ordinals[0]), float(table.values[0, table.names.index(flat.name)])


def rms_growth(view: EpisodeView, name: str, at: int, layers: int = 1) -> tuple[float, float, float] | None:
    """Growth of a layer's output size at one look.

    Args:
        view: The episode.
        name: The layer.
        at: Ordinal of the look.
        layers: How many layers from this one on must have grown: the next may be the activation behind it.

    Returns:
        The smallest growth factor of these layers, the layer's RMS at the look, and its usual RMS; `None` where they
        were not measured.
    """
    usual, table = usual_of(view, "activation_rms", at), layer_table(view, "activation_rms", at, at)
    if usual is None or len(table.values) == 0 or name not in table.names:
        return None
    place = table.names.index(name)
    here = slice(place, place + layers)
    factors = table.values[0, here] / np.where(usual[here] > 0.0, usual[here], np.nan)
    return float(np.min(factors)), float(table.values[0, place]), float(usual[place])
