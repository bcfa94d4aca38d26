from collections import UserDict

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.record.batch_ring import DEPTH, BatchRing


class Module(LightningModule):
    def __init__(self, change) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.change = change

    def training_step(self, batch, batch_idx):
        x = batch["x"]
        self.noise = torch.rand(2)
        self.change(batch, batch_idx)
        return self.layer(x.detach().clone()).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Probe(SpikeCallback):
    """Looks at the ring when each batch has ended."""

    def __init__(self, ring: BatchRing, look) -> None:
        self.ring, self.look, self.seen = ring, look, []

    def attach(self, trainer, module):
        self.flight.share(BatchRing, lambda: self.ring, trainer, module)

    def act(self, batch, changed):
        self.seen.append(self.look(self.ring, batch))


def run(tmp_path, look, *, change=lambda batch, batch_idx: None, ring=None, collate=None, **options):
    data = [{"x": torch.full((3,), float(k))} for k in range(60)]
    probe = Probe(ring or BatchRing(), look)
    defaults = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "default_root_dir": tmp_path}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(**(defaults | quiet | options), callbacks=[probe])
    trainer.fit(Module(change), DataLoader(data, batch_size=3, collate_fn=collate))
    return probe


def held(ring, batch):
    return [e.at.ordinal for e in ring.entries()]


@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_last_batches_are_held_and_no_more(accumulate, tmp_path):
    probe = run(tmp_path, held, accumulate_grad_batches=accumulate)
    for now, ordinals in enumerate(probe.seen):
        assert ordinals[-1] == now
        assert ordinals == list(range(ordinals[0], now + 1))
        assert min(now + 1, DEPTH + accumulate) <= len(ordinals) <= DEPTH + accumulate + 2


def test_beyond_its_bytes_it_lets_go_early_but_keeps_the_step_and_one_before(tmp_path):
    probe = run(tmp_path, held, ring=BatchRing(max_bytes=1))
    assert {len(ordinals) for ordinals in probe.seen[3:]} == {3}


def test_a_batch_is_held_by_reference(tmp_path):
    probe = run(tmp_path, lambda ring, batch: ring.entry(batch.at.ordinal).batch["x"] is batch.batch["x"])
    assert all(probe.seen)


@pytest.mark.parametrize("container", [dict, UserDict])
def test_a_step_that_empties_its_batch_does_not_empty_the_entry(container, tmp_path):
    def collate(samples):
        return container({"x": torch.stack([s["x"] for s in samples])})

    def pop(batch, batch_idx):
        batch.pop("x")

    probe = run(tmp_path, lambda ring, batch: dict(ring.entry(batch.at.ordinal).batch), change=pop, collate=collate)
    assert [float(kept["x"][0, 0]) for kept in probe.seen] == [3.0 * k for k in range(20)]


def test_a_change_in_place_is_marked_on_that_batch_only(tmp_path):
    def change(batch, batch_idx):
        if batch_idx == 5:
            batch["x"][0] = 0

    probe = run(tmp_path, lambda ring, batch: ring.entry(batch.at.ordinal).mutated, change=change)
    assert [k for k, mutated in enumerate(probe.seen) if mutated] == [5]


def test_the_random_state_is_that_before_the_forward_pass(tmp_path):
    def look(ring, batch):
        noise, now = batch.module.noise, torch.get_rng_state()
        ring.entry(batch.at.ordinal).rng.restore()
        again = torch.rand(2)
        torch.set_rng_state(now)
        return torch.equal(noise, again)

    assert all(run(tmp_path, look).seen)


def test_nothing_is_held_after_the_fit(tmp_path):
    ring = BatchRing()
    run(tmp_path, held, ring=ring)
    assert ring.entries() == []
    assert ring.entry(3) is None


@pytest.mark.parametrize(
    "write", [torch.Tensor.copy_, lambda buffer, new: buffer.numpy().__setitem__(..., new.numpy())]
)
def test_a_buffer_that_the_loader_fills_anew_does_not_pass_for_the_old_batch(write, tmp_path):
    buffer = torch.zeros(3, 3)

    def collate(samples):
        write(buffer, torch.stack([s["x"] for s in samples]))
        return {"x": buffer}

    def look(ring, batch):
        return [(e.at.ordinal, e.mutated, float(e.batch["x"][0, 0])) for e in ring.entries()]

    probe = run(tmp_path, look, collate=collate)
    for seen in probe.seen:
        assert all(value == 3.0 * ordinal for ordinal, mutated, value in seen if not mutated)
    assert [ordinal for ordinal, mutated, _ in probe.seen[-1] if mutated] == []


def test_a_batch_that_is_written_to_later_is_marked_when_it_is_asked_for(tmp_path):
    def look(ring, batch):
        if batch.at.ordinal == 9:
            ring.entry(7).batch["x"].add_(1)
        return [e.at.ordinal for e in ring.entries() if e.mutated]

    assert run(tmp_path, look).seen[8:10] == [[], [7]]
