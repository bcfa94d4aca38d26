"""Runs to report on, made by hand: what the diagnosis says about them is given, not computed."""

import numpy as np
import pytest

from lightning_spike.diagnosis.rank import Diagnosis
from lightning_spike.records import (
    Action,
    Disabled,
    Episode,
    EpisodeKind,
    Evidence,
    Family,
    Finding,
    LayerRow,
    Moment,
    Recovery,
    RunFacts,
    RunStatus,
    StepRow,
    ValidationPoint,
    Verdict,
)
from lightning_spike.report import model
from lightning_spike.report.model import build_report
from lightning_spike.store import TrainerStateStore

STEPS, PER_EPOCH = 1200, 300


def pytest_addoption(parser):
    parser.addoption("--write-expected", action="store_true", help="write the texts in tests/report/expected anew")


def moment(ordinal):
    return Moment(ordinal=ordinal, step=ordinal, epoch=ordinal // PER_EPOCH, batch_idx=ordinal % PER_EPOCH)


def layer_row(ordinal, loss):
    return LayerRow(at=moment(ordinal), signal="grad_norm", values=np.array([loss, loss / 2], dtype=np.float32))


def healthy_store(steps=STEPS, noise=0.06):
    """A loss that falls from 2.3 to about 0.02 with noise, under a cosine learning rate, and its validations."""
    store = TrainerStateStore(RunFacts(started="2026-11-22T14:08:00+00:00", batches_per_epoch=PER_EPOCH, max_epochs=4))
    store.layer_names["grad_norm"] = ("net.0.weight", "net.0.bias")
    wobble = np.random.default_rng(0).normal(0, noise, steps)
    for i in range(steps):
        loss = (2.3 * np.exp(-i / 150) + 0.02) * np.exp(wobble[i])
        values = {
            "loss": loss,
            "grad_norm": 3 * loss**0.5,
            "lr-AdamW": 0.001 * (1 + np.cos(np.pi * (i % 400) / 400)) / 2,
        }
        store.append(StepRow(at=moment(i), values=values, batch_size=64), [layer_row(i, loss)])
        if (i + 1) % PER_EPOCH == 0:
            store.note(ValidationPoint(at=moment(i), metric="val_loss", value=loss * 1.4, train_loss=loss * 1.1))
    return store


def troubled_store():
    """The same with two spikes, after restarts of the learning rate at 400 and 800; the second has two NaNs."""
    store = TrainerStateStore(healthy_store().facts)
    source = healthy_store()
    for at in source.history.moments():
        i = at.ordinal
        values = {name: float(source.history.series(name)[i]) for name in ("loss", "grad_norm", "lr-AdamW")}
        for onset in (400, 800):
            if onset <= i < onset + 60:
                values["loss"] += 4.2 * np.exp(-(i - onset) / 12) * (i > onset)
                values["lr-AdamW"] = 0.1
                values["grad_norm"] *= 30
        if i in (803, 804):
            values["loss"] = values["grad_norm"] = np.nan
        store.append(StepRow(at=at, values=values, batch_size=64), [layer_row(i, values["loss"])])
    store.layer_names.update(source.layer_names)
    store.note(*source.validations)
    for episode in EPISODES:
        store.replace_episode(episode)
    store.note(*ACTIONS, Finding(detector="learning_rate", kind="restart", at=moment(400), detail={"factor": 100.0}))
    store.note(Disabled(part="BadBatchDumper", reason="OSError: [Errno 28] No space left on device", step=801))
    store.note("Per-sample losses could not be had: training_step reads self.trainer.current_epoch.")
    return store


EPISODES = (
    Episode(
        id=1, kind=EpisodeKind.SPIKE, onset=moment(400), noticed=moment(401), peak=moment(401), end=moment(431),
        loss_before=0.18, loss_peak=4.0, recovery=Recovery.WHOLE, severity=31.0,
    ),
    Episode(
        id=2, kind=EpisodeKind.NONFINITE, onset=moment(800), noticed=moment(801), peak=moment(803), end=None,
        loss_before=0.031, loss_peak=float("nan"), recovery=Recovery.NEVER, severity=99.0,
    ),
)  # fmt: skip

ACTIONS = (
    Action(
        action="dump",
        at=moment(400),
        detail={
            "episode": 1,
            "path": "batches/step-400",
            "dataset_indices": [812, 17, 4],
            "suspects": [
                {"position": 1, "dataset_index": 17, "loss": 9.5, "max_abs": 3.0},
                {"position": 2, "dataset_index": None, "loss": float("nan"), "max_abs": float("inf")},
            ],
        },
    ),
    Action(action="rollback", at=moment(806), detail={"to_step": 780, "lr_scale": 0.5, "attempt": 1}),
)

RESTART = Verdict(
    cause="lr_restart",
    family=Family.LEARNING_RATE,
    probability=0.91,
    episodes=(1, 2),
    confirmed=True,
    summary="The learning rate came back up from 0.001 to 0.1 at step 400, a factor of 100, "
    "one step before the loss rose from 0.18 to 4.0.",
    evidence=(
        Evidence(
            signal="lr-AdamW", step=400, observed=0.1, expected=0.001, weight=3.1,
            text="The schedule restarts at step 400, and again at 800: both episodes begin there.",
        ),
        Evidence(
            signal="loss", step=401, observed=4.0, expected=0.19, weight=2.2,
            text="With the learning rate of the step before, the replayed loss stays at 0.19.",
        ),
        Evidence(
            signal="batch/input/max_abs", step=400, observed=3.0, expected=2.9, weight=-0.4,
            text="The batch at the onset is like its neighbours.",
        ),
        Evidence(
            signal="grad_norm", step=None, observed=None, expected=None, weight=0.1,
            text="No layer leads the growth of the gradients.",
        ),
    ),
    fixes=(
        "Lower the peak of the restarts from lr=0.1; up to 0.004 did no harm in this run.",
        "Or warm up again after each restart, over about 40 steps.",
    ),
)  # fmt: skip

OTHERS = (
    Verdict(
        cause="gradient_explosion", family=Family.GRADIENT, probability=0.05, episodes=(2,), confirmed=False,
        summary="The gradient norm grew 30-fold over the episode and was not clipped; "
    "a symptom where the learning rate jumped before it.",
        fixes=("Clip: Trainer(gradient_clip_val=1.4).",),
    ),
    Verdict(
        cause="bad_batch", family=Family.DATA, probability=0.01, episodes=(1,), summary="Sample 17 has a high loss."
    ),
)  # fmt: skip

DIAGNOSIS = Diagnosis(per_episode={1: (RESTART,), 2: (RESTART, OTHERS[0])}, overall=(RESTART, *OTHERS))


@pytest.fixture
def troubled_run():
    return troubled_store()


@pytest.fixture
def troubled(troubled_run, monkeypatch):
    monkeypatch.setattr(model, "diagnose", lambda store: DIAGNOSIS)
    return build_report(troubled_run, status=RunStatus.FINISHED, seconds=12.34, steps=STEPS, device="cpu")


@pytest.fixture
def healthy():
    return build_report(healthy_store(), status=RunStatus.FINISHED, seconds=12.34, device="cpu")
