"""Change gradients where they arise: before they are accumulated, averaged over ranks, or seen by anybody."""

from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_spike.testing.fault import Fault


def alter_gradients(
    fault: Fault,
    trainer: Trainer,
    module: LightningModule,
    change: Callable[[Tensor, int], Tensor],
    *,
    always: bool = False,
) -> None:
    """From now on `change(gradient, number of the parameter)` stands in for the gradient of every parameter in the steps in which the fault is on.

    A hook on the parameter itself, so that every place in the list of callbacks sees the same gradients; taken off when
    the fit ends. A lab that runs one of these steps again finds them changed in the same way.

    Args:
        fault: Whose steps; see `Fault.is_on`.
        trainer: Tells the step.
        module: Whose parameters.
        change: Returns a new tensor, or the same.
        always: In all steps, not only in those of the fault.
    """
    for number, parameter in enumerate(p for p in module.parameters() if p.requires_grad):

        def altered(gradient: Tensor, number: int = number) -> Tensor | None:
            return change(gradient, number) if always or fault.is_on(trainer) else None

        fault.later(parameter.register_hook(altered).remove)  # type: ignore[no-untyped-call]
