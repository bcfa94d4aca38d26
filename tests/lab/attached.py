"""A module and a trainer as between two batches, without a training."""

from lightning.pytorch import Trainer


def attached(module):
    """A trainer that has the module and its optimizers."""
    trainer = Trainer(
        accelerator="cpu",
        max_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    module.train()
    return trainer
