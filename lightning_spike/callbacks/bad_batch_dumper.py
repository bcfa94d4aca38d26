"""`BadBatchDumper`: the batch at which the trouble began, written to disk with everything needed to look at it again."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.actions.batch_dump import tensor_bytes, write_dump
from lightning_spike.actions.dump_facts import dump_facts
from lightning_spike.arguments import batch_path, directory, number, whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.flight.loop import batch_size
from lightning_spike.record.batch_ring import BatchRing, RingEntry
from lightning_spike.record.batch_statistics import BatchStatistics
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.record.snapshot import Snapshot, Snapshots
from lightning_spike.records import Action, Episode, EpisodeKind, Finding, Moment, RunStatus
from lightning_spike.samples.bad_batch_run import BadBatchRun
from lightning_spike.samples.examined_batch import ExaminedBatch
from lightning_spike.samples.sample_losses import SampleLosses, losses_of_samples
from lightning_spike.samples.suspect_samples import SampleValues, find_suspects, sample_values
from lightning_spike.signals.batch import BatchRoles, batch_leaves

DUMPED: Final = frozenset({EpisodeKind.SPIKE, EpisodeKind.DIVERGENCE, EpisodeKind.NONFINITE, EpisodeKind.OSCILLATION})
"""Kinds of episodes that begin at a batch; of oscillations only the first, for they return by their nature."""

MB: Final = 1_000_000

LISTED_SUSPECTS: Final = 32
"""Samples named in the report; the manifest has all."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Due:
    """A neighbour that is to be written once it is there."""

    ordinal: int
    episode: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Yardstick:
    """What the batches of an episode are held against.

    The samples of healthy batches from before it, and weights from there.
    """

    usual: tuple[Mapping[str, SampleValues], ...]
    snapshot: Snapshot | None
    losses: SampleLosses | None
    """Of the onset's batch, with those of the healthy ones."""


class BadBatchDumper(SpikeCallback):
    """Writes the batch at which an episode began, and its neighbours, and names the samples that stand out in it.

    For each new spike, divergence or non-finite loss (and the first oscillation) a folder per batch under
    `<dirpath>/batches`: the tensors as safetensors, and a JSON manifest with the step, loss, gradient norm, learning
    rates, dataset indices (under shuffling, workers, `Subset` and DistributedSampler), value statistics, losses of
    single samples where they can be had, random states and package versions. Under gradient accumulation all
    micro-batches of the step are written, the worst as the onset. `lightning_spike.actions.batch_dump.load_dump` reads
    a folder back.

    Every rank writes its own batches. Training is not changed; only the batches of the last steps are kept by
    reference, and writing blocks for as long as the disk takes.

    Args:
        dirpath: Folder in which `batches/` is made; by default `<logger.log_dir, else trainer.default_root_dir>/spike`.
        max_mb: Megabytes (10^6 bytes) of tensors written per run and rank at most; 0 writes none and still names the
            samples that stand out.
        max_dumps: Episodes that are written at most.
        neighbours: Batches written before and after the onset's step; 0 for the onset alone.
        target: Path of the target in a batch where the convention does not fit: keys and positions joined by dots, as
            `"labels"` or `"1.y"`. By convention the last tensor of a tuple or list, or what is called label(s),
            target(s) or y.
        weight: Path of the sample weights; by convention what is called weight(s) or sample_weight(s).

    Raises:
        ConfigurationError: An argument is out of range.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        max_mb: float = 512.0,
        max_dumps: int = 8,
        neighbours: int = 1,
        target: str | None = None,
        weight: str | None = None,
    ) -> None:
        self.dirpath = directory("BadBatchDumper(dirpath)", dirpath)
        self.max_mb = number("BadBatchDumper(max_mb)", max_mb, at_least=0, do="Give megabytes, 0 for no files at all.")
        self.max_dumps = whole_number("BadBatchDumper(max_dumps)", max_dumps, at_least=0, do="Use 0 for no files.")
        self.neighbours = whole_number(
            "BadBatchDumper(neighbours)", neighbours, at_least=0, do="Use 0 for the onset alone."
        )
        self.roles = BatchRoles(
            target=batch_path("BadBatchDumper(target)", target), weight=batch_path("BadBatchDumper(weight)", weight)
        )
        self._begin_anew()

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._begin_anew()
        self._ring: BatchRing = self.flight.share(BatchRing, BatchRing, trainer, module)
        self.flight.share(BatchStatistics, BatchStatistics, trainer, module).take_roles(self.roles)
        self._folder = (self.dirpath or self.flight.default_dirpath) / "batches"

    @override
    def judge(self, arrival: Arrival) -> None:
        self._arrived = arrival.row.at.ordinal

    @override
    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        self._take_up(changed, batch.trainer, batch.module)
        self._follow(batch.trainer, batch.module)
        self._write_due(batch.trainer)

    @override
    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        """Write what became known with the last rows.

        Nothing is run again here: the module may be on its way off the device.
        """
        self._take_up(self.flight.store.episodes, trainer, None)
        for stretch, _ in self._followed:
            self._close(stretch)
        self._write_due(trainer)

    @override
    def release(self) -> None:
        self._due.clear()
        self._followed.clear()

    # -- the episode's batches ---------------------------------------------------------------------------------------

    def _begin_anew(self) -> None:
        self._seen: set[int] = set()
        self._oscillation_seen = False
        self._due: list[_Due] = []
        self._followed: list[tuple[BadBatchRun, _Yardstick]] = []
        self._written: set[int] = set()
        self._bytes = 0
        self._dumps = 0
        self._arrived = -1

    def _take_up(self, episodes: Iterable[Episode], trainer: Trainer, module: LightningModule | None) -> None:
        for episode in episodes:
            if episode.kind in DUMPED and episode.id not in self._seen:
                self._seen.add(episode.id)
                if episode.kind is EpisodeKind.OSCILLATION and self._oscillation_seen:
                    continue
                self._oscillation_seen |= episode.kind is EpisodeKind.OSCILLATION
                self._dump_onset(episode, trainer, module)

    def _dump_onset(self, episode: Episode, trainer: Trainer, module: LightningModule | None) -> None:
        entries = self._of_step(episode.onset)
        if not entries:
            self.flight.store.note(
                f"The batch at which episode {episode.id} began (step {episode.onset.step}) was not held any more when it was noticed."
            )
            return
        worst = max(entries, key=self._badness)
        examined, yardstick = self._examine(worst, entries[0].at.ordinal, trainer, module)
        self._tell(examined, episode)
        self._followed.append((BadBatchRun(episode.id, examined), yardstick))
        if self._dumps >= self.max_dumps:
            self.flight.store.note(f"BadBatchDumper wrote {self.max_dumps} episodes, its limit (max_dumps).")
            return
        self._dumps += 1
        self._write(examined, episode.id, "onset", trainer)
        for entry in entries:
            if entry is not worst:
                self._write(self._look_at(entry), episode.id, "micro_batch", trainer)
        first, last = entries[0].at.ordinal, entries[-1].at.ordinal
        around = [*range(first - self.neighbours, first), *range(last + 1, last + 1 + self.neighbours)]
        self._due += [_Due(ordinal=k, episode=episode.id) for k in around]

    def _of_step(self, onset: Moment) -> list[RingEntry]:
        """The onset's batch; under accumulation with all that share its optimizer step."""
        held = self._ring.entry(onset.ordinal)
        if held is None:
            return []
        if self.flight.store.facts.accumulate_grad_batches == 1:
            return [held]
        return [e for e in self._ring.entries() if (e.at.step, e.at.epoch) == (onset.step, onset.epoch)]

    def _badness(self, entry: RingEntry) -> tuple[bool, bool, float]:
        history, ordinal = self.flight.store.history, entry.at.ordinal
        nonfinite = [s for s in history.signals if s.startswith("batch/") and s.endswith("/nonfinite")]
        loss = history.at("loss", ordinal)
        known = -math.inf if loss is None or math.isnan(loss) else loss
        return (
            any((history.at(s, ordinal) or 0.0) > 0.0 for s in nonfinite),
            loss is not None and not math.isfinite(loss),
            known,
        )

    # -- looking at a batch ------------------------------------------------------------------------------------------

    def _look_at(self, entry: RingEntry) -> ExaminedBatch:
        leaves, size = batch_leaves(entry.batch, self.roles), batch_size(entry.batch)
        values = {} if size is None else sample_values(leaves, size)
        return ExaminedBatch(entry=entry, leaves=leaves, size=size, values=values)

    def _examine(
        self, entry: RingEntry, first_of_step: int, trainer: Trainer, module: LightningModule | None
    ) -> tuple[ExaminedBatch, _Yardstick]:
        """With losses and suspects, against the healthy batches of the ring: those before the onset's step."""
        seen = self._look_at(entry)
        earlier = [self._look_at(e) for e in self._ring.entries() if e.at.ordinal < first_of_step]
        snapshots = self.flight.taking_part(Snapshots)
        snapshot = None if snapshots is None else snapshots.latest_healthy(first_of_step + 1)
        losses: SampleLosses | None = None
        if trainer.world_size > 1:
            self.flight.store.note(
                "Losses of single samples are not computed under several ranks: a step run on one rank could wait for the others."
            )
        if module is not None and seen.size is not None:
            controls = [e.entry for e in earlier]
            losses = losses_of_samples(trainer, module, entry, size=seen.size, controls=controls, snapshot=snapshot)
        yardstick = _Yardstick(usual=tuple(e.values for e in earlier), snapshot=snapshot, losses=losses)
        return _with_suspects(seen, losses, yardstick), yardstick

    def _follow(self, trainer: Trainer, module: LightningModule) -> None:
        """Look at the batches after an onset, as long as they are bad too."""
        for stretch, yardstick in self._followed:
            for entry in [e for e in self._ring.entries() if e.at.ordinal > stretch.looked_at]:
                if not stretch.is_over:
                    stretch.add(self._examine_next(entry, yardstick, trainer, module))
            if stretch.is_over:
                self._close(stretch)
        self._followed = [(stretch, of) for stretch, of in self._followed if not stretch.is_over]

    def _examine_next(
        self, entry: RingEntry, yardstick: _Yardstick, trainer: Trainer, module: LightningModule
    ) -> ExaminedBatch:
        """Under the weights that the onset's batch was looked at.

        Those of the training have gone on since, and say nothing where they were that yardstick.
        """
        seen, first = self._look_at(entry), yardstick.losses
        losses: SampleLosses | None = None
        if first is not None and yardstick.snapshot is not None and seen.size is not None:
            losses = losses_of_samples(
                trainer, module, entry, size=seen.size, snapshot=yardstick.snapshot, way=first.how
            )
        if first is None or losses is None:
            return _with_suspects(seen, None, yardstick)
        comparable = dataclasses.replace(losses, control=first.control, control_pulls=first.control_pulls)
        return _with_suspects(seen, comparable, yardstick)

    def _close(self, stretch: BadBatchRun) -> None:
        finding = stretch.finding()
        if finding is not None:
            self.flight.store.note(finding)

    def _tell(self, batch: ExaminedBatch, episode: Episode) -> None:
        if not batch.suspects:
            return
        listed = batch.suspects[:LISTED_SUSPECTS]
        detail = {
            "episode": episode.id,
            "ordinal": batch.entry.at.ordinal,
            "positions": [s.position for s in listed],
            "dataset_indices": [batch.index_of(s.position) for s in listed],
            "losses": [s.loss for s in listed],
            "median_loss": None if batch.losses is None else _median(batch.losses),
            "count": len(batch.suspects),
            "batch_size": batch.size,
            "text": _text(batch),
        }
        self.flight.store.note(Finding(detector="batch", kind="suspect_samples", at=batch.entry.at, detail=detail))

    # -- writing -----------------------------------------------------------------------------------------------------

    def _write_due(self, trainer: Trainer) -> None:
        """Write the neighbours that have come, numbers included; those that are gone or never came are let go."""
        waiting = []
        for due in self._due:
            entry = self._ring.entry(due.ordinal)
            if entry is not None and due.ordinal <= self._arrived:
                self._write(self._look_at(entry), due.episode, "neighbour", trainer)
            elif due.ordinal > self._arrived:
                waiting.append(due)
        self._due = waiting

    def _write(self, batch: ExaminedBatch, episode: int, role: str, trainer: Trainer) -> None:
        at, size = batch.entry.at, tensor_bytes(batch.entry.batch)
        if at.ordinal in self._written:
            return
        if self._bytes + size > self.max_mb * MB:
            self.flight.store.note(f"BadBatchDumper reached its limit of {self.max_mb:g} MB (max_mb).")
            return
        name = f"step{at.step:06d}_epoch{at.epoch}_batch{at.batch_idx}_rank{trainer.global_rank}"
        last = max((e.at for e in self._ring.entries() if e.at.step == at.step), key=lambda m: m.ordinal)
        facts = dump_facts(
            batch, self.flight.store, episode=episode, role=role, rank=trainer.global_rank, last_of_step=last
        )
        try:
            self._bytes += write_dump(self._folder / name, batch=batch.entry.batch, random=batch.entry.rng, facts=facts)
        except OSError as error:  # the disk is full, or not ours: looking at batches goes on without it
            self.flight.store.note(f"BadBatchDumper could not write to {self._folder}: {error}")
            return
        self._written.add(at.ordinal)
        self.flight.store.note(Action(action="dump", at=at, detail=_detail(batch, episode, role, f"batches/{name}")))


def _with_suspects(seen: ExaminedBatch, losses: SampleLosses | None, yardstick: _Yardstick) -> ExaminedBatch:
    suspects = find_suspects(
        seen.values,
        usual=yardstick.usual,
        losses=None if losses is None else losses.losses,
        usual_losses=None if losses is None else losses.control,
        pulls=None if losses is None else losses.pulls,
        usual_pulls=None if losses is None else losses.control_pulls,
    )
    return dataclasses.replace(
        seen,
        suspects=tuple(suspects),
        losses=None if losses is None else losses.losses,
        weights=None if losses is None else losses.weights,
    )


def _detail(batch: ExaminedBatch, episode: int, role: str, path: str) -> dict[str, Any]:
    return {
        "episode": episode,
        "path": path,
        "role": role,
        "dataset_indices": list(batch.indices),
        "suspects": [
            {
                "position": s.position,
                "dataset_index": batch.index_of(s.position),
                "loss": s.loss,
                "max_abs": s.max_abs,
                "reasons": list(s.reasons),
            }
            for s in batch.suspects[:LISTED_SUSPECTS]
        ],
    }


def _text(batch: ExaminedBatch) -> str:
    """One sentence for a person."""
    count, worst = len(batch.suspects), batch.suspects[0]
    index = batch.index_of(worst.position)
    name = f"position {worst.position}" if index is None else f"dataset index {index} (position {worst.position})"
    lead = f"{count} of {batch.size} samples stand out" if count > 1 else "One sample stands out"
    return f"{lead}, the most {name}: {worst.reasons[0]}." if count > 1 else f"{lead}, {name}: {worst.reasons[0]}."


def _median(values: Sequence[float]) -> float | None:
    finite = sorted(v for v in values if math.isfinite(v))
    return finite[len(finite) // 2] if finite else None
