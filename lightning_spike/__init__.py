"""Root causes for loss spikes, from inside the training run.

One training step, as the suite sees it; every step of the way is a file of that name:

```
on_train_batch_start      the batch: sample ids, random state, a reference into the ring        signals/batch
on_before_optimizer_step  gradients as they are (synced, unscaled, unclipped), the LR in use     signals/gradients,
learning_rate on_train_batch_end        the loss; the row starts its way to the host, and the rows that
signals/loss, record/recorder
                          have arrived are stored and judged; whoever acts, acts here            store, detectors,
                          actions, lab
on_validation_end         the validation loss                                                    detectors/overfit
on_fit_end, on_exception  rank the causes, render, write                                         diagnosis, report
```

`flight/loop.py` is that loop. Use `suite()`, or any of the callbacks by itself.
"""

import importlib
from typing import TYPE_CHECKING

from lightning_spike.callbacks.activation_monitor import ActivationMonitor
from lightning_spike.callbacks.anomaly_rollback import AnomalyRollback
from lightning_spike.callbacks.bad_batch_dumper import BadBatchDumper
from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.callbacks.data_monitor import DataMonitor
from lightning_spike.callbacks.grad_norm_monitor import GradNormMonitor
from lightning_spike.callbacks.lr_peak_detector import LRPeakDetector
from lightning_spike.callbacks.optimizer_monitor import OptimizerMonitor
from lightning_spike.callbacks.overfit_watcher import OverfitWatcher
from lightning_spike.callbacks.precision_monitor import PrecisionMonitor
from lightning_spike.callbacks.rank_sync_monitor import RankSyncMonitor
from lightning_spike.callbacks.root_cause_report import RootCauseReport
from lightning_spike.callbacks.scene_recorder import SceneRecorder
from lightning_spike.callbacks.suite import suite
from lightning_spike.callbacks.weight_monitor import WeightMonitor
from lightning_spike.store import TrainerStateStore

if TYPE_CHECKING:
    from lightning_spike.cli import SpikeCLI

__version__ = "0.1.0"

__all__ = [
    "ActivationMonitor",
    "AnomalyRollback",
    "BadBatchDumper",
    "CounterfactualReplay",
    "DataMonitor",
    "GradNormMonitor",
    "LRPeakDetector",
    "OptimizerMonitor",
    "OverfitWatcher",
    "PrecisionMonitor",
    "RankSyncMonitor",
    "RootCauseReport",
    "SceneRecorder",
    "SpikeCLI",
    "TrainerStateStore",
    "WeightMonitor",
    "suite",
]


def __getattr__(name: str) -> object:
    """`SpikeCLI` is loaded when it is asked for: it needs the extra `cli`."""
    if name == "SpikeCLI":
        return importlib.import_module("lightning_spike.cli").SpikeCLI
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
