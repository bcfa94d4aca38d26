"""Any subset of the callbacks, in any order, gives the same report, but for what a missing one would have seen."""

import itertools
import json
import random

import pytest
from training_tasks import build, spoilt_digits, train

from lightning_spike import RootCauseReport, suite

VOLATILE = ("seconds", "started")


def report_of(callbacks, root):
    """Train the two nets by hand on digits of which one is blown up and read the report back, less what the clock
    says."""
    module, _ = build("two_by_hand")
    train(module, callbacks, root, dataset=spoilt_digits(), max_epochs=3)
    path = next(c for c in callbacks if isinstance(c, RootCauseReport)).dirpath / "report.json"
    report = json.loads(path.read_text())
    for key in VOLATILE:
        report["run"].pop(key)
    report["recorded"]["facts"].pop("started")
    return report


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    root = tmp_path_factory.mktemp("reference")
    return report_of(suite(dirpath=root / "spike", replay=False), root)


def test_the_reference_has_something_to_tell(reference):
    assert reference["episodes"]
    assert reference["causes"][0]["cause"] == "bad_batch"


@pytest.mark.parametrize("seed", range(4))
def test_any_order_gives_the_same_report(seed, reference, tmp_path):
    callbacks = suite(dirpath=tmp_path / "spike", replay=False)
    random.Random(seed).shuffle(callbacks)  # noqa: S311
    assert report_of(callbacks, tmp_path) == reference


SEES = {
    ("GradNormMonitor",): "grad_norm",
    ("LRPeakDetector",): "lr",
    ("OverfitWatcher",): "val_",
    ("BadBatchDumper",): "batch/sample",
    ("BadBatchDumper", "DataMonitor"): "batch",
    ("ActivationMonitor",): "activation_",
    ("WeightMonitor",): "weight_",
    ("OptimizerMonitor",): "update_rms",
}


@pytest.mark.parametrize("missing", SEES, ids="-".join)
def test_a_missing_callback_takes_away_only_what_it_sees(missing, reference, tmp_path):
    """The episodes are the same to the number whoever is there.

    The ranking does without the evidence of the missing one.
    """
    callbacks = [c for c in suite(dirpath=tmp_path / "spike", replay=False) if type(c).__name__ not in missing]
    report = report_of(callbacks, tmp_path)
    assert bare_episodes(report) == bare_episodes(reference)
    assert not any(signal.startswith(SEES[missing]) for signal in signals(report))


def test_the_report_alone_still_sees_the_episodes(reference, tmp_path):
    report = report_of([RootCauseReport(dirpath=tmp_path / "spike")], tmp_path)
    assert bare_episodes(report) == bare_episodes(reference)


def bare_episodes(report):
    return [{k: v for k, v in episode.items() if k != "causes"} for episode in report["episodes"]]


def signals(report):
    return set(itertools.chain.from_iterable((e["signal"] for e in c["evidence"]) for c in report["causes"]))
