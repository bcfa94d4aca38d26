"""`suite`: all callbacks, with defaults that fit together."""

from pathlib import Path

from lightning.pytorch import Callback

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
from lightning_spike.callbacks.weight_monitor import WeightMonitor


def suite(
    *own: Callback,
    dirpath: str | Path | None = None,
    rollback: bool = False,
    early_stop: bool = False,
    replay: bool = True,
) -> list[Callback]:
    """All callbacks, with defaults that fit together: `Trainer(callbacks=[*suite()])`.

    By default the suite observes and reports and changes nothing: losses and weights are bit-identical with and without
    it.

    Args:
        own: Callbacks of your own choice; one of the suite's classes takes the place of the suite's own instance, any
            other is added.
        dirpath: Where reports, batches and signals go; by default `<logger.log_dir, else
            trainer.default_root_dir>/spike`.
        rollback: Heal the run: `AnomalyRollback` goes back to the last healthy snapshot when the loss does not come
            back.
        early_stop: Let `OverfitWatcher` stop the run and restore the best weights once it overfits.
        replay: Confirm by experiment: after an episode, run the moment again with one thing changed
            (`CounterfactualReplay`), and write down what that takes, so that it can be done when the run is over too
            (`SceneRecorder`).

    Returns:
        The callbacks, in no order that matters.
    """
    defaults: list[Callback] = [
        GradNormMonitor(),
        LRPeakDetector(),
        DataMonitor(),
        ActivationMonitor(),
        WeightMonitor(),
        OptimizerMonitor(),
        PrecisionMonitor(),
        RankSyncMonitor(),
        BadBatchDumper(dirpath=dirpath),
        OverfitWatcher(stop=early_stop, restore_best=early_stop),
        RootCauseReport(dirpath=dirpath),
    ]
    if rollback:
        defaults.append(AnomalyRollback())
    if replay:
        defaults += [CounterfactualReplay(), SceneRecorder(dirpath=dirpath)]
    return [*(d for d in defaults if not any(isinstance(o, type(d)) for o in own)), *own]
