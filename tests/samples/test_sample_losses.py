import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from training_tasks import build, digits, train

from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.record.batch_ring import BatchRing
from lightning_spike.record.snapshot import Snapshot
from lightning_spike.records import Moment
from lightning_spike.samples.sample_losses import SampleLosses, losses_of_samples
from lightning_spike.signals.random_state import RandomState


class Asks(SpikeCallback):
    """Asks at the fourth batch, once its weights are spoilt where that is wanted."""

    def __init__(self, *, spoil: bool, snapshot: bool) -> None:
        self.spoil, self.with_snapshot = spoil, snapshot
        self.found: SampleLosses | None = None

    def attach(self, trainer, module):
        self.ring = self.flight.share(BatchRing, BatchRing, trainer, module)
        self.healthy = {name: t.clone() for name, t in module.state_dict().items()}

    def act(self, batch, changed):
        if batch.at.ordinal != 3:
            return
        module, first = batch.module, Moment(ordinal=0, step=0, epoch=0, batch_idx=0)
        if self.spoil:
            for parameter in module.parameters():
                parameter.data.fill_(torch.nan)
        snapshot = Snapshot(
            at=first, model=self.healthy, optimizers=[], scaler=None, rng=RandomState.take(), averages={}, means={}
        )
        before = {name: t.clone() for name, t in module.state_dict().items()}
        entry, control = self.ring.entry(3), self.ring.entry(2)
        self.found = losses_of_samples(
            batch.trainer, module, entry, size=16, controls=[control], snapshot=snapshot if self.with_snapshot else None
        )
        for name, tensor in module.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
        self.wrong_size = losses_of_samples(batch.trainer, module, entry, size=7, snapshot=snapshot)
        self.batch, self.control = entry.batch, control.batch


def asked(tmp_path, **how: bool) -> Asks:
    module, options = build("transformer")
    for part in module.modules():
        part.p = 0.0  # dropout off: what torch computes by itself below is then the same
        if isinstance(part, torch.nn.MultiheadAttention):
            part.dropout = 0.0
    asks = Asks(**how)
    trainer = train(module, [asks], tmp_path, dataset=digits(64), max_epochs=1, **options)
    assert trainer.global_step == 4
    return asks


@pytest.mark.parametrize("spoil", [False, True])
def test_under_a_snapshot_they_are_those_of_its_weights(spoil, tmp_path):
    asks = asked(tmp_path, spoil=spoil, snapshot=True)
    fresh, _ = build("transformer")
    fresh.load_state_dict(asks.healthy)
    fresh.eval()
    for losses, (x, y) in ((asks.found.losses, asks.batch), (asks.found.control, asks.control)):
        expected = F.cross_entropy(fresh(x), y, reduction="none")
        torch.testing.assert_close(
            torch.tensor(losses, dtype=torch.float64), expected.detach().double(), rtol=1e-4, atol=1e-5
        )
    assert asks.found.weights == "the snapshot from before step 0"
    assert asks.wrong_size is None


def test_without_a_snapshot_they_are_those_of_the_present_weights(tmp_path):
    asks = asked(tmp_path, spoil=False, snapshot=False)
    assert len(asks.found.losses) == 16
    assert asks.found.weights == "the weights at the detection of the episode"


def test_weights_that_are_not_finite_tell_nothing(tmp_path):
    assert asked(tmp_path, spoil=True, snapshot=False).found is None


class OneSpoilt(Asks):
    """A sample of the batch is scaled and another is not a number, in a net with BatchNorm."""

    def act(self, batch, changed):
        if batch.at.ordinal != 3:
            return
        entries = [self.ring.entry(k) for k in range(4)]
        x, y = (t.clone() for t in entries[3].batch)
        x[5] *= 100
        x[9, 0, 0, 0] = torch.nan
        struck = dataclasses.replace(entries[3], batch=[x, y])
        self.found = losses_of_samples(batch.trainer, batch.module, struck, size=16, controls=entries[:3])
        self.weights = {name: t.clone() for name, t in batch.module.state_dict().items()}
        self.batch = x, y


def test_no_sample_is_seen_through_another(tmp_path):
    module, options = build("cnn")
    asks = OneSpoilt(spoil=False, snapshot=False)
    train(module, [asks], tmp_path, dataset=digits(64), max_epochs=1, **options)
    found = asks.found
    module.load_state_dict(asks.weights)
    module.eval()
    x, y = asks.batch
    expected = F.cross_entropy(module(x), y, reduction="none").detach()
    assert [k for k, loss in enumerate(found.losses) if math.isnan(loss)] == [9]
    torch.testing.assert_close(
        torch.tensor(found.losses), expected, rtol=1e-4, atol=1e-5, equal_nan=True, check_dtype=False
    )
    assert len(found.control) == len(found.control_gradient_bounds) == 48
    others = [p for k, p in enumerate(found.gradient_bounds) if k not in {5, 9}]
    assert max(others) < 5 * max(found.control_gradient_bounds)
