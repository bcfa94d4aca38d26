"""Learning rates of an update, and the settings of optimizers and schedulers as plain records."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor
from torch.optim import Optimizer

from lightning_spike.records import OptimizerFacts, SchedulerFacts

PLAIN: Final = (bool, int, float, str)
MAX_LENGTH: Final = 8
"""Items of a recorded setting; engineering choice."""


def optimizer_names(optimizers: Sequence[Optimizer]) -> list[str]:
    """Names as in Lightning's LearningRateMonitor: the class, with a number from its second optimizer on."""
    classes = [type(optimizer).__name__ for optimizer in optimizers]
    counts = [classes[:place].count(name) for place, name in enumerate(classes)]
    return [f"{name}-{count}" if count else name for name, count in zip(classes, counts, strict=True)]


def learning_rates(name: str, optimizer: Optimizer) -> dict[str, float | Tensor]:
    """The learning rate of every parameter group by signal name: `lr-<name>`, and `lr-<name>/pg<k>` from two groups on.

    Read them in `on_before_optimizer_step`: at the end of a batch, Lightning has stepped the scheduler already. A
    tensor (of a capturable optimizer) stays one. Never blocks.
    """
    groups = optimizer.param_groups
    if len(groups) == 1:
        return {f"lr-{name}": _rate(groups[0]["lr"])}
    return {f"lr-{name}/pg{k}": _rate(group["lr"]) for k, group in enumerate(groups, start=1)}


def optimizer_facts(optimizers: Sequence[Optimizer]) -> tuple[OptimizerFacts, ...]:
    """The present hyperparameters of every optimizer."""
    names = optimizer_names(optimizers)
    return tuple(
        OptimizerFacts(
            name=name,
            class_name=type(optimizer).__name__,
            groups=tuple(plain_settings(g) for g in optimizer.param_groups),
        )
        for name, optimizer in zip(names, optimizers, strict=True)
    )


def scheduler_facts(configs: Iterable[Any], optimizers: Sequence[Optimizer]) -> tuple[SchedulerFacts, ...]:
    """The schedulers as configured in Lightning.

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
            settings=plain_settings(vars(config.scheduler)),
        )
        for config in configs
    )


def _rate(lr: float | Tensor) -> float | Tensor:
    return lr if isinstance(lr, Tensor) else float(lr)


def plain_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The public entries that are numbers, strings or short sequences of them."""
    return {
        key: tuple(value) if isinstance(value, (list, tuple)) else value
        for key, value in settings.items()
        if not key.startswith("_") and _is_plain(value)
    }


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return len(value) <= MAX_LENGTH and all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, PLAIN)
