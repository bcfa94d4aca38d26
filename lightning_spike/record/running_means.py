"""Remove non-finite values from the running statistics of an epoch.

`self.log(on_epoch=True)` accumulates a mean over the epoch, and a torchmetrics object its states. One NaN makes the
epoch's value NaN, on which `EarlyStopping(check_finite)` would stop a run that was just healed.
"""

import dataclasses

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultMetric
from torch import Tensor
from torchmetrics import Metric, MetricCollection


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class RunningMean:
    """A clone of one logged value's reduction over the epoch so far."""

    value: Tensor
    weight: Tensor | None
    """Samples in a mean so far; `None` for a sum, minimum or maximum."""


def take_running_means(trainer: Trainer) -> dict[str, RunningMean]:
    """Clone the reductions of the training epoch by Lightning's key (`training_step.train_loss`). Never blocks."""
    return {key: RunningMean(m.value.detach().clone(), _weight(m)) for key, m in _logged(trainer)}


def clean_running_means(trainer: Trainer, saved: dict[str, RunningMean] | None) -> list[str]:
    """Restore every non-finite reduction, or reset it where there is no copy. Blocks.

    Args:
        trainer: The trainer, inside a training epoch.
        saved: From `take_running_means` in this epoch; `None` if from another.

    Returns:
        Their names.
    """
    cleaned = []
    for key, metric in _logged(trainer):
        if bool(torch.isfinite(metric.value).all()):
            continue
        cleaned.append(str(metric.meta.name))
        if saved is not None and key in saved:
            _put_back(metric, saved[key])
        else:
            metric.reset()
    return cleaned


def reset_poisoned_metrics(module: LightningModule) -> list[str]:
    """Reset every torchmetrics object of the module with a non-finite state. Blocks.

    Returns:
        Their names in the module.
    """
    whole = {name: m for name, m in module.named_modules() if isinstance(m, MetricCollection)}
    inside = tuple(f"{name}." for name in whole)
    single = {n: m for n, m in module.named_modules() if isinstance(m, Metric) and not n.startswith(inside)}
    poisoned = [n for n, m in single.items() if _is_poisoned(m)]
    poisoned += [n for n, c in whole.items() if any(_is_poisoned(m) for m in c.values())]
    for name in poisoned:
        (single | whole)[name].reset()
    return poisoned


def _logged(trainer: Trainer) -> list[tuple[str, _ResultMetric]]:
    """Lightning's accumulators of the training epoch that hold a tensor and a reduction over the epoch."""
    results = trainer.fit_loop.epoch_loop._results  # not public
    return [(k, m) for k, m in results.items() if m.is_tensor and m.meta.on_epoch and not m.has_reset]


def _weight(metric: _ResultMetric) -> Tensor | None:
    return metric.cumulated_batch_size.detach().clone() if metric.meta.is_mean_reduction else None


def _put_back(metric: _ResultMetric, saved: RunningMean) -> None:
    metric.value = saved.value.clone()
    if saved.weight is not None:
        metric.cumulated_batch_size = saved.weight.clone()
    metric._computed = None  # the cached value of the reduction


def _is_poisoned(metric: Metric) -> bool:
    states = [getattr(metric, name) for name in metric._defaults]  # the names of its states
    tensors = [t for s in states for t in (s if isinstance(s, list) else [s]) if isinstance(t, Tensor)]
    return any(t.is_floating_point() and not bool(torch.isfinite(t).all()) for t in tensors)
