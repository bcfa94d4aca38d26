"""A rate that climbs bit by bit, told from an event, a warm-up and a steady one."""

import numpy as np
import pytest
from synthetic import Run, an_episode

from lightning_spike.diagnosis.observations.rates import climbed
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.diagnosis.view import EpisodeView


def case_of(rate, onset=250):
    run = Run(length=400)
    run.rate = np.asarray(rate, dtype=float)
    run.episodes = [an_episode(onset, onset + 5, onset + 60)]
    store = run.store()
    return store, EpisodeView(store, store.episodes[0])


STEPS = np.arange(400)


def test_a_rate_that_grows_a_little_with_every_update_has_climbed():
    rate = 0.01 * 1.03 ** np.clip(STEPS - 180, 0, 80)
    _, case = case_of(rate)
    climb = climbed(case)
    assert climb is not None
    assert climb.now == pytest.approx(rate[:251].max())
    assert climb.usual == pytest.approx(0.01)
    assert climb.signal in climb.text


@pytest.mark.parametrize(
    "rate",
    [
        np.full(400, 0.01),
        0.01 * np.minimum((STEPS + 1) / 200, 1.0) ** 0.1,
        0.01 * (1 + np.cos(np.pi * STEPS / 400)),
        np.where(STEPS < 245, 0.01, 0.2),
    ],
    ids=["steady", "slow rise", "cosine", "jump"],
)
def test_others_have_not(rate):
    assert climbed(case_of(rate)[1]) is None


def test_a_warm_up_at_the_beginning_is_no_climb():
    assert climbed(case_of(0.01 * np.minimum((STEPS + 1) / 60, 1.0), onset=50)[1]) is None


def test_a_climb_speaks_for_a_rate_that_is_too_high():
    rate = 0.01 * 1.03 ** np.clip(STEPS - 180, 0, 80)
    first = next(v for v in diagnose(case_of(rate)[0]).overall if v.cause == "lr_too_high")
    assert any("climbed" in e.text and e.weight > 0 for e in first.evidence)
