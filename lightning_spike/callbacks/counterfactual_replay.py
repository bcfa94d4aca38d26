"""`CounterfactualReplay`.

After an episode, run the moment again and see whether the batch or the weights made the loss jump.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Final

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_spike.arguments import number, whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.detectors.stagnation import stagnates
from lightning_spike.diagnosis import sentences
from lightning_spike.diagnosis.judgement import Group, jump_shares, steps_too_long
from lightning_spike.errors import CannotReplay, OnsetGone
from lightning_spike.experiments import Experiments, StepSize, StepSizeTest
from lightning_spike.lab.examine import examine, triage
from lightning_spike.lab.experiments.fallback_attribution import earlier_step_size, unexplained, with_step_size
from lightning_spike.lab.experiments.step_size_test import STEP_SIZE_TEST_STEPS, TESTED_UPDATES, step_size_test
from lightning_spike.lab.live_scene import EXAMINED, Witnesses, live_scene
from lightning_spike.ranks.control_group import ControlGroup, why_no_control_group
from lightning_spike.ranks.merge_ranks import SharedExamination, merged
from lightning_spike.ranks.rank_agreement import EVERY, PATIENCE, ExaminationRequests
from lightning_spike.ranks.rank_coordination import ALONE, OutOfReach, Ranks
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.records import Action, Episode, EpisodeKind, RunStatus
from lightning_spike.sandbox.budget import FULL_STEPS, LEAST_STEPS, TRIAGE_STEPS, Budget, Extent

OUTGROWN: Final = 2.0
"""How many times as severe an episode must have become since its examination for it to be examined again, at its
peak."""
FREE_SECONDS: Final = 5.0
"""Seconds in all that re-runs may take whatever the budget: nobody minds a few, and a short run has no 2 % to spend."""

FIRST_TEST: Final = 128
"""Batches after which a run that has had no episode is looked at for the first time, if its loss has stopped falling;
then at every doubling, so that all looks together cost less and less of the run."""


class CounterfactualReplay(SpikeCallback):
    """Confirms causes by experiment.

    After an episode, the moment is run again with the weights and the batches exchanged.

    From the last snapshot that has proven healthy the run is trained again up to the onset, with the recorded batches,
    random states and learning rates; then old and new weights are evaluated on the batch of the onset and on ordinary
    ones. That splits the jump into what the batch does and what the weights do; a spike that does not come back was
    made from outside. Where the loss is not finite, the module and operation that made the first such value are named.

    Where the onset is no longer held (a loss that crept away was noticed late), and where a loss without any episode
    has stopped falling (looked at after 128 batches, 256, 512 and so on),
    the newest updates are made once more from the present weights on: whether steps of this size keep what their
    gradients promise tells a learning rate that is too high all along.

    Afterwards everything is as before, to the bit, and so is the rest of the training; where a moment cannot be run
    again, the report says why. What leaks all the same is what `training_step` itself writes to files, globals or
    writers of its own (`sandbox.isolation`).

    With several ranks under DDP all examine the same episode at the same batch: the most severe that one of them has
    seen. Every loss is then the mean over the ranks, that of the global batch, so all decide alike; a fault in one
    rank's batch counts as far as it shows in that mean. Each rank notes the findings about its own episode, if its
    onset is within 8 batches; rank 0's report tells in a remark what others saw and its own loss did not show. For
    that, after every fourth batch, every rank sends two numbers over a group of its own (gloo, on the CPU) and reads
    the others' four batches later: no device is read, and nobody waits, unless a rank is that far behind or gone, and
    then
    for five minutes at most and once: there are no more examinations after that.

    An exception in the re-run on one rank ends it on all, who say why, and the training goes on. Not so for one inside
    a backward pass: there the others wait for that rank's gradients, as they would in the training, until the process
    group's timeout. Steps that are only looked at are run by each rank alone: SyncBatchNorm then goes by the rank's own
    batch, and a `training_step` that gathers through Lightning is not examined; where it talks to other ranks through
    `torch.distributed` itself, leave this callback out. Several ranks under other strategies (FSDP, DeepSpeed, model
    parallel) are not examined, and the report says so.

    Args:
        budget: Share of the run's time so far that re-runs may take, above 0 and at most 1; 5 seconds in all are free
            on top of it, so that short runs get their answers too, and the first episode is always examined. Episodes
            are examined as they come; one that is worse than all before it may overdraw the budget, others that no
            longer fit get a triage (some three steps' worth), or are named in the report.
        max_episodes: Episodes examined at most in one fit.
        controls: Ordinary batches that the batch of the onset is compared with; more make small effects of the weights
            visible.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    _refusal: str | None
    """Why the ranks cannot examine anything together."""
    _ranks: Ranks
    _wishes: ExaminationRequests | None

    def __init__(self, budget: float = 0.02, max_episodes: int = 20, controls: int = 8) -> None:
        self.budget = number(
            "CounterfactualReplay(budget)", budget, above=0.0, at_most=1.0, do="Use 0.02 for 2 % of the run's time."
        )
        self.max_episodes = whole_number(
            "CounterfactualReplay(max_episodes)",
            max_episodes,
            at_least=1,
            do="Leave the callback out for no re-runs at all.",
        )
        self.controls = whole_number(
            "CounterfactualReplay(controls)", controls, at_least=1, do="Use 8, or 2 for speed."
        )
        self._forget()

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._forget()
        self._witnesses = Witnesses.of(self.flight, trainer, module)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._began = time.monotonic()
        self._first = self.flight.last_moment(trainer).ordinal
        self._refusal = why_no_control_group(trainer)
        if (group := ControlGroup.of(trainer)) is not None:
            self._ranks, self._wishes = Ranks(group), ExaminationRequests(group)

    @override
    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        self._waiting |= {e.id: e for e in changed if e.kind in EXAMINED and e.id not in self._seen}
        outgrown = {e.id: e for e in changed if self._has_outgrown(e)}
        if self._wishes is not None:
            self._act_together(batch, self._wishes, changed, outgrown)
            return
        if self._test_is_due(batch):
            self.flight.store.note(*self._test_step_size(batch))
        due = [e for e in self._waiting.values() if not _may_wait(e, batch)]
        for episode in sorted([*due, *outgrown.values()], key=lambda e: -e.severity):
            found, action = self._look_into(batch, episode, again=episode.id in self._seen)
            self._note(episode, [note for note in (found, action) if note is not None])

    @override
    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        for episode in self._waiting.values():
            self.flight.store.note(Experiments(episode=episode.id, not_run="the run ended with it"))
        self.flight.store.note(*(_remark(shared) for shared in self._strange))

    def _forget(self) -> None:
        self._seen: dict[int, list[float]] = {}
        """By the id of an examined episode, its severity at each examination."""
        self._waiting: dict[int, Episode] = {}
        self._budget = Budget(share=self.budget, free=FREE_SECONDS)
        self._began = time.monotonic()
        self._first = 0
        self._refusal, self._ranks, self._wishes = None, ALONE, None
        self._tests_steps = True
        self._batches = 0
        self._wished: Episode | None = None
        self._outgrown: dict[int, Episode] = {}
        self._shared: list[SharedExamination] = []
        self._strange: list[SharedExamination] = []
        """Those of them that no episode of this rank's is about, so far."""

    def _note(self, episode: Episode, notes: Sequence[Experiments | Action]) -> None:
        self._waiting.pop(episode.id, None)
        self._outgrown.pop(episode.id, None)
        self._seen.setdefault(episode.id, []).append(episode.severity)
        self.flight.store.note(*notes)

    # -- several ranks -----------------------------------------------------------------------------------------------

    def _act_together(
        self,
        batch: TrainingBatch,
        wishes: ExaminationRequests,
        changed: Sequence[Episode],
        outgrown: Mapping[int, Episode],
    ) -> None:
        """The same exchanges on every rank, whatever it has seen itself."""
        self._outgrown |= outgrown
        self._take_over(changed)
        self._batches += 1
        is_last = _is_last(batch.trainer)
        if self._batches % EVERY and not is_last:
            return
        try:
            self._examine_strongest(batch, wishes)
            self._wish(wishes)
            while is_last and self._examine_strongest(batch, wishes):
                self._wish(wishes)
        except OutOfReach as gone:
            self._refusal, self._wishes, self._ranks = str(gone), None, ALONE
            self.flight.store.note(f"No more moments are run again: {gone}.")

    def _wish(self, wishes: ExaminationRequests) -> None:
        due = [*self._waiting.values(), *self._outgrown.values()]
        self._wished = max(due, key=lambda e: e.severity, default=None)
        wishes.send(self._wished)

    def _examine_strongest(self, batch: TrainingBatch, wishes: ExaminationRequests) -> bool:
        """Whether one of the ranks wished for something."""
        wish = wishes.strongest()
        if wish is None:
            return False
        self._ranks.meet("an examination", wish.onset, seconds=PATIENCE)
        episode, again = self._ranks.tell(self._newest(self._wished), by=wish.rank)
        if episode is None:
            return True
        found, action = self._look_into(batch, episode, again=again, by=wish.rank)
        examined = SharedExamination(rank=wish.rank, episode=episode, found=found, action=action)
        own = [episode] if wish.rank == self._ranks.rank else [e for e in self._own() if examined.is_about(e)]
        for mine in own:
            self._note(mine, examined.notes_about(mine))
        self._shared.append(examined)
        self._strange += [examined] if found is not None and not own else []
        return True

    def _newest(self, wished: Episode | None) -> tuple[Episode | None, bool]:
        """The episode as it is known by now, and whether it has been examined before."""
        if wished is None:
            return None, False
        return next((e for e in self._own() if e.id == wished.id), wished), wished.id in self._seen

    def _own(self) -> list[Episode]:
        return [e for e in self.flight.store.episodes if e.kind in EXAMINED]

    def _take_over(self, changed: Sequence[Episode]) -> None:
        """An episode that this rank sees only now has been examined already, when another rank saw it."""
        for episode in changed:
            known = [e for e in self._shared if episode.id in self._waiting and e.is_about(episode)]
            for examined in known:
                self._note(episode, examined.notes_about(episode))
                self._strange = [other for other in self._strange if other is not examined]

    def _has_outgrown(self, episode: Episode) -> bool:
        """What was examined was only the beginning: the peak has become another matter.

        Looked into once; if the weights were at fault already, it is their doing.
        """
        severities = self._seen.get(episode.id, [])
        return (
            len(severities) == 1
            and episode.severity > OUTGROWN * severities[0]
            and not self._weights_are_to_blame(episode)
        )

    def _weights_are_to_blame(self, episode: Episode) -> bool:
        shares = jump_shares(self.flight.store.experiments.get(episode.id))
        return bool(shares) and max(shares, key=lambda group: shares[group]) is not Group.DATA

    def _look_into(
        self, batch: TrainingBatch, episode: Episode, *, again: bool, by: int = 0
    ) -> tuple[Experiments | None, Action | None]:
        """What is to be noted of it; on several ranks the same on all."""
        extent, why = self._ranks.tell(self._extent(batch, episode), by=0)
        if extent is None:
            return None if again else Experiments(episode=episode.id, not_run=why), None
        started = time.monotonic()
        found = self._experiments(batch, episode, extent, again=again, by=by)
        seconds = time.monotonic() - started
        is_done = found.not_run is None
        self._budget.took(seconds, extent=extent if is_done else "triage", severity=episode.severity)
        if not is_done:
            return None if again else found, None
        detail = {"episode": episode.id, "extent": extent, "seconds": round(seconds, 3)}
        return found, Action(action="replay", at=batch.at, detail=detail)

    def _experiments(
        self, batch: TrainingBatch, episode: Episode, extent: Extent, *, again: bool, by: int
    ) -> Experiments:
        try:
            return self._examined(batch, episode, extent, again=again, by=by)
        except OutOfReach:
            raise
        except CannotReplay as reason:
            return Experiments(episode=episode.id, not_run=str(reason))
        except Exception as error:  # noqa: BLE001 - the user's code, run once more; the training is untouched and goes on
            return Experiments(episode=episode.id, not_run=f"the replay failed: {type(error).__name__}: {error}")

    def _examined(self, batch: TrainingBatch, episode: Episode, extent: Extent, *, again: bool, by: int) -> Experiments:
        examination = examine if extent == "full" else triage
        try:
            with self._ranks.stage():
                scene = live_scene(batch, episode, self._witnesses, controls=self.controls, ranks=self._ranks)
                at_peak = again and any(entry.at.ordinal == episode.peak.ordinal for entry in scene.entries)
                found = examination(dataclasses.replace(scene, looks_at=episode.peak.ordinal) if at_peak else scene)
        except OnsetGone as reason:
            steps = self._step_size(batch, episode) if extent == "full" else None
            if steps is None:
                return Experiments(episode=episode.id, not_run=str(reason))
            return with_step_size(None, episode, str(reason), steps)
        found = merged(self._ranks.gather(found), by=by)
        failure = unexplained(found) if extent == "full" else None
        steps = None if failure is None else self._step_size(batch, episode)
        return found if failure is None or steps is None else with_step_size(found, episode, failure, steps)

    # -- the present -------------------------------------------------------------------------------------------------

    def _step_size(self, batch: TrainingBatch, episode: Episode) -> StepSize | None:
        """Steps that are too long, for an episode whose onset is out of reach; `None` where they are not."""
        earlier = self._ranks.tell(earlier_step_size(self.flight.store, episode), by=0)
        if earlier is not None:
            return earlier
        with self._ranks.stage():
            steps = self._step_size_test(batch)
        return steps if steps is not None and steps_too_long(steps) else None

    def _test_is_due(self, batch: TrainingBatch) -> bool:
        """A run without an episode whose loss has stopped falling is looked at, ever more rarely."""
        count = batch.at.ordinal + 1 - self._first
        if count < FIRST_TEST or count & (count - 1) or not self._tests_steps:
            return False
        if any(e.kind in EXAMINED for e in self.flight.store.episodes):
            return False
        elapsed = time.monotonic() - self._began - self._budget.spent
        return stagnates(self.flight.store.history.series("loss")) and self._budget.bears(
            elapsed / count * STEP_SIZE_TEST_STEPS, elapsed=elapsed
        )

    def _test_step_size(self, batch: TrainingBatch) -> list[StepSizeTest | str]:
        started = time.monotonic()
        try:
            steps = self._step_size_test(batch)
        except Exception as error:  # noqa: BLE001 - the user's code, as above
            self._tests_steps = False
            return [f"The steps could not be looked at without an episode: {type(error).__name__}: {error}."]
        self._budget.spent += time.monotonic() - started
        return [] if steps is None else [StepSizeTest(at=batch.at, result=steps)]

    def _step_size_test(self, batch: TrainingBatch) -> StepSize | None:
        held = self._witnesses.ring.entries()[-TESTED_UPDATES - 1 :]
        opening = next(
            (k for k, entry in enumerate(held) if entry.at.batch_idx % batch.trainer.accumulate_grad_batches == 0), 0
        )
        settings = self._witnesses.settings.by_ordinal
        return step_size_test(batch.trainer, batch.module, held[opening:], settings, ranks=self._ranks)

    # -- the budget --------------------------------------------------------------------------------------------------

    def _extent(self, batch: TrainingBatch, episode: Episode) -> tuple[Extent | None, str]:
        """How far to examine, and if not at all, why."""
        if self._refusal is not None:
            return None, self._refusal
        if self._budget.examined >= self.max_episodes:
            return None, f"max_episodes={self.max_episodes} were examined already"
        elapsed = time.monotonic() - self._began - self._budget.spent
        pace = elapsed / max(batch.at.ordinal - self._first, 1)
        snapshot = self._witnesses.snapshots.latest_healthy(before=episode.onset.ordinal)
        way = 0 if snapshot is None else episode.onset.ordinal - snapshot.at.ordinal
        full, triage_only = pace * max(FULL_STEPS, way + LEAST_STEPS), pace * TRIAGE_STEPS
        extent = self._budget.extent(severity=episode.severity, elapsed=elapsed, full=full, triage=triage_only)
        spent = f"re-runs took {self._budget.spent:.2g} s already"
        return extent, f"{spent}, and another would not fit into budget={self.budget:.3g} of the run's time"


def _remark(shared: SharedExamination) -> str:
    """For a rank whose own loss did not show the episode."""
    found = Experiments(episode=shared.episode.id) if shared.found is None else shared.found
    known = dataclasses.replace(found, rank=shared.rank)
    return sentences.remark_of_other_rank(known, shared.episode.kind, shared.episode.onset.step)


def _may_wait(episode: Episode, batch: TrainingBatch) -> bool:
    """Whether to look at the next loss first.

    Where the batch of the onset has only just been trained on, the jump itself may be still to come.
    """
    if episode.kind is EpisodeKind.NONFINITE or batch.at.ordinal > episode.onset.ordinal:
        return False
    return not _is_last(batch.trainer)


def _is_last(trainer: Trainer) -> bool:
    """Whether the training ends with this batch, as far as can be known; the same on all ranks."""
    in_last_epoch = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    is_last = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    return is_last or (in_last_epoch and trainer.is_last_batch)
