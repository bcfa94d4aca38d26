"""Train mode that is forgotten in the middle of a run, in real trainings.

To blame where it makes the jump, and only there.
"""

import torch
from lab.episodes import LATE, At, examined, measured, shares
from torch import nn
from training_tasks import Digits

from lightning_spike.diagnosis.judgement import split_verdict
from lightning_spike.testing import EvalModeLeftOn


class Lagging(Digits):
    """Running statistics that have hardly moved from where they began: eval mode gives another network."""

    def __init__(self, lr=0.003):
        super().__init__(lr)
        self.net[0] = nn.Conv2d(1, 8, 3, padding=1)
        nn.init.constant_(self.net[0].bias, 3.0)
        self.net[1] = nn.BatchNorm2d(8, momentum=1e-5)


def test_a_jump_that_eval_mode_makes_is_gone_with_the_modes_of_before(tmp_path):
    trainer = examined(Lagging, tmp_path, EvalModeLeftOn(LATE, 1.0))
    change = measured(trainer).outside_change
    assert change.kind == "modes"
    assert change.eval_modules[0] == ""
    assert change.repaired > 0.9
    assert shares(trainer) == {"outside": 1.0}


def test_eval_mode_that_only_goes_before_a_bad_batch_is_not_to_blame(tmp_path):
    def wrong_labels(trainer, module, batch):
        batch[1].add_(5).remainder_(10)

    trainer = examined(lambda: Digits(0.003), tmp_path, EvalModeLeftOn(LATE - 4, 1.0), At(LATE, start=wrong_labels))
    found = measured(trainer)
    assert found.outside_change is None
    assert split_verdict(found) == "data"


def test_modes_are_as_they_were_after_an_examination(tmp_path):
    trainer = examined(Lagging, tmp_path, EvalModeLeftOn(LATE, 1.0, length=2))
    assert measured(trainer).outside_change is not None
    assert all(part.training for part in trainer.lightning_module.modules())
    assert torch.isfinite(trainer.callback_metrics["train_loss"])
