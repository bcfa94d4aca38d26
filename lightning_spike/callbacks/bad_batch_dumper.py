"""`BadBatchDumper`: writes the batch at an episode's onset to disk and names its outlier samples."""

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
"""Kinds of episodes that begin at a batch; only the first oscillation is written, since they recur."""

MB: Final = 1_000_000

MAX_SUSPECTS: Final = 32
"""Samples named in the report; the manifest has all."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Baseline:
    """Normal samples and weights from before an episode, which its batches are compared with."""

    usual: tuple[Mapping[str, SampleValues], ...]
    snapshot: Snapshot | None
    losses: SampleLosses | None
    """Sample losses of the onset's batch and of the normal ones."""


class BadBatchDumper(SpikeCallback):
    """Writes the batch at the onset of an episode and its neighbours, and names the outlier samples in it.

    Each new spike, divergence or non-finite loss, and the first oscillation, gets a folder per batch under
    `<dirpath>/batches`. It has the tensors as safetensors and a JSON manifest: step, loss, gradient norm, learning
    rates, dataset indices (under shuffling, workers, `Subset` and DistributedSampler), value statistics, sample losses
    where available, random states and package versions. Under gradient accumulation all micro-batches of the step are
    written, the worst as the onset. `lightning_spike.actions.batch_dump.load_dump` reads a folder.

    Every rank writes its own batches. Training is not changed: the last batches are kept by reference, and writing
    blocks for as long as the disk takes.

    Args:
        dirpath: Parent folder of `batches/`; by default `<logger.log_dir, else trainer.default_root_dir>/spike`.
        max_mb: Maximum megabytes (10^6 bytes) of tensors per run and rank; 0 writes none and still names the outlier
            samples.
        max_dumps: Maximum number of episodes that are written.
        neighbours: Batches written before and after the onset's step; 0 for the onset alone.
        target: Path of the target in a batch: keys and positions joined by dots, such as `"labels"` or `"1.y"`. By
            default the last tensor of a tuple or list, or the entry label(s), target(s) or y.
        weight: Path of the sample weights. By default the entry weight(s) or sample_weight(s).

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
        self._reset()

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._reset()
        self._ring: BatchRing = self.flight.share(BatchRing, BatchRing, trainer, module)
        self.flight.share(BatchStatistics, BatchStatistics, trainer, module).take_roles(self.roles)
        self._folder = (self.dirpath or self.flight.default_dirpath) / "batches"

    @override
    def judge(self, arrival: Arrival) -> None:
        self._arrived = arrival.row.at.ordinal

    @override
    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        self._add_episodes(changed, batch.trainer, batch.module)
        self._follow(batch.trainer, batch.module)
        self._write_due(batch.trainer)

    @override
    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        """Writes episodes of the last rows, without running the module: it may be leaving the device."""
        self._add_episodes(self.flight.store.episodes, trainer, None)
        for batches, _ in self._followed:
            self._note_finding(batches)
        self._write_due(trainer)

    @override
    def release(self) -> None:
        self._due.clear()
        self._followed.clear()

    # -- the episode's batches ---------------------------------------------------------------------------------------

    def _reset(self) -> None:
        self._seen: set[int] = set()
        self._oscillation_seen = False
        self._due: list[tuple[int, int]] = []
        """Ordinal and episode of neighbours that are written once they have arrived."""
        self._followed: list[tuple[BadBatchRun, _Baseline]] = []
        self._written: set[int] = set()
        self._bytes = 0
        self._dumps = 0
        self._arrived = -1

    def _add_episodes(self, episodes: Iterable[Episode], trainer: Trainer, module: LightningModule | None) -> None:
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
                f"The batch at which episode {episode.id} began (step {episode.onset.step}) was not held any more "
                "when it was noticed."
            )
            return
        worst = max(entries, key=self._badness)
        examined, baseline = self._examine(worst, entries[0].at.ordinal, trainer, module)
        self._note_suspects(examined, episode)
        self._followed.append((BadBatchRun(episode.id, examined), baseline))
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
        self._due += [(k, episode.id) for k in around]

    def _of_step(self, onset: Moment) -> list[RingEntry]:
        """The onset's batch; under accumulation all batches of its optimizer step."""
        held = self._ring.entry(onset.ordinal)
        if held is None or self.flight.store.facts.accumulate_grad_batches == 1:
            return [held] if held is not None else []
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
    ) -> tuple[ExaminedBatch, _Baseline]:
        """The batch with its sample losses and suspects, and the baseline: the recorded batches before the step."""
        seen = self._look_at(entry)
        earlier = [self._look_at(e) for e in self._ring.entries() if e.at.ordinal < first_of_step]
        snapshots = self.flight.taking_part(Snapshots)
        snapshot = None if snapshots is None else snapshots.latest_healthy(first_of_step + 1)
        losses: SampleLosses | None = None
        if trainer.world_size > 1:
            self.flight.store.note(
                "Losses of single samples are not computed under several ranks: a step run on one rank could wait for "
                "the others."
            )
        if module is not None and seen.size is not None:
            controls = [e.entry for e in earlier]
            losses = losses_of_samples(trainer, module, entry, size=seen.size, controls=controls, snapshot=snapshot)
        baseline = _Baseline(usual=tuple(e.values for e in earlier), snapshot=snapshot, losses=losses)
        return _with_suspects(seen, losses, baseline), baseline

    def _follow(self, trainer: Trainer, module: LightningModule) -> None:
        """Examines the batches after an onset for as long as they are bad."""
        for batches, baseline in self._followed:
            for entry in [e for e in self._ring.entries() if e.at.ordinal > batches.last_ordinal]:
                if not batches.is_over:
                    batches.add(self._examine_next(entry, baseline, trainer, module))
            if batches.is_over:
                self._note_finding(batches)
        self._followed = [(batches, baseline) for batches, baseline in self._followed if not batches.is_over]

    def _examine_next(
        self, entry: RingEntry, baseline: _Baseline, trainer: Trainer, module: LightningModule
    ) -> ExaminedBatch:
        """The batch examined with the snapshot's weights, as the onset's batch; without a snapshot no losses."""
        seen, first = self._look_at(entry), baseline.losses
        losses: SampleLosses | None = None
        if first is not None and baseline.snapshot is not None and seen.size is not None:
            losses = losses_of_samples(
                trainer, module, entry, size=seen.size, snapshot=baseline.snapshot, way=first.how
            )
        if first is None or losses is None:
            return _with_suspects(seen, None, baseline)
        comparable = dataclasses.replace(
            losses, control=first.control, control_gradient_bounds=first.control_gradient_bounds
        )
        return _with_suspects(seen, comparable, baseline)

    def _note_finding(self, batches: BadBatchRun) -> None:
        if (finding := batches.finding()) is not None:
            self.flight.store.note(finding)

    def _note_suspects(self, batch: ExaminedBatch, episode: Episode) -> None:
        if not batch.suspects:
            return
        listed = batch.suspects[:MAX_SUSPECTS]
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
        """Writes the neighbours whose rows have arrived; those no longer recorded are left out."""
        for ordinal, episode in self._due:
            entry = self._ring.entry(ordinal)
            if entry is not None and ordinal <= self._arrived:
                self._write(self._look_at(entry), episode, "neighbour", trainer)
        self._due = [due for due in self._due if due[0] > self._arrived]

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
        except OSError as error:  # a full or read-only disk must not end the examination
            self.flight.store.note(f"BadBatchDumper could not write to {self._folder}: {error}")
            return
        self._written.add(at.ordinal)
        self.flight.store.note(Action(action="dump", at=at, detail=_detail(batch, episode, role, f"batches/{name}")))


def _with_suspects(seen: ExaminedBatch, losses: SampleLosses | None, baseline: _Baseline) -> ExaminedBatch:
    suspects = find_suspects(
        seen.values,
        usual=baseline.usual,
        losses=None if losses is None else losses.losses,
        usual_losses=None if losses is None else losses.control,
        gradient_bounds=None if losses is None else losses.gradient_bounds,
        usual_gradient_bounds=None if losses is None else losses.control_gradient_bounds,
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
            for s in batch.suspects[:MAX_SUSPECTS]
        ],
    }


def _text(batch: ExaminedBatch) -> str:
    """The finding's sentence."""
    count, worst = len(batch.suspects), batch.suspects[0]
    index = batch.index_of(worst.position)
    name = f"position {worst.position}" if index is None else f"dataset index {index} (position {worst.position})"
    lead = f"{count} of {batch.size} samples stand out" if count > 1 else "One sample stands out"
    return f"{lead}, the most {name}: {worst.reasons[0]}." if count > 1 else f"{lead}, {name}: {worst.reasons[0]}."


def _median(values: Sequence[float]) -> float | None:
    finite = sorted(v for v in values if math.isfinite(v))
    return finite[len(finite) // 2] if finite else None
