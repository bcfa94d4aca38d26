"""A loss that has stopped falling, beside one that only looks so for its noise."""

import numpy as np

from lightning_spike.detectors.stagnation import stagnates


def test_a_loss_stagnates_once_it_is_no_lower_than_in_the_first_half():
    noise = np.random.default_rng(3).normal(0.0, 0.05, 512)
    falling = np.exp(-np.arange(512) / 400) + 0.02 * noise
    assert not stagnates(falling)
    assert stagnates(1.0 + noise)
    assert stagnates(np.concatenate([falling[:128], falling[128] + 0.02 * noise[:384]]))
    assert not stagnates(1.0 + noise[:100])
    assert not stagnates(np.full(300, np.nan))
