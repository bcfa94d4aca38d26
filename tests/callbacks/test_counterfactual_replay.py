"""Faults of known kind in a real `fit`: what the re-run says of them, and that the training does not notice."""

import math

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from torch.nn import functional as F  # noqa: N812 - the field's name for it
from training_tasks import TASKS, Digits, train

from lightning_spike.callbacks import counterfactual_replay
from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.diagnosis.judgement import (
    jump_shares,
    split_verdict,
    steps_too_long_in_quiet_run,
    update_direction,
)
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.errors import ConfigurationError
from lightning_spike.store import TrainerStateStore
from lightning_spike.testing import GradientsTurnRound

SIZE = 16
LATE, EARLY = 284, 84
"""Batches that go wrong, 34 after a snapshot each. What is not finite is seen at once, a spike once the detector knows
the noise."""


class At(Callback):
    """Does something to the run at one batch, counted over the run."""

    def __init__(self, ordinal, start=None, end=None):
        self.ordinal, self.start, self.end, self.count = ordinal, start, end, -1

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.start and self.count == self.ordinal:
            self.start(trainer, pl_module, batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if self.end and self.count == self.ordinal:
            self.end(trainer, pl_module, optimizer)


def wrong_labels(trainer, module, batch):
    batch[1].add_(5).remainder_(10)


def nan_in_image(trainer, module, batch):
    batch[0][3, 0, 2, 2] = math.nan


def high_rate(trainer, module, optimizer):
    optimizer.param_groups[0]["lr"] *= 400


def noise_on_weights(trainer, module, batch):
    with torch.no_grad(), torch.random.fork_rng():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 2)


def seeded(make):
    seed_everything(0, verbose=False)
    return make()


def measured(trainer):
    """What the lab measured, by episode."""
    return list(TrainerStateStore.of(trainer).experiments.values())


def shares(found):
    """The shares of the jump by group, the largest first."""
    return dict(sorted(jump_shares(found).items(), key=lambda item: -item[1]))


def examined(trainer):
    return [found for found in measured(trainer) if found.split is not None]


def not_run(trainer):
    return [found.not_run for found in measured(trainer) if found.not_run is not None]


def run(tmp_path, *faults, make=lambda: Digits(0.003), epochs=9, **options):
    """Faults stand before the suite, so that it sees what they have done."""
    callbacks = [*faults, CounterfactualReplay(**options)]
    return train(seeded(make), callbacks, tmp_path, max_epochs=epochs, batch_size=SIZE)


def momentum_from_outside(trainer, module, batch):
    for entry in trainer.optimizers[0].state.values():
        entry["momentum_buffer"].mul_(-3000)


@pytest.mark.parametrize(
    ("fault", "verdict", "first"),
    [
        pytest.param({"ordinal": LATE, "start": wrong_labels}, "data", "data", id="batch"),
        pytest.param({"ordinal": LATE - 1, "end": high_rate}, "weights", "learning_rate", id="rate"),
        pytest.param(
            {"ordinal": LATE, "start": noise_on_weights}, "not_reproduced", "outside", id="weights-from-outside"
        ),
        pytest.param(
            {"ordinal": LATE - 1, "start": momentum_from_outside},
            "not_reproduced",
            "optimizer",
            id="state-from-outside",
        ),
    ],
)
def test_the_verdict_names_what_was_done(fault, verdict, first, tmp_path):
    trainer = run(tmp_path, At(**fault))
    found = TrainerStateStore.of(trainer).experiments[1]
    assert split_verdict(found) == verdict, found.not_run
    assert found.replay.exact
    assert next(iter(shares(found))) == first
    assert shares(found)[first] > 0.7
    assert sum(shares(found).values()) == pytest.approx(1.0)
    assert next(a.detail["episode"] for a in TrainerStateStore.of(trainer).actions if a.action == "replay") == 1


def test_gradients_that_the_code_turns_round_are_not_taken_for_a_step_that_is_too_long(tmp_path):
    trainer = run(tmp_path, GradientsTurnRound(LATE - 6, 40.0, length=6))
    found = TrainerStateStore.of(trainer).experiments[1]
    assert update_direction(found.update) == "turned"
    assert found.update.slope == pytest.approx(-1 / 40, rel=0.2)
    assert found.update.slope_usual == pytest.approx(1.0, rel=0.2)
    assert next(iter(shares(found))) == "gradient"
    first = diagnose(TrainerStateStore.of(trainer)).overall[0]
    assert (first.cause, first.confirmed) == ("gradient_reversal", True)


def test_the_update_that_did_it_is_found_and_what_would_have_helped(tmp_path):
    trainer = run(tmp_path, At(LATE - 1, end=high_rate))
    found = measured(trainer)[0]
    assert found.attribution.ordinal == LATE - 1
    assert "learning_rate" not in found.attribution.at_baseline
    share = found.attribution.shares[0]
    assert share.factor == "learning_rate"
    assert share.share == pytest.approx(1.0, abs=0.3)
    assert share.error < 0.3
    assert next(r for r in found.remedies if r.remedy == "lower_rate").repaired > 0.5


def test_what_was_written_from_outside_is_named(tmp_path):
    def into_one_layer(trainer, module, batch):
        with torch.no_grad():
            module.net[-1].weight.add_(torch.randn(10, 512, generator=torch.Generator().manual_seed(1)))

    trainer = run(tmp_path, At(LATE, start=into_one_layer))
    change = measured(trainer)[0].outside_change
    assert change.ordinal == LATE
    assert [(write.kind, write.names) for write in change.writes] == [("weights", ("net.5.weight",))]
    assert change.different[0].name.endswith(("net.5.weight", "momentum_buffer"))


def test_an_examination_costs_no_more_than_some_dozens_of_steps(tmp_path):
    trainer = run(tmp_path, At(LATE - 1, end=high_rate))
    found = measured(trainer)[0]
    assert found.cost.updates - found.replay.batches <= 12
    assert found.cost.steps - found.replay.batches <= 80


def test_a_value_that_is_not_finite_is_traced_to_the_batch(tmp_path):
    trainer = run(tmp_path, At(EARLY, start=nan_in_image), epochs=3)
    found = measured(trainer)[0]
    assert (found.first_nonfinite.phase, found.first_nonfinite.operation) == ("input", "batch[0]")
    assert split_verdict(found) == "data"


class LogOfZero(Digits):
    """Its loss takes the logarithm of the first pixel's part in the image, which one image does not have."""

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self(x), y) + 1e-3 * x.flatten(1).sum(1).log().mean()


def blacken(trainer, module, batch):
    batch[0][5].zero_()


def test_a_value_that_is_not_finite_is_traced_to_its_operation(tmp_path):
    trainer = run(tmp_path, At(EARLY, start=blacken), make=LogOfZero, epochs=3)
    born = measured(trainer)[0].first_nonfinite
    assert (born.phase, born.operation, born.with_healthy_weights) == ("loss", "log", True)


def no_gradients(trainer, module, optimizer):
    """So that the weights stay finite, and what comes after can be compared."""
    for p in module.parameters():
        if p.grad is not None:
            p.grad.zero_()


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].clone() if outputs and "loss" in outputs else None)


@pytest.mark.parametrize("task", TASKS)
def test_the_training_goes_on_as_if_nothing_had_been_run_again(task, tmp_path):
    make, settings = TASKS[task]
    ends, losses = [], []
    for suite in ([CounterfactualReplay()], []):
        seen, module = Losses(), seeded(make)
        fault = At(EARLY, start=nan_in_image, end=no_gradients)
        trainer = train(module, [fault, *suite, seen], tmp_path, max_epochs=4, batch_size=SIZE, **settings)
        ends.append([*module.state_dict().values(), *_tensors(trainer.optimizers), torch.get_rng_state()])
        losses.append(seen.losses)
        if suite:
            assert measured(trainer)[0].replay.exact
    assert len(losses[0]) == 128
    assert all(_same(a, b) for a, b in zip(*losses, strict=True))
    assert all(_same(a, b) for a, b in zip(*ends, strict=True))
    assert task == "two_by_hand" or all(loss.isfinite() for loss in losses[0][EARLY + 1 :])


def _tensors(optimizers):
    return [
        v
        for o in optimizers
        for entry in o.state_dict()["state"].values()
        for v in entry.values()
        if torch.is_tensor(v)
    ]


def _same(a, b):
    return a is b if a is None or b is None else torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))


def test_what_cannot_be_run_again_is_said_and_left_alone(tmp_path):
    class Once(Digits):
        def __init__(self):
            super().__init__()
            self.stream = iter(range(10**6))

        def training_step(self, batch, batch_idx):
            next(self.stream)
            return super().training_step(batch, batch_idx)

    trainer = run(tmp_path, At(EARLY, start=nan_in_image), make=Once, epochs=3)
    assert "module.stream is a range_iterator" in not_run(trainer)[0]
    assert examined(trainer) == []


def test_some_seconds_are_free_so_that_short_runs_get_their_answers(tmp_path, monkeypatch):
    monkeypatch.setattr(counterfactual_replay, "FREE_SECONDS", 600.0)  # as long as a busy machine may need
    faults = [At(k, start=nan_in_image, end=no_gradients) for k in (EARLY, EARLY + 30)]
    trainer = run(tmp_path, *faults, epochs=4, budget=1e-6)
    assert len(examined(trainer)) == 2
    assert not_run(trainer) == []


def test_after_the_first_an_examination_must_fit_into_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(counterfactual_replay, "FREE_SECONDS", 0.0)
    faults = [At(k, start=nan_in_image, end=no_gradients) for k in (EARLY, EARLY + 30)]
    trainer = run(tmp_path, *faults, epochs=4, budget=1e-6)
    assert len(examined(trainer)) == 1
    assert all("budget" in reason for reason in not_run(trainer))
    assert len(not_run(trainer)) >= 1


@pytest.mark.parametrize(
    ("name", "value"), [("budget", 0), ("budget", 2.0), ("max_episodes", 0), ("controls", 1.5), ("budget", "2 %")]
)
def test_an_argument_out_of_range_is_refused(name, value):
    with pytest.raises(ConfigurationError, match=name):
        CounterfactualReplay(**{name: value})


class Across(Digits):
    """A rate so high that the loss is thrown about, and never falls nor leaves its noise."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.rate)

    def __init__(self, rate):
        super().__init__(0.0)
        self.rate = rate
        self.place = torch.nn.Parameter(torch.tensor([0.4]))

    def training_step(self, batch, batch_idx):
        goal = 0.1 * torch.randn(1)
        return ((self.place - goal).square() + 0.01).sqrt().mean() + 0.0 * super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("rate", "too_long"), [(1.0, True), (0.02, False)])
def test_steps_too_long_are_told_of_a_run_that_never_had_an_episode(rate, too_long, tmp_path, monkeypatch):
    monkeypatch.setattr(counterfactual_replay, "FREE_SECONDS", 600.0)
    trainer = run(tmp_path, make=lambda: Across(rate), epochs=4)
    assert not TrainerStateStore.of(trainer).episodes
    tests = TrainerStateStore.of(trainer).step_size_tests
    assert tests
    assert [steps_too_long_in_quiet_run(test.result) for test in tests] == [too_long] * len(tests)
    assert all((test.at.ordinal + 1).bit_count() == 1 for test in tests)
    if too_long:
        assert tests[0].result.rho < 0.6
