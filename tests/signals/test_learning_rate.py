import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from training_tasks import TwoByHand, digits

from lightning_spike.signals.learning_rate import learning_rates, optimizer_facts, optimizer_names, scheduler_facts


def test_names_are_lightnings_own(tmp_path):
    """LearningRateMonitor's keys are the reference."""
    monitor = LearningRateMonitor(logging_interval="step")
    module = TwoByHand()
    module.configure_optimizers = lambda: [
        torch.optim.SGD([{"params": module.head.weight}, {"params": module.head.bias}], lr=0.1),
        torch.optim.SGD([*module.encoder.parameters(), *module.decoder.parameters()], lr=0.1),
    ]
    trainer = Trainer(
        max_steps=4, accelerator="cpu", callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(digits(64), batch_size=16))
    names = optimizer_names(trainer.optimizers)
    keys = {key for name, o in zip(names, trainer.optimizers, strict=True) for key in learning_rates(name, o)}
    assert keys == set(monitor.lrs)


def test_rates_are_those_in_use():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], lr=0.25)
    assert learning_rates("AdamW", optimizer) == {"lr-AdamW": 0.25}
    optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
    assert learning_rates("AdamW", optimizer)["lr-AdamW"].item() == 0.5


def test_facts_hold_the_numbers_that_a_fix_needs():
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([weight], lr=0.25, betas=(0.9, 0.95), eps=1e-6)
    (facts,) = optimizer_facts([optimizer])
    assert (facts.name, facts.class_name) == ("AdamW", "AdamW")
    assert facts.groups[0]["betas"] == (0.9, 0.95)
    assert facts.groups[0]["eps"] == 1e-6
    assert "params" not in facts.groups[0]


def test_scheduler_facts_name_class_interval_and_settings():
    class Config:
        def __init__(self, scheduler):
            self.scheduler, self.interval, self.frequency = scheduler, "step", 2

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=7, T_mult=2, eta_min=0.01)
    (facts,) = scheduler_facts([Config(scheduler)], [optimizer])
    assert (facts.class_name, facts.optimizer, facts.interval, facts.frequency) == (
        "CosineAnnealingWarmRestarts",
        "SGD",
        "step",
        2,
    )
    assert (facts.settings["T_0"], facts.settings["T_mult"], facts.settings["eta_min"]) == (7, 2, 0.01)
