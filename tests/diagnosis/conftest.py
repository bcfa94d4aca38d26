import dataclasses
import sys
from pathlib import Path

import pytest

from lightning_spike.diagnosis import rank, weights

# The tests are no package (importlib mode), so that the builder of synthetic runs is found by its folder.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _weights_by_hand(monkeypatch):
    """The rules are tested with the weights set by hand, so that a new fit changes no test."""
    by_hand = weights.parse(weights.content(), by_hand=True)
    plain = dataclasses.replace(by_hand, temper=0.8, unexplained=0.15, offsets={})
    monkeypatch.setattr(rank, "fitted", lambda: plain)
    monkeypatch.setattr("synthetic.fitted", lambda: plain)
