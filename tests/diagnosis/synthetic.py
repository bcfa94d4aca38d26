"""Runs made of numbers: healthy first, then whatever a test puts in; judged by the real detectors, as a live run is."""

import dataclasses

import numpy as np
from lab_results import LabResult, experiments_of

from lightning_spike.detectors.episodes import EpisodeDetector
from lightning_spike.detectors.learning_rate import LearningRateDetector
from lightning_spike.diagnosis.catalogue import catalogue
from lightning_spike.diagnosis.cause import Cause, Fix
from lightning_spike.diagnosis.examine import examine
from lightning_spike.diagnosis.observation import Observation, Observer
from lightning_spike.diagnosis.view import EpisodeView
from lightning_spike.diagnosis.weights import fitted
from lightning_spike.records import (
    Episode,
    EpisodeKind,
    Family,
    LayerRow,
    Moment,
    OptimizerFacts,
    Recovery,
    RunFacts,
    SchedulerFacts,
    StepRow,
)
from lightning_spike.store import TrainerStateStore

PER_EPOCH = 40
ADAMW = OptimizerFacts(name="AdamW", class_name="AdamW", groups=({"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8},))
SGD = OptimizerFacts(name="SGD", class_name="SGD", groups=({"lr": 0.01, "momentum": 0.9},))
WARM_RESTARTS = SchedulerFacts(
    class_name="CosineAnnealingWarmRestarts", optimizer="AdamW", interval="step", frequency=1, settings={"T_0": 100}
)


def moment(ordinal):
    return Moment(ordinal=ordinal, step=ordinal, epoch=ordinal // PER_EPOCH, batch_idx=ordinal % PER_EPOCH)


class Run:
    """The series of a healthy run, to be bent by a test before it is judged."""

    def __init__(
        self, seed=0, length=400, *, optimizer=ADAMW, schedulers=(), clip=None, precision="32-true", noise=0.1
    ):
        rng = np.random.default_rng(seed)
        self.length = length
        steps = np.arange(length)
        self.loss = (0.3 + 2.0 * np.exp(-steps / 60)) * np.exp(noise * rng.standard_normal(length))
        self.grad = 0.8 * np.exp(0.2 * rng.standard_normal(length))
        self.rate = np.full(length, 0.01)
        self.max_abs = 3.0 * np.exp(0.05 * rng.standard_normal(length))
        self.std = 1.0 * np.exp(0.02 * rng.standard_normal(length))
        self.mean = 0.01 * rng.standard_normal(length)
        self.nonfinite = np.zeros(length)
        self.facts = RunFacts(
            started="2026-01-01T00:00:00+00:00",
            optimizers=(optimizer,),
            schedulers=schedulers,
            gradient_clip_val=clip,
            gradient_clip_algorithm=None if clip is None else "norm",
            precision=precision,
            batches_per_epoch=PER_EPOCH,
            max_epochs=length // PER_EPOCH,
        )
        self.more = {}
        """Further series by signal, each of shape `(length,)`; NaN where a batch has no such value."""
        self.layers = {}
        """By signal the names and, by ordinal, the values of every one."""
        self.notes = []
        self.episodes = None

    @property
    def rate_signal(self):
        return f"lr-{self.facts.optimizers[0].name}"

    def bump(self, at, height, fade=12.0):
        """Lift the loss from a batch on, by a factor that fades."""
        after = np.arange(self.length - at)
        self.loss[at:] *= 1.0 + (height - 1.0) * np.exp(-after / fade)

    def bump_gradient(self, at, height, fade=12.0):
        after = np.arange(self.length - at)
        self.grad[at:] *= 1.0 + (height - 1.0) * np.exp(-after / fade)

    def odd_batch(self, at, factor):
        self.max_abs[at] *= factor
        self.std[at] *= factor

    def restarts(self, period, peak=0.1, low=0.001):
        """A cosine schedule with warm restarts; torch's first cycle begins at the peak, so it is given here, too."""
        phase = np.arange(self.length) % period / period
        self.rate = low + 0.5 * (peak - low) * (1.0 + np.cos(np.pi * phase))

    def note(self, *items):
        self.notes.extend(items)

    def lab_split(self, verdict, episode=1):
        self.note(LabResult("split", {"episode": episode, "verdict": verdict}))

    def row(self, ordinal):
        values = {
            "loss": self.loss[ordinal],
            "grad_norm": self.grad[ordinal],
            self.rate_signal: self.rate[ordinal],
            "batch/input/max_abs": self.max_abs[ordinal],
            "batch/input/std": self.std[ordinal],
            "batch/input/mean": self.mean[ordinal],
            "batch/input/nonfinite": self.nonfinite[ordinal],
            "batch/input/zeros": 0.0,
        }
        values |= {signal: series[ordinal] for signal, series in self.more.items() if not np.isnan(series[ordinal])}
        return StepRow(
            at=moment(ordinal), values={k: float(v) for k, v in values.items()}, batch_size=32, usual_batch_size=32
        )

    def store(self, *, without=()):
        """The store as the callbacks would have left it; signals that begin with one of `without` were not recorded."""
        store = TrainerStateStore(self.facts)
        store.layer_names = {signal: names for signal, (names, _) in self.layers.items()}
        episodes = EpisodeDetector()
        rates = LearningRateDetector(self.facts.schedulers)
        for ordinal in range(self.length):
            row = self.row(ordinal)
            kept = {k: v for k, v in row.values.items() if not k.startswith(tuple(without) or ("\0",))}
            row = dataclasses.replace(row, values=kept)
            vectors = ((signal, rows.get(ordinal)) for signal, (_, rows) in self.layers.items())
            store.append(
                row, [LayerRow(at=row.at, signal=s, values=np.float32(v)) for s, v in vectors if v is not None]
            )
            for episode in episodes.observe(row) if self.episodes is None else ():
                store.replace_episode(episode)
            for name, value in kept.items():
                if name.startswith("lr-"):
                    store.note(*rates.observe(name.removeprefix("lr-"), row.at, value))
        for episode in episodes.finish() if self.episodes is None else self.episodes:
            store.replace_episode(episode)
        results = [note for note in self.notes if isinstance(note, LabResult)]
        store.note(*(note for note in self.notes if note not in results), *experiments_of(results))
        return store


class Said:
    """What one cause says of one episode."""

    def __init__(self, cause, view):
        found = examine(cause, view, fitted(), [])
        self.evidence, self.confirmed = found.evidence, found.confirmed
        self.total, self.supported = found.total, found.supported
        self.summary, self.fixes = cause.summary(view), tuple(fix.text for fix in cause.fixes(view))
        self.change = next((fix.change for fix in cause.fixes(view)), None)

    def level(self, observation):
        """What an observer gave; `None` where it said nothing."""
        return next((e.level for e in self.evidence if e.observation == observation), None)


def said_of(cause, store, episode=None):
    """What a cause, by its id, says of an episode, by default the first."""
    view = EpisodeView(store, store.episodes[0] if episode is None else episode)
    return Said(next(c for c in catalogue() if c.id == cause), view)


def a_cause(name, weight=0.0, *, explains=(), confirmed=None, family=Family.GENERALIZATION, **more):
    """A cause that says what a test wants: one piece of evidence, of this weight or of one that depends on the view."""

    def look(view):
        level = str(weight(view)) if callable(weight) else str(weight)
        weights.setdefault(level, float(level))
        return Observation("t", level=level, signal="s", step=0, observed=1.0, expected=0.0, confirms=confirmed)

    weights = {}
    settings = {"summary": lambda _: "s", "fixes": lambda _: (Fix("f"),), "weights": {"look": weights}} | more
    return Cause(
        id=name, family=family, title=name, meaning=name, explains=frozenset(explains),
        observations=(Observer("look", (), look),), **settings,
    )  # fmt: skip


def an_episode(
    onset, peak=None, end=None, *, kind=EpisodeKind.SPIKE, before=0.3, height=4.0, recovery=Recovery.WHOLE, **more
):
    """An episode written by hand."""
    return Episode(
        id=more.pop("id", 1),
        kind=kind,
        onset=moment(onset),
        noticed=moment(onset if peak is None else peak),
        peak=moment(onset if peak is None else peak),
        end=None if end is None else moment(end),
        loss_before=before,
        loss_peak=height,
        recovery=recovery,
        severity=more.pop("severity", 30.0),
        **more,
    )
