"""Change the training loss of any module."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_spike.testing.fault import Fault, Needs
from lightning_spike.testing.wrapping import wrap


def alter_loss(fault: Fault, trainer: Trainer, module: LightningModule, change: Callable[[Tensor], Tensor]) -> None:
    """From now on `change(loss)` stands in for the loss that `training_step` returns, in the steps in which the fault is on.

    As if the module's own code did it: a lab that runs the step again finds the same. A step that returns no loss is
    let through.

    Raises:
        ConfigurationError: The module optimises by hand: what it returns is not what it trains on.
    """
    if not module.automatic_optimization:
        raise fault.refuse(Needs.AUTOMATIC_OPTIMIZATION, type(module).__name__)

    def step(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        outputs = call(*args, **kwargs)
        return _changed(outputs, change) if fault.is_on(trainer) else outputs

    fault.later(wrap(module, "training_step", step))


def _changed(outputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(outputs, Tensor):
        return change(outputs)
    if isinstance(outputs, Mapping) and isinstance(outputs.get("loss"), Tensor):
        return {**outputs, "loss": change(outputs["loss"])}
    return outputs
