"""What the lab says of faults whose factor is known, with decoys beside them.

    python benchmarks/lab.py [--quick] [--seed 0] [--seeds 3] [--jobs 2] [--net NET ...] [--fault FAULT ...] [--out
    lab.json] [--show]

Five nets, SGD with momentum and AdamW, batch 4 and 32, faults of four groups (data, learning rate, optimizer state,
weights from outside) in three strengths, each with the decoys that fit: a batch with somewhat too much contrast and a
rate of 1.5 times the usual at the same step. Beside them runs whose rate was too high all along, and runs with two
faults at once (counted where each really adds to the rise, as four trainings of the same run without us show). A run
counts if an episode was seen within eight batches. Prints how often the group that the lab names first is the right
one, with the 95 % interval (Wilson), beside what the signatures alone would name; how often the located update is the
one; and what an examination costs in training steps.
"""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import logging
import math
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.progress import track
from rich.table import Table
from shared.intervals import wilson
from shared.models import MOMENTUM, NETS, Task, loader
from typing_extensions import override

from lightning_spike import RootCauseReport, TrainerStateStore, suite
from lightning_spike.callbacks.counterfactual_replay import CounterfactualReplay
from lightning_spike.callbacks.scene_recorder import SceneRecorder
from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.judgement import jump_shares, split_verdict
from lightning_spike.diagnosis.rank import diagnose
from lightning_spike.experiments import Experiments
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.records import Episode, EpisodeKind
from lightning_spike.sandbox.budget import Extent
from lightning_spike.testing.faults.bad_batch import CorruptTokens, ExtremeValues
from lightning_spike.testing.faults.code_bug import WeightsOverwritten
from lightning_spike.testing.faults.decoys import HarmlessNoise, HarmlessRate, HarmlessScale, HarmlessTokens
from lightning_spike.testing.faults.label_noise import WrongLabels
from lightning_spike.testing.faults.learning_rate import RateJump
from lightning_spike.testing.faults.optimizer_state import StateRescaled, StateScrambled

AT: Final = 230
"""The batch that is struck, moved by up to 24 with the seed, so that the distance to the snapshot differs."""
AFTER: Final = 24
"""Batches trained after it."""
SEEN: Final = 8
"""An episode with its onset up to this many batches after the fault is the fault's."""
REAL: Final = 0.1
"""True share of the rise from which each of two faults in a run is one to be named."""
TOLD: Final = 0.05
"""Share from which a group is listed with a wrong answer."""
WRITERS: Final = (RootCauseReport, SceneRecorder)
"""What only writes files."""
CHRONIC_STEPS: Final = 600
CHRONIC_SETTINGS: Final[Mapping[tuple[str, str], tuple[tuple[float, float], ...]]] = {
    ("mlp", "SGD"): ((5.0, 0.9), (6.0, 0.9), (2.0, 0.97)),
    ("autoencoder", "SGD"): ((18.0, 0.9), (25.0, 0.9), (12.0, 0.95)),
    ("gru", "SGD"): ((6.0, 0.9),),
}
"""Factors on a good rate, and momenta, at which runs go on training but spike now and then; chosen by that alone, with
plain loops of 800 steps on seeds 0 and 1. What is not listed only gets noisy, or does not train."""
CHRONIC_EPISODES: Final = 3
"""Episodes of a run with a rate that is too high all along that count, the first ones."""
SETTLED: Final = 60
"""Batches after which a run has left its first, wild phase."""


# -- what is put in
# ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A fault in three strengths, and who is to blame."""

    group: str
    make: Callable[[int, float, int], Callback]
    """From the batch, the strength and a seed."""
    strengths: tuple[float, float, float]
    shows_at: int = 0
    """Batches after the struck one at which its loss jumps: what spoils an update shows with the next batch."""
    nets: frozenset[str] = frozenset(NETS)


FLOATS: Final = frozenset({"mlp", "cnn", "autoencoder"})
TOKENS: Final = frozenset(NETS) - FLOATS

KINDS: Final[Mapping[str, Kind]] = {
    "extreme values": Kind(
        group="data", make=lambda at, k, seed: ExtremeValues(at, k, seed=seed), strengths=(6, 12, 40), nets=FLOATS
    ),
    "corrupt tokens": Kind(
        group="data", make=lambda at, k, seed: CorruptTokens(at, k, seed=seed), strengths=(0.5, 0.75, 1), nets=TOKENS
    ),
    "wrong labels": Kind(
        group="data",
        make=lambda at, k, seed: WrongLabels(at, k, seed=seed), strengths=(0.5, 0.75, 1),
    ),
    "rate for one update": Kind(
        group="learning_rate", make=lambda at, k, _: RateJump(at, k, length=1), strengths=(30, 60, 150), shows_at=1
    ),
    "rate for three updates": Kind(
        group="learning_rate", make=lambda at, k, _: RateJump(at, k, length=3), strengths=(12, 25, 60), shows_at=1
    ),
    "rate from then on": Kind(
        group="learning_rate", make=lambda at, k, _: RateJump(at, k, length=None), strengths=(8, 15, 40), shows_at=1
    ),
    "state rescaled": Kind(
        group="optimizer", make=lambda at, k, _: StateRescaled(at, k), strengths=(30, 100, 300), shows_at=1
    ),
    "state scrambled": Kind(
        group="optimizer", make=lambda at, k, seed: StateScrambled(at, k, seed=seed), strengths=(30, 100, 300),
        shows_at=1
    ),
    "weights overwritten": Kind(
        group="outside", make=lambda at, k, seed: WeightsOverwritten(at, k, seed=seed), strengths=(0.5, 1, 2)
    ),
}  # fmt: skip
CHRONIC: Final = "rate too high all along"
TWO: Final = "rate and labels at once"


def _decoys(at: int, seed: int, net: str, group: str) -> list[Callback]:
    """Harmless oddities at the same step, of the groups that are not to blame."""
    if net == "autoencoder":  # its target is its input as it was: to scale one of them alone would be no harmless thing
        odd_batch: Callback = HarmlessNoise(at, 0.1, seed=seed)
    else:
        odd_batch = HarmlessScale(at, 1.5, seed=seed) if net in FLOATS else HarmlessTokens(at, 0.02, seed=seed)
    decoys: dict[str, Callback] = {"learning_rate": HarmlessRate(at, 1.5), "data": odd_batch}
    return [decoy for guilty, decoy in decoys.items() if guilty != group]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training."""

    net: str
    optimizer: str
    batch_size: int
    fault: str
    strength: float
    seed: int
    momentum: float = MOMENTUM

    @property
    def at(self) -> int:
        """The batch that is struck."""
        return AT + (7 * self.seed) % 24

    @property
    def groups(self) -> frozenset[str]:
        """Who is to blame; the answers that are right."""
        if self.fault == TWO:
            return frozenset({"learning_rate", "data"})
        return (
            frozenset({"intrinsic", "learning_rate"}) if self.fault == CHRONIC else frozenset({KINDS[self.fault].group})
        )

    def faults(self) -> list[Callback]:
        """What is put in, decoys included."""
        if self.fault == CHRONIC:
            return []
        if self.fault == TWO:
            return [RateJump(self.at - 1, self.strength, length=1), WrongLabels(self.at, 1.0, seed=self.seed)]
        kind = KINDS[self.fault]
        return [kind.make(self.at, self.strength, self.seed), *_decoys(self.at, self.seed, self.net, kind.group)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What was said of one episode of a run."""

    run: Run
    onset: int | None = None
    """Batches from the struck one to the onset; `None` where no episode was seen."""
    first: str | None = None
    second: str | None = None
    shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    by_signature: str | None = None
    located: int | None = None
    """Batches from the struck one to the update that was located."""
    is_run_again: bool = False
    """Whether the moment came out again as it was."""
    by_present: bool = False
    """Whether its beginning was out of reach, and the steps of the present were looked at instead."""
    why_not: str | None = None
    cost: float | None = None
    """Of the examination, in training steps' worth of the processor's time, the way from the snapshot included."""
    triage: float | None = None
    """Of a triage of the same episode, in the same."""
    way: int | None = None
    """Batches from the snapshot to the one that was looked at."""
    passes: int | None = None
    """Runs of `training_step` in the examination …"""
    updates: int | None = None
    """… and how many of them went on to an update."""
    true_shares: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """With two faults, what each of them really adds to the rise of the struck batch's loss: its Shapley value over
    four trainings, with and without each, as a share of both."""
    worsened: tuple[int, int] | None = None
    """Of the updates before, how many worsened their own batch's loss, and how many there were."""


# -- one run
# -------------------------------------------------------------------------------------------------------------


class WithTriage(CounterfactualReplay):
    """Makes a triage before every full examination, and takes the processor's time of both.

    With others on the machine the clock on the wall tells little.
    """

    def __init__(self) -> None:
        super().__init__(budget=1.0)
        self.seconds: dict[int, dict[Extent, float]] = {}
        """By the id of the episode."""

    @override
    def _experiments(
        self, batch: TrainingBatch, episode: Episode, extent: Extent, *, again: bool, by: int
    ) -> Experiments:
        if again:
            return super()._experiments(batch, episode, extent, again=again, by=by)
        if extent == "full":
            self._timed(batch, episode, "triage", by)
        return self._timed(batch, episode, extent, by)

    def _timed(self, batch: TrainingBatch, episode: Episode, extent: Extent, by: int) -> Experiments:
        started = time.process_time()
        found = super()._experiments(batch, episode, extent, again=False, by=by)
        self.seconds.setdefault(episode.id, {})[extent] = time.process_time() - started
        return found


def outcomes_of(run: Run, show: bool = False) -> list[Outcome]:
    """Train once, and read what the lab says."""
    torch.set_num_threads(1)
    chronic = run.fault == CHRONIC
    seed_everything(run.seed, verbose=False)
    task = Task(run.net, run.optimizer, run.batch_size, faster=run.strength if chronic else 1.0, momentum=run.momentum)
    replay = WithTriage()
    store, pace = _train(run, task, CHRONIC_STEPS if chronic else run.at + AFTER, replay)
    episodes = [
        e for e in store.episodes if e.kind in {EpisodeKind.SPIKE, EpisodeKind.DIVERGENCE, EpisodeKind.NONFINITE}
    ]
    if chronic:
        late = {
            e.onset.ordinal: e for e in reversed(episodes) if e.onset.ordinal >= SETTLED
        }  # an onset may be that of several signals
        chosen = [late[onset] for onset in sorted(late)][:CHRONIC_EPISODES]
    else:
        near = [e for e in episodes if run.at - 1 <= e.onset.ordinal <= run.at + SEEN]
        chosen = sorted(near, key=lambda e: -e.severity)[:1]  # a decoy may have made a small one of its own
    if show:
        print(run)
        for found in store.experiments.values():
            print("   ", *sentences.about(found), sep="\n    ")
    if not chosen:
        return [Outcome(run=run)]
    return [
        dataclasses.replace(outcome, true_shares=_true_shares(run) if run.fault == TWO else {})
        for episode in chosen
        for outcome in [
            _outcome(run, store, episode, {k: s / pace for k, s in replay.seconds.get(episode.id, {}).items()})
        ]
    ]


def _true_shares(run: Run) -> dict[str, float]:
    """By trainings without any of us: the loss of the struck batch with none of the two faults, either, and both.

    What one adds is no fault of the run where it adds nothing.
    """
    rate, labels = run.faults()
    none, with_rate, with_labels, both = (
        math.log(_struck_loss(run, list(faults))) for faults in ((), (rate,), (labels,), (rate, labels))
    )
    parts = {
        "learning_rate": 0.5 * (with_rate - none + both - with_labels),
        "data": 0.5 * (with_labels - none + both - with_rate),
    }
    return {group: part / (both - none) for group, part in parts.items()} if both > none else {}


class LossAt(Callback):
    """Remembers the loss of one batch."""

    def __init__(self, at: int) -> None:
        self.at, self.count, self.loss = at, -1, math.nan

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: object) -> None:
        self.count += 1
        if self.count == self.at:
            self.loss = float(outputs["loss"])


def _struck_loss(run: Run, faults: list[Callback]) -> float:
    seed_everything(run.seed, verbose=False)
    task, seen = Task(run.net, run.optimizer, run.batch_size, momentum=run.momentum), LossAt(run.at)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        _trainer(folder, run.at + 1, [*faults, seen]).fit(task, loader(run.net, run.batch_size, run.seed))
    return seen.loss


def _trainer(folder: str, steps: int, callbacks: list[Callback]) -> Trainer:
    return Trainer(
        max_steps=steps, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False, callbacks=callbacks, default_root_dir=folder,
    )  # fmt: skip


def _train(run: Run, task: Task, steps: int, replay: WithTriage) -> tuple[TrainerStateStore, float]:
    """The store afterwards, and the seconds of a training step."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        watching = [c for c in suite(replay, dirpath=folder) if not isinstance(c, WRITERS)]
        callbacks = [*run.faults(), *watching, clock]
        trainer = _trainer(folder, steps, callbacks)
        trainer.fit(task, loader(run.net, run.batch_size, run.seed))
    return TrainerStateStore.of(trainer), clock.pace


class Clock(Callback):
    """The processor's seconds between the beginnings of two batches, in the middle."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @override
    def on_train_batch_start(self, *_: object, **__: object) -> None:
        self.times.append(time.process_time())

    @property
    def pace(self) -> float:
        """The median."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.times))


def _outcome(run: Run, store: TrainerStateStore, episode: Episode, steps: Mapping[Extent, float]) -> Outcome:
    found = store.experiments.get(episode.id) or Experiments(episode=episode.id)
    shares = {str(group): share for group, share in jump_shares(found).items()}
    ranked = sorted((g for g, s in shares.items() if s > 0), key=lambda g: -shares[g])
    size, cost, replay = found.step_size, found.cost, found.replay
    return Outcome(
        run=run,
        onset=episode.onset.ordinal - run.at,
        first=ranked[0] if ranked else None,
        second=ranked[1] if len(ranked) > 1 else None,
        shares=shares,
        by_signature=_by_signature(store, episode.id),
        located=None if found.attribution is None else found.attribution.ordinal - run.at,
        is_run_again=replay is not None and replay.exact,
        by_present=size is not None and found.split is None,
        why_not=_why_not(found),
        cost=steps.get("full"),
        triage=steps.get("triage"),
        way=None if replay is None else replay.batches,
        updates=None if cost is None else cost.updates,
        worsened=None if size is None else (round(size.worsened * size.updates), size.updates),
        passes=None if cost is None else cost.steps,
    )


def _why_not(found: Experiments) -> str | None:
    if found.not_run is not None:
        return found.not_run
    if found.split is not None and not jump_shares(found):
        return f"{split_verdict(found)}, {None if found.replay is None else found.replay.failure}"
    return None


SIGNATURES: Final = {
    "data": "data",
    "learning_rate": "learning_rate",
    "optimizer": "optimizer",
    "environment": "outside",
}


def _by_signature(store: TrainerStateStore, episode: int) -> str | None:
    """The group of the cause that comes first where the lab has said nothing."""
    bare = TrainerStateStore(store.facts)
    bare.__dict__.update(store.__dict__)
    bare.experiments, bare.step_size_tests = {}, []
    verdicts = diagnose(bare).per_episode.get(episode, ())
    return SIGNATURES.get(verdicts[0].family, str(verdicts[0].family)) if verdicts else None


# -- all runs
# ------------------------------------------------------------------------------------------------------------


def runs(net: str, optimizer: str, batch_size: int, seed: int, faults: Sequence[str], *, quick: bool) -> Iterable[Run]:
    """The runs of one training, one for each fault and strength; with `quick` the middle strength only."""
    for fault in faults:
        strengths = _strengths(fault, net, optimizer)
        for strength, momentum in strengths[1:2] if quick else strengths:
            yield Run(
                net=net,
                optimizer=optimizer,
                batch_size=batch_size,
                fault=fault,
                strength=strength,
                momentum=momentum,
                seed=seed,
            )


def _strengths(fault: str, net: str, optimizer: str) -> tuple[tuple[float, float], ...]:
    """With the momentum."""
    if fault == CHRONIC:
        return CHRONIC_SETTINGS.get((net, optimizer), ())
    strengths = (30.0, 60.0, 150.0) if fault == TWO else KINDS[fault].strengths if net in KINDS[fault].nets else ()
    return tuple((strength, MOMENTUM) for strength in strengths)


def table(outcomes: Sequence[Outcome]) -> Table:
    """The figures, by fault and batch size."""
    out = Table(
        "fault",
        "batch",
        "runs",
        "seen",
        "first is right",
        "95 %",
        "both of two",
        "signatures",
        "located update",
        "cost: median, 95 %",
        "of it the way",
        "triage: median, 95 %",
    )
    sizes = sorted({o.run.batch_size for o in outcomes}, reverse=True)
    names = [n for n in (*KINDS, CHRONIC, TWO) if any(o.run.fault == n for o in outcomes)]
    for size in sizes:
        for name in names:
            out.add_row(
                name, str(size), *_figures([o for o in outcomes if o.run.fault == name and o.run.batch_size == size])
            )
        single = [o for o in outcomes if o.run.fault in KINDS and o.run.batch_size == size]
        out.add_row("[b]all single faults", f"[b]{size}", *_figures(single), end_section=True)
    return out


def _figures(outcomes: Sequence[Outcome]) -> list[str]:
    seen = [o for o in outcomes if o.onset is not None]
    right = sum(o.first in o.run.groups for o in seen)
    low, high = wilson(right, len(seen))
    both = [
        {o.first, o.second} >= o.run.groups
        for o in seen
        if o.run.fault == TWO and min(o.true_shares.values(), default=0.0) >= REAL
    ]
    signatures = sum(o.by_signature in o.run.groups for o in seen)
    located = [
        o.located for o in seen if o.located is not None and o.run.fault in KINDS and KINDS[o.run.fault].shows_at
    ]
    ways = [o.way for o in seen if o.way is not None]
    return [
        str(len({id(o.run) for o in outcomes})),
        str(len(seen)),
        f"{right}/{len(seen)}" + (f" = {right / len(seen):.3f}" if seen else ""),
        f"{low:.2f}-{high:.2f}" if seen else "",
        f"{sum(both)}/{len(both)}" if both else "",
        f"{signatures / len(seen):.2f}" if seen else "",
        f"{sum(k == 0 for k in located)}/{len(located)}" if located else "",
        _spread([o.cost for o in seen if o.cost is not None], digits=0),
        f"{statistics.median(ways):.0f}" if ways else "",
        _spread([o.triage for o in seen if o.triage is not None], digits=1),
    ]


def _spread(values: Sequence[float], *, digits: int) -> str:
    """Median and 95th percentile."""
    if not values:
        return ""
    middle, high = np.quantile(values, (0.5, 0.95))
    return f"{middle:.{digits}f}, {high:.{digits}f}"


def own_batch(outcomes: Sequence[Outcome]) -> str:
    """Share of updates before the onset that worsened their own batch's loss, at a right and at too high a rate."""
    words = []
    for name, chronic in (("with faults of other kinds", False), (CHRONIC, True)):
        pairs = [o.worsened for o in outcomes if o.worsened and (o.run.fault == CHRONIC) == chronic]
        bad, count = sum(a for a, _ in pairs), sum(b for _, b in pairs)
        words.append(f"{name} {bad} of {count}" + (f" ({bad / count:.3f})" if count else ""))
    return f"Updates that worsened the loss of their own batch: {', '.join(words)}."


def chronic(outcomes: Sequence[Outcome]) -> str:
    """What is said of a rate that is too high all along."""
    seen = [o for o in outcomes if o.run.fault == CHRONIC and o.onset is not None]
    right = sum(o.first in o.run.groups for o in seen)
    low, high = wilson(right, len(seen))
    share = f" = {right / len(seen):.3f} (95 %: {low:.2f}-{high:.2f})" if seen else ""
    gone = [o for o in seen if not o.is_run_again]
    return (
        f"{CHRONIC}: {right} of {len(seen)} episodes{share} are attributed to it, "
        f"{sum(o.first == 'data' for o in seen)} to a bad batch, {sum(o.first is None for o in seen)} to nothing. "
        f"{len(gone)} of them could not be replayed, {sum(o.by_present for o in gone)} of these are attributed by the "
        "step-size test."
    )


def main() -> None:
    """Run what was asked for, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one strength of each fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--net", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--optimizer", nargs="+", default=["SGD", "AdamW"], choices=["SGD", "AdamW"])
    parser.add_argument("--batch-size", nargs="+", type=int, default=[32, 4])
    parser.add_argument("--fault", nargs="+", default=[*KINDS, CHRONIC, TWO], choices=[*KINDS, CHRONIC, TWO])
    parser.add_argument("--sample", type=int, help="only so many of the runs, drawn at random")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--show", action="store_true", help="every finding of the lab")
    options = parser.parse_args()
    console = Console(width=220)
    seeds = range(options.seed, options.seed + options.seeds)
    trainings = itertools.product(options.net, options.optimizer, options.batch_size, seeds)
    todo = [run for training in trainings for run in runs(*training, options.fault, quick=options.quick)]
    if options.sample:
        # which runs, no secret
        todo = random.Random(options.seed).sample(todo, min(options.sample, len(todo)))  # noqa: S311
    outcomes: list[Outcome] = []
    with ProcessPoolExecutor(options.jobs, initializer=_quiet) as pool:
        futures = [pool.submit(outcomes_of, run, options.show) for run in todo]
        for future in track(as_completed(futures), total=len(todo), console=console, description="runs"):
            outcomes += (made := future.result())
            for outcome in made:
                if outcome.onset is not None and outcome.first not in outcome.run.groups:
                    console.print(f"[dim]{_words(outcome)}", highlight=False)
    if options.out:
        options.out.write_text(json.dumps([dataclasses.asdict(o) for o in outcomes], indent=1), encoding="utf-8")
    for part in (table(outcomes), own_batch(outcomes), chronic(outcomes)):
        console.print(part, highlight=False)


def _words(wrong: Outcome) -> str:
    run = wrong.run
    shares = ", ".join(f"{group} {share:.2f}" for group, share in wrong.shares.items() if share >= TOLD)
    where = f"{run.net} {run.optimizer} batch {run.batch_size} seed {run.seed}"
    return f"wrong: {where}: {run.fault} {run.strength:g}: {wrong.first} ({shares}) {wrong.why_not or ''}"


def _quiet() -> None:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
