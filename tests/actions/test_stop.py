"""Joint decisions; that they are joint is tested with two processes in tests/callbacks/test_anomaly_rollback.py."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from training_tasks import Digits, train

from lightning_spike.actions.stop import decide_together, mean_over_ranks, stop_training


class Ranks:
    """A strategy of which this process is rank 0 and the others have said what they want."""

    root_device = torch.device("cpu")

    def __init__(self, others):
        self.others = others

    def reduce_boolean_decision(self, decision, all=True):  # noqa: A002 - Lightning's name
        votes = [decision, *self.others]
        return min(votes) if all else max(votes)

    def all_gather(self, tensor):
        return torch.stack([tensor, *(torch.full_like(tensor, v) for v in self.others)])


@pytest.mark.parametrize(("mine", "others", "together"), [(0, (0, 0), 0), (1, (0, 0), 1), (0, (0, 1), 1)])
def test_one_rank_is_enough(mine, others, together):
    trainer = SimpleNamespace(strategy=Ranks([bool(o) for o in others]), should_stop=False)
    assert decide_together(trainer, wanted=bool(mine)) is bool(together)
    assert stop_training(trainer, wanted=bool(mine)) is bool(together)
    assert trainer.should_stop is bool(together)


def test_a_stop_that_was_asked_for_by_somebody_else_stands():
    trainer = SimpleNamespace(strategy=Ranks([False]), should_stop=True)
    assert not stop_training(trainer, wanted=False)
    assert trainer.should_stop


@pytest.mark.parametrize(
    ("mine", "others", "mean"), [(1.0, [3.0], 2.0), (None, [3.0], 3.0), (None, [float("nan")], None)]
)
def test_the_mean_is_over_the_ranks_that_have_a_value(mine, others, mean):
    assert mean_over_ranks(SimpleNamespace(world_size=2, strategy=Ranks(others)), mine) == mean
    assert mean_over_ranks(SimpleNamespace(world_size=1, strategy=None), mine) is mine


def test_lightning_ends_the_training_after_the_batch(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            stop_training(trainer, wanted=batch_idx == 6)

    assert train(Digits(), [Stop()], tmp_path).global_step == 7
