"""What a rollback restores: weights, buffers, optimizer states, loss scale, averaged models and running means."""

from lightning.pytorch import LightningModule, Trainer

from lightning_spike.record.running_means import clean_running_means, reset_poisoned_metrics
from lightning_spike.record.snapshot import Snapshot


def restore(
    snapshot: Snapshot, trainer: Trainer, module: LightningModule, *, same_epoch: bool, reset_optimizer: bool
) -> list[str]:
    """Restores a snapshot in a running training and drops the gradients of the lost steps.

    Random states, schedulers, loops and attributes of the module are left alone: the run goes on with the next batch.
    It does not wait for the device.

    Args:
        snapshot: The state to go back to, see `Snapshot.load_into`.
        trainer: The trainer whose optimizers, precision plugin and logged means are written to.
        module: The module of the snapshot.
        same_epoch: Whether the snapshot is from this epoch, so that its running means can be restored.
        reset_optimizer: Empty the optimizers' state in place of restoring it.

    Returns:
        Names of the running means and metrics that were restored or reset.
    """
    snapshot.load_into(trainer, module)
    if reset_optimizer:
        for optimizer in trainer.optimizers:
            optimizer.state.clear()
    module.zero_grad(set_to_none=True)
    means = clean_running_means(trainer, snapshot.means if same_epoch else None)
    return [*means, *reset_poisoned_metrics(module)]
