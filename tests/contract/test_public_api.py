"""The names that other code may rely on, and the options of every callback.

Growing them is deliberate, so this list is edited by hand.
"""

import inspect
import pickle

import pytest
from lightning.pytorch import Callback

import lightning_spike
from lightning_spike import (
    AnomalyRollback,
    CounterfactualReplay,
    GradNormMonitor,
    OverfitWatcher,
    RootCauseReport,
    SceneRecorder,
    suite,
)

NAMES = {
    "ActivationMonitor", "AnomalyRollback", "BadBatchDumper", "CounterfactualReplay", "DataMonitor", "GradNormMonitor",
    "LRPeakDetector",
    "OptimizerMonitor", "OverfitWatcher", "PrecisionMonitor", "RankSyncMonitor", "RootCauseReport", "SceneRecorder",
    "SpikeCLI",
    "TrainerStateStore", "WeightMonitor", "suite",
}  # fmt: skip


def test_all_is_what_can_be_imported():
    assert set(lightning_spike.__all__) == NAMES
    for name in NAMES:
        assert getattr(lightning_spike, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="GradMonitor"):
        lightning_spike.GradMonitor  # noqa: B018


def callbacks():
    return [getattr(lightning_spike, n) for n in sorted(NAMES) if isinstance(getattr(lightning_spike, n), type)]


@pytest.mark.parametrize("kind", [k for k in callbacks() if issubclass(k, Callback)])
def test_every_callback_stands_alone(kind):
    """Without arguments, picklable before `setup` (spawned ranks get a pickle), at most 7 options, all with
    defaults."""
    made = kind()
    pickle.loads(pickle.dumps(made))  # noqa: S301 - our own bytes
    options = inspect.signature(kind).parameters.values()
    assert len(options) <= 7
    assert all(o.default is not o.empty for o in options)


def test_suite_observes_only_unless_asked():
    kinds = {type(c) for c in suite()}
    assert AnomalyRollback not in kinds
    assert kinds >= {CounterfactualReplay, SceneRecorder}
    assert AnomalyRollback in {type(c) for c in suite(rollback=True)}
    assert not {type(c) for c in suite(replay=False)} & {CounterfactualReplay, SceneRecorder}
    (watcher,) = (c for c in suite(early_stop=True) if isinstance(c, OverfitWatcher))
    assert watcher.stop
    (watcher,) = (c for c in suite() if isinstance(c, OverfitWatcher))
    assert not watcher.stop


def test_own_callbacks_take_the_place_of_the_suites():
    own, other = GradNormMonitor(per_layer_every=5), Callback()
    made = suite(own, other)
    assert [c for c in made if isinstance(c, GradNormMonitor)] == [own]
    assert other in made


def test_dirpath_reaches_all_who_write(tmp_path):
    writers = [c for c in suite(dirpath=tmp_path) if hasattr(c, "dirpath")]
    assert {RootCauseReport, SceneRecorder} <= {type(c) for c in writers}
    assert all(c.dirpath == tmp_path for c in writers)
