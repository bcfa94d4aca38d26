"""What the fit takes for the probability of a cause, against what a diagnosis says of the same evidence."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_spike.diagnosis.calibration import Calibration
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.cause import Examination
from lightning_spike.diagnosis.weigh import Examined, probabilities
from lightning_spike.records import Episode, EpisodeKind, Evidence, Moment, RunFacts
from lightning_spike.store import TrainerStateStore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = sorted(cause.id for cause in catalogue())
AT = Moment(ordinal=10, step=10, epoch=0, batch_idx=10)
EPISODE = Episode(id=1, kind=EpisodeKind.SPIKE, onset=AT, noticed=AT, peak=AT)


@pytest.fixture(scope="module")
def fit():
    """The scripts' folder is on the path for the import only: one of them has the name of a folder of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("diagnosis_fit")


def said_at_random(rng):
    """Some of the causes, each with evidence of some strength for or against it."""
    chosen = [cause for cause in catalogue() if rng.random() < 0.8]
    weights = rng.normal(0.0, 3.0, len(chosen))
    return [Examined(cause, Examination(evidence=(evidence(w),))) for cause, w in zip(chosen, weights, strict=True)]


def evidence(weight):
    return Evidence(signal="x", step=0, observed=None, expected=None, text="x", weight=float(weight))


def seen(fit, monkeypatch, said, label):
    """The run in which this was said of its episode, as the fit takes it in."""
    monkeypatch.setattr(fit, "examined", lambda case, causes, remarks: said)
    store = TrainerStateStore(RunFacts(started="2026-01-01T00:00:00+00:00"))
    store.replace_episode(EPISODE)
    runs = importlib.import_module("diagnosis_runs")
    cell = runs.Cell(task="x", seed=0, sort="fault", name="x", causes=(label,) if label else ())
    return fit.seen(runs.Kept(cell=cell, store=store))


def calibrations(rng):
    offsets = dict(zip(NAMES, rng.normal(0.0, 1.0, len(NAMES)).tolist(), strict=True))
    return Calibration(temper=float(rng.uniform(0.2, 1.5)), unexplained=float(rng.uniform(0.1, 0.6)), offsets=offsets)


def test_the_fit_has_the_probabilities_of_the_diagnosis(fit, monkeypatch):
    rng = np.random.default_rng(3)
    said, numbers = [said_at_random(rng) for _ in range(40)], [calibrations(rng) for _ in range(40)]
    taken = [seen(fit, monkeypatch, one, NAMES[0]) for one in said]
    assert any(any(one.above) for one in taken)  # else nothing would be known of what goes before the softmax
    for one, known, calibration in zip(said, taken, numbers, strict=True):
        packed = fit._Packed.of([known])
        offsets = torch.tensor([calibration.offsets[name] for name in NAMES])
        logits = packed.logits(torch.tensor(calibration.temper), torch.tensor(calibration.unexplained), offsets)
        fitted = torch.softmax(logits.double(), 1)[0].numpy()
        expected = probabilities(one, {}, calibration)
        whole = [expected.get(name, 0.0) for name in NAMES]
        np.testing.assert_allclose(fitted, [*whole, 1.0 - sum(whole)], rtol=1e-4, atol=1e-6)


def test_the_label_is_the_place_of_the_cause_and_that_of_none_the_last(fit, monkeypatch):
    said = said_at_random(np.random.default_rng(0))
    assert seen(fit, monkeypatch, said, NAMES[5]).label == 5
    assert seen(fit, monkeypatch, said, None).label == len(NAMES)


def test_a_cause_that_claims_too_much_gets_an_offset_below_zero(fit, monkeypatch):
    """In every run the first cause has the most evidence, and the second was it."""
    first, second = ("bad_batch", "label_noise")
    causes = {cause.id: cause for cause in catalogue()}
    said = [Examined(causes[n], Examination(evidence=(evidence(w),))) for n, w in ((first, 3.0), (second, 2.0))]
    found = fit.fit([seen(fit, monkeypatch, said, second)] * 30)
    assert found.offsets[first] < 0.0 < found.offsets[second]
    after = probabilities(said, {}, found)
    assert after[second] > after[first]
