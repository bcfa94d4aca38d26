"""The learning rate that an update really uses, and the settings of optimizers and schedulers as plain records."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_spike.records import OptimizerFacts, SchedulerFacts

PLAIN = (bool, int, float, str)


def optimizer_names(optimizers: Sequence[Optimizer]) -> list[str]:
    """Names as Lightning's LearningRateMonitor gives them.

    The class, and from the second of a class on with a number.
    """
    seen: dict[str, int] = {}
    names = []
    for optimizer in optimizers:
        class_name = type(optimizer).__name__
        count = seen.get(class_name, 0)
        seen[class_name] = count + 1
        names.append(class_name if count == 0 else f"{class_name}-{count}")
    return names


def learning_rates(name: str, optimizer: Optimizer) -> dict[str, float | Tensor]:
    """The learning rate of every parameter group by signal name: `lr-<name>`, and `lr-<name>/pg<k>` from two groups on.

    To be read in `on_before_optimizer_step`: at a batch's end Lightning has stepped the scheduler already. A rate that
    is a tensor (a capturable optimizer) stays one. Never blocks.
    """
    groups = optimizer.param_groups
    if len(groups) == 1:
        return {f"lr-{name}": _rate(groups[0]["lr"])}
    return {f"lr-{name}/pg{k}": _rate(group["lr"]) for k, group in enumerate(groups, start=1)}


def optimizer_facts(optimizers: Sequence[Optimizer]) -> tuple[OptimizerFacts, ...]:
    """The hyperparameters of every optimizer as they stand."""
    names = optimizer_names(optimizers)
    return tuple(
        OptimizerFacts(
            name=name, class_name=type(optimizer).__name__, groups=tuple(_plain(g) for g in optimizer.param_groups)
        )
        for name, optimizer in zip(names, optimizers, strict=True)
    )


def scheduler_facts(configs: Iterable[Any], optimizers: Sequence[Optimizer]) -> tuple[SchedulerFacts, ...]:
    """The schedulers as Lightning has them configured.

    Args:
        configs: Lightning's `trainer.lr_scheduler_configs`.
        optimizers: Lightning's `trainer.optimizers`, for the names.
    """
    names = dict(zip(map(id, optimizers), optimizer_names(optimizers), strict=True))
    return tuple(
        SchedulerFacts(
            class_name=type(config.scheduler).__name__,
            optimizer=names.get(id(getattr(config.scheduler, "optimizer", None)), ""),
            interval=config.interval,
            frequency=config.frequency,
            settings=_plain(vars(config.scheduler)),
        )
        for config in configs
    )


def _rate(lr: float | Tensor) -> float | Tensor:
    return lr if isinstance(lr, Tensor) else float(lr)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are numbers, strings or short sequences of them; private ones are a library's own business."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        if key.startswith("_"):
            continue
        if isinstance(value, PLAIN):
            out[key] = value
        elif isinstance(value, (tuple, list)) and len(value) <= 8 and all(isinstance(v, PLAIN) for v in value):  # noqa: PLR2004 - a handful of groups
            out[key] = tuple(value)
    return out
