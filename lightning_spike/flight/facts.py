"""The settings of a run, read off the trainer once when training starts."""

import datetime as dt

from lightning.pytorch import LightningModule, Trainer

from lightning_spike.records import RunFacts
from lightning_spike.signals.learning_rate import optimizer_facts, scheduler_facts


def first_facts() -> RunFacts:
    """What is known before anything is set up: the time."""
    return RunFacts(started=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"))


def run_facts(trainer: Trainer, module: LightningModule, *, started: str) -> RunFacts:
    """Everything in `RunFacts`, as it stands in `on_train_start`; no collective, no device read."""
    clip = trainer.gradient_clip_val
    batches = trainer.num_training_batches
    return RunFacts(
        started=started,
        world_size=trainer.world_size,
        precision=str(trainer.precision),
        accumulate_grad_batches=trainer.accumulate_grad_batches,
        gradient_clip_val=float(clip) if clip else None,
        gradient_clip_algorithm=_algorithm(trainer) if clip else None,
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
    """Whether the module may clip in a way that Lightning's settings do not tell."""
    overridden = type(module).configure_gradient_clipping is not LightningModule.configure_gradient_clipping
    return overridden or not module.automatic_optimization


def _algorithm(trainer: Trainer) -> str:
    """Lightning keeps the algorithm as an enum or, where it was left out, as `None`, which means the norm."""
    algorithm = trainer.gradient_clip_algorithm
    return "norm" if algorithm is None else str(getattr(algorithm, "value", algorithm))
