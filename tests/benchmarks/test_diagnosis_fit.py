"""What the fit takes for the probability of a cause, against what a diagnosis says of the same evidence."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_spike.diagnosis import weights as package_weights
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.weigh import Examined, probabilities
from lightning_spike.diagnosis.weights import Weights
from lightning_spike.records import Episode, EpisodeKind, Evidence, Moment, RunFacts
from lightning_spike.store import TrainerStateStore

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CAUSES = {cause.id: cause for cause in catalogue()}
NAMES = sorted(CAUSES)
BY_HAND = package_weights.parse(package_weights.content(), by_hand=True)
LEVELS = [
    (c, o, level) for c, of in BY_HAND.table.items() if c in CAUSES for o, levels in of.items() for level in levels
]
AT = Moment(ordinal=10, step=10, epoch=0, batch_idx=10)
EPISODE = Episode(id=1, kind=EpisodeKind.SPIKE, onset=AT, noticed=AT, peak=AT)


@pytest.fixture(scope="module")
def fitting():
    """The scripts' folder is on the path for the import only: one of them has the name of a folder of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("labelled_runs.fitting")


def observed_at_random(rng):
    """Some of the causes, each with one or two of its own levels."""
    chosen = [cause for cause in NAMES if rng.random() < 0.8]
    return {cause: [LEVELS[k] for k in rng.permutation(len(LEVELS)) if LEVELS[k][0] == cause][:2] for cause in chosen}


def examined(observed, weights=BY_HAND):
    return [Examined(CAUSES[c], tuple(evidence(key, weights) for key in keys), None) for c, keys in observed.items()]


def evidence(key, weights):
    cause, observer, level = key
    weight = weights.table[cause][observer][level]
    return Evidence(
        signal="x", step=0, observed=None, expected=None, text="x", weight=weight, observation=observer, level=level
    )


def example(fitting, monkeypatch, observed, label):
    """The run in which this was observed in its episode, as the fit takes it in."""
    monkeypatch.setattr(fitting, "examine_all", lambda view, causes, weights, remarks: examined(observed))
    store = TrainerStateStore(RunFacts(started="2026-01-01T00:00:00+00:00"))
    store.replace_episode(EPISODE)
    runs = importlib.import_module("labelled_runs.runs")
    cell = runs.Cell(task="x", seed=0, sort="fault", name="x", causes=(label,) if label else ())
    return fitting.example(runs.RecordedRun(cell=cell, store=store))


def weights_at_random(rng):
    """Each weight somewhat larger or smaller than the one set by hand."""
    table = {
        cause: {o: {level: w * rng.uniform(0.5, 2.0) for level, w in levels.items()} for o, levels in of.items()}
        for cause, of in BY_HAND.table.items()
    }
    offsets = dict(zip(NAMES, rng.normal(0.0, 1.0, len(NAMES)).tolist(), strict=True))
    temper, unexplained = float(rng.uniform(0.2, 1.5)), float(rng.uniform(0.1, 0.6))
    return Weights(temper=temper, unexplained=unexplained, offsets=offsets, table=table)


def test_the_fit_has_the_probabilities_of_the_diagnosis(fitting, monkeypatch):
    rng = np.random.default_rng(3)
    for _ in range(40):
        observed, weights = observed_at_random(rng), weights_at_random(rng)
        packed = fitting._Packed.of([example(fitting, monkeypatch, observed, NAMES[0])])
        values = torch.tensor([weights.table[c][o][level] for c, o, level in packed.keys])
        offsets = torch.tensor([weights.offsets[name] for name in NAMES])
        logits = packed.logits(values, torch.tensor(weights.temper), torch.tensor(weights.unexplained), offsets)
        found = torch.softmax(logits.double(), 1)[0].numpy()
        expected = probabilities(examined(observed, weights), {}, weights)
        whole = [expected.get(name, 0.0) for name in NAMES]
        np.testing.assert_allclose(found, [*whole, 1.0 - sum(whole)], rtol=1e-4, atol=1e-6)


def test_the_label_is_the_place_of_the_cause_and_that_of_none_the_last(fitting, monkeypatch):
    observed = observed_at_random(np.random.default_rng(0))
    assert example(fitting, monkeypatch, observed, NAMES[5]).label == 5
    assert example(fitting, monkeypatch, observed, None).label == len(NAMES)


def test_a_level_that_misleads_loses_weight_and_keeps_its_sign(fitting, monkeypatch):
    """In every run two causes have evidence, and the weaker one was it."""
    wrong = next(k for k in LEVELS if k[0] == "bad_batch" and BY_HAND.table[k[0]][k[1]][k[2]] > 1.0)
    right = next(k for k in LEVELS if k[0] == "label_noise" and BY_HAND.table[k[0]][k[1]][k[2]] > 1.0)
    observed = {"bad_batch": [wrong], "label_noise": [right]}
    found = fitting.fit([example(fitting, monkeypatch, observed, "label_noise")] * 30)
    before, after = ({k: w.table[k[0]][k[1]][k[2]] for k in (wrong, right)} for w in (BY_HAND, found))
    assert 0.0 < after[wrong] < before[wrong]
    assert after[right] > before[right]
    assert found.offsets["bad_batch"] < 0.0 < found.offsets["label_noise"]
    said = probabilities(examined(observed, found), {}, found)
    assert said["label_noise"] > said["bad_batch"]


def test_a_level_that_no_run_showed_stays_as_set_by_hand(fitting, monkeypatch):
    observed = observed_at_random(np.random.default_rng(1))
    seen = {key for keys in observed.values() for key in keys}
    found = fitting.fit([example(fitting, monkeypatch, observed, NAMES[0])] * 10)
    for cause, observer, level in set(LEVELS) - seen:
        assert found.table[cause][observer][level] == pytest.approx(BY_HAND.table[cause][observer][level], abs=1e-4)


def test_the_file_is_read_back_as_it_was_written(fitting):
    weights = weights_at_random(np.random.default_rng(2))
    content = json.loads(fitting.as_file(weights, made_by="a test", runs=3))
    again, by_hand = package_weights.parse(content), package_weights.parse(content, by_hand=True)
    assert by_hand.table == BY_HAND.table
    assert again.temper == pytest.approx(weights.temper, abs=1e-4)
    for cause, observer, level in LEVELS:
        assert again.table[cause][observer][level] == pytest.approx(weights.table[cause][observer][level], abs=0.006)
