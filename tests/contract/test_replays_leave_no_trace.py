"""A dozen shapes of modules, trained with replays forced every few batches and without.

Not a bit is different, whatever is looked at.
"""

import pytest
import torch
from lab.replay.test_reproduce import Gan
from lab.shapes import SHAPES, Counters, Metrics, NormAndDropout
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from sandbox.test_isolation import Trace, generators, remains
from training_tasks import TwoByHand, digits

from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.errors import CannotReplay
from lightning_spike.lab.live_scene import recorded_losses
from lightning_spike.lab.replay.reproduce import reproduce
from lightning_spike.sandbox.isolation import isolated, loss_of
from lightning_spike.sandbox.state import TrainState


def by_hand(kind):
    class Fed(kind):
        def train_dataloader(self):
            generator = torch.Generator().manual_seed(3)
            return torch.utils.data.DataLoader(digits(64), batch_size=16, shuffle=True, generator=generator)

    Fed.__name__ = kind.__name__
    return Fed


EVERY = 7
REFUSED = {"ChangesModesAndGraph"}
"""Its step changes the batch in place."""
INEXACT = {"StepsSomethingElse"}
"""Keeps a net and its optimizer in a list, where nobody registers them; said in a remark."""


class Replays(Callback):
    """Every few batches.

    The run up to here once more, its updates with another rate, a batch with gradients; and a failure half way.
    """

    def __init__(self, suite):
        self.suite, self.count, self.exact, self.refused = suite, 0, [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.count += 1
        if self.count % EVERY:
            return
        witnesses, now = self.suite._witnesses, self.count - 1
        snapshot = witnesses.snapshots.latest_healthy(before=now)
        entries = [e for e in witnesses.ring.entries() if e.at.ordinal >= snapshot.at.ordinal]
        recorded = recorded_losses(witnesses.history, range(now + 1))
        settings = witnesses.settings.by_ordinal
        with isolated(trainer, pl_module, with_optimizers=True) as sandbox:
            try:
                again = reproduce(sandbox, TrainState.of(snapshot), entries, settings, recorded)
                self.exact.append(again.differs_at is None and again.replayed == recorded[now])
            except CannotReplay as reason:
                self.refused.append(str(reason))
            sandbox.rewind()
            loss_of(sandbox.step(batch, batch_idx)).backward()
        with (  # noqa: PT012 - leaving by an exception is the point
            pytest.raises(RuntimeError, match="half way"),
            isolated(trainer, pl_module, with_optimizers=True) as sandbox,
        ):
            TrainState.of(snapshot).load(sandbox)
            raise RuntimeError("half way")  # noqa: TRY003


def trained(shape, folder, callbacks, accumulate):
    seed_everything(11, verbose=False)
    module, trace = shape(), Trace()
    trainer = Trainer(
        callbacks=[*callbacks, trace],
        max_epochs=6,
        accelerator="cpu",
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger(folder),
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module)
    table = folder / "lightning_logs" / "version_0" / "metrics.csv"
    return {
        "losses": remains(trace.losses),
        "metrics": remains(trace.metrics),
        "module": remains({k: v for k, v in vars(module).items() if k != "_trainer"}),
        "optimizers": remains([o.state_dict() for o in trainer.optimizers]),
        "schedulers": remains([c.scheduler.state_dict() for c in trainer.lr_scheduler_configs]),
        "generators": generators(),
        "steps": (trainer.global_step, trainer.current_epoch, trainer.should_stop),
        "logged": table.read_text() if table.exists() else "",
    }


CASES = [(shape, 1) for shape in (*SHAPES, by_hand(TwoByHand), by_hand(Gan))]
ACCUMULATING = [(shape, 2) for shape in (NormAndDropout, Counters, Metrics)]


@pytest.mark.parametrize(("shape", "accumulate"), CASES + ACCUMULATING)
def test_not_a_bit_is_different(shape, accumulate, tmp_path):
    suite = CounterfactualReplay()
    replays = Replays(suite)
    watched = trained(shape, tmp_path / "watched", [suite, replays], accumulate)
    plain = trained(shape, tmp_path / "plain", [CounterfactualReplay()], accumulate)
    for key, value in plain.items():
        assert watched[key] == value, key
    assert plain["logged"] or shape is not Metrics
    if shape.__name__ in REFUSED:
        assert len(replays.refused) >= 3
    elif shape.__name__ in INEXACT:
        assert any("side" in remark for remark in suite.flight.store.remarks)
    else:
        assert replays.refused == []
        assert len(replays.exact) >= 3
        assert all(replays.exact)
