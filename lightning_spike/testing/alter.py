"""Changes the training loss or the gradients of any module."""

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_spike.testing.fault import Fault, Needs
from lightning_spike.testing.wrapping import wrap


def alter_gradients(
    fault: Fault,
    trainer: Trainer,
    module: LightningModule,
    change: Callable[[Tensor, int], Tensor],
    *,
    always: bool = False,
) -> None:
    """Replaces every parameter's gradient by `change(gradient, number of the parameter)` while the fault is on.

    The hook is on the parameter, so all callbacks see the same gradients; it is removed when the fit ends. A replay of
    one of these steps sees them changed in the same way.

    Args:
        fault: The fault; see `Fault.is_on`.
        trainer: The trainer, for its current step.
        module: The module with the parameters.
        change: Returns a new tensor, or the same.
        always: Change them in all steps, not only in those of the fault.
    """
    for number, parameter in enumerate(p for p in module.parameters() if p.requires_grad):

        def altered(gradient: Tensor, number: int = number) -> Tensor | None:
            return change(gradient, number) if always or fault.is_on(trainer) else None

        fault.later(parameter.register_hook(altered).remove)  # type: ignore[no-untyped-call]


def alter_loss(fault: Fault, trainer: Trainer, module: LightningModule, change: Callable[[Tensor], Tensor]) -> None:
    """Replaces the loss that `training_step` returns by `change(loss)` while the fault is on, in replays too.

    A step that returns no loss is unchanged.

    Raises:
        ConfigurationError: The module uses manual optimization, which may ignore the returned loss.
    """
    fault.require(module.automatic_optimization, Needs.AUTOMATIC_OPTIMIZATION, type(module).__name__)

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
