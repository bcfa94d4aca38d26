"""Settings of a run, from the trainer at the start of training."""

from lightning.pytorch import LightningModule, Trainer

from lightning_spike.records import RunFacts
from lightning_spike.signals.learning_rate import optimizer_facts, scheduler_facts


def run_facts(trainer: Trainer, module: LightningModule, *, started: str) -> RunFacts:
    """The `RunFacts` in `on_train_start`; no collective, no device read."""
    clip = trainer.gradient_clip_val
    batches = trainer.num_training_batches
    algorithm = trainer.gradient_clip_algorithm or "norm"  # Lightning's default
    return RunFacts(
        started=started,
        world_size=trainer.world_size,
        precision=str(trainer.precision),
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=float(clip) if clip else None,
        gradient_clip_algorithm=str(getattr(algorithm, "value", algorithm)) if clip else None,
        clips_by_hand=clips_by_hand(module),
        automatic_optimization=module.automatic_optimization,
        optimizers=optimizer_facts(trainer.optimizers),
        schedulers=scheduler_facts(trainer.lr_scheduler_configs, trainer.optimizers),
        batches_per_epoch=int(batches) if batches != float("inf") else None,
        max_steps=trainer.max_steps if trainer.max_steps != -1 else None,
        max_epochs=trainer.max_epochs if trainer.max_epochs != -1 else None,
        resumed_from=str(trainer.ckpt_path) if trainer.ckpt_path else None,
        first_step=trainer.global_step,
    )


def clips_by_hand(module: LightningModule) -> bool:
    """Whether the module can clip beside Lightning's settings."""
    overridden = type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
    return overridden or not module.automatic_optimization
