"""`CounterfactualReplay`: replays an episode's onset with one thing changed, to confirm its cause."""

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
from lightning_spike.ranks.merge_ranks import SharedExamination, merge_experiments
from lightning_spike.ranks.rank_agreement import EXCHANGE_EVERY, PATIENCE, ExaminationRequests
from lightning_spike.ranks.rank_coordination import SINGLE_RANK, Ranks, RankUnreachable
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.records import Action, Episode, EpisodeKind, RunStatus
from lightning_spike.sandbox.budget import FULL_STEPS, MIN_STEPS, TRIAGE_STEPS, Budget, Extent

MIN_SEVERITY_GROWTH: Final = 2.0
"""Growth of an episode's severity since its examination from which its peak is examined too; engineering choice."""
FREE_SECONDS: Final = 5.0
"""Total seconds of replays that every run may take: 2 % of a short run is too little; engineering choice."""
MIN_BATCHES_BEFORE_TEST: Final = 128
"""Batches before the first step-size test of a run without episodes; later tests follow at every doubling, so their
share of the run falls; engineering choice."""


class CounterfactualReplay(SpikeCallback):
    """Confirms causes by replaying an episode with weights and batches exchanged.

    The run is trained again from the last healthy snapshot to the onset, with the recorded batches, random states and
    learning rates. Old and new weights are then evaluated on the onset's batch and on control batches. That splits the
    loss jump between batch and weights; a spike that does not recur has an external cause. For a non-finite loss, the
    module and operation of the first non-finite value are named.

    The step-size test repeats the newest updates from the current weights. It shows a learning rate that is too high
    throughout: the updates do not lower the loss as their gradients predict. It runs if the onset is no longer recorded
    (a slow divergence is noticed late). It also runs in a run without episodes whose loss has stopped falling, after
    128, 256, 512, … batches.

    The replay restores everything, to the bit, and the training continues unchanged. Only what `training_step` writes
    to files, globals or its own writers remains (`sandbox.isolation`). If a replay is impossible, the report says why.

    Under DDP all ranks examine the same episode at the same batch, the most severe one of any rank. Every loss is the
    mean over the ranks, so all decide alike. Each rank notes the findings about its own episode if its onset is within
    8 batches; rank 0's report mentions the other ranks' episodes in a remark. Every four batches each rank sends two
    numbers over its own group (gloo, on the CPU) and reads the others' four batches later. No device is read. A rank
    waits only for one that is further behind or gone, once and for five minutes at most; then examinations end.

    An exception during the replay on one rank ends the replay on all, and the training continues. In a backward pass,
    however, the other ranks wait for that rank's gradients until the process group's timeout, as in training. Single
    steps are run by each rank alone: SyncBatchNorm then uses the rank's own batch, and a `training_step` that gathers
    through Lightning is not examined. If it calls `torch.distributed` itself, leave this callback out. Several ranks
    under other strategies (FSDP, DeepSpeed, model parallel) are not examined, and the report says so.

    Args:
        budget: Share of the run's time that replays may take, above 0 and at most 1, plus 5 seconds in total. The
            first episode is always examined. An episode more severe than all before it may exceed the budget. Others
            that do not fit get a triage (about three steps) or are named in the report.
        max_episodes: Maximum number of episodes examined in one fit.
        controls: Control batches that the onset's batch is compared with; more of them resolve smaller effects.

    Raises:
        ConfigurationError: An argument is out of its range.
    """

    _refusal: str | None
    """Reason why the ranks cannot examine anything together."""
    _ranks: Ranks
    _requests: ExaminationRequests | None

    def __init__(self, budget: float = 0.02, max_episodes: int = 20, controls: int = 8) -> None:
        self.budget = number(
            "CounterfactualReplay(budget)", budget, above=0.0, at_most=1.0, do="Use 0.02 for 2 % of the run's time."
        )
        self.max_episodes = whole_number(
            "CounterfactualReplay(max_episodes)",
            max_episodes,
            at_least=1,
            do="Leave the callback out for no replays.",
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
            self._ranks, self._requests = Ranks(group), ExaminationRequests(group)

    @override
    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        self._waiting |= {e.id: e for e in changed if e.kind in EXAMINED and e.id not in self._seen}
        outgrown = {e.id: e for e in changed if self._has_outgrown(e)}
        if self._requests is not None:
            self._act_together(batch, self._requests, changed, outgrown)
            return
        if self._test_is_due(batch):
            self.flight.store.note(*self._test_step_size(batch))
        due = [e for e in self._waiting.values() if not _should_wait(e, batch)]
        for episode in sorted([*due, *outgrown.values()], key=lambda e: -e.severity):
            found, action = self._examine(batch, episode, repeated=episode.id in self._seen)
            self._note(episode, [note for note in (found, action) if note is not None])

    @override
    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None) -> None:
        for episode in self._waiting.values():
            self.flight.store.note(Experiments(episode=episode.id, not_run="the run ended with it"))
        self.flight.store.note(*(_remark(shared) for shared in self._unmatched))

    def _forget(self) -> None:
        self._seen: dict[int, list[float]] = {}
        """Severity at each examination, by the episode's id."""
        self._waiting: dict[int, Episode] = {}
        self._budget = Budget(share=self.budget, free=FREE_SECONDS)
        self._began = time.monotonic()
        self._first = 0
        self._refusal, self._ranks, self._requests = None, SINGLE_RANK, None
        self._tests_steps = True
        self._batches = 0
        self._requested: Episode | None = None
        self._outgrown: dict[int, Episode] = {}
        self._shared: list[SharedExamination] = []
        self._unmatched: list[SharedExamination] = []
        """Those of them that match no episode of this rank so far."""

    def _note(self, episode: Episode, notes: Sequence[Experiments | Action]) -> None:
        self._waiting.pop(episode.id, None)
        self._outgrown.pop(episode.id, None)
        self._seen.setdefault(episode.id, []).append(episode.severity)
        self.flight.store.note(*notes)

    # -- several ranks -----------------------------------------------------------------------------------------------

    def _act_together(
        self,
        batch: TrainingBatch,
        requests: ExaminationRequests,
        changed: Sequence[Episode],
        outgrown: Mapping[int, Episode],
    ) -> None:
        """Exchanges requests and examines the strongest: the same calls on every rank, whatever it has seen."""
        self._outgrown |= outgrown
        self._note_known(changed)
        self._batches += 1
        is_last = _is_last(batch.trainer)
        if self._batches % EXCHANGE_EVERY and not is_last:
            return
        try:
            self._examine_strongest(batch, requests)
            self._request(requests)
            while is_last and self._examine_strongest(batch, requests):
                self._request(requests)
        except RankUnreachable as gone:
            self._refusal, self._requests, self._ranks = str(gone), None, SINGLE_RANK
            self.flight.store.note(f"No more episodes are replayed: {gone}.")

    def _request(self, requests: ExaminationRequests) -> None:
        due = [*self._waiting.values(), *self._outgrown.values()]
        self._requested = max(due, key=lambda e: e.severity, default=None)
        requests.send(self._requested)

    def _examine_strongest(self, batch: TrainingBatch, requests: ExaminationRequests) -> bool:
        """Examines the strongest request of all ranks; returns whether there was one."""
        request = requests.strongest()
        if request is None:
            return False
        self._ranks.barrier("an examination", request.onset, seconds=PATIENCE)
        episode, repeated = self._ranks.broadcast(self._newest(self._requested), by=request.rank)
        if episode is None:
            return True
        found, action = self._examine(batch, episode, repeated=repeated, by=request.rank)
        examined = SharedExamination(rank=request.rank, episode=episode, found=found, action=action)
        own = [episode] if request.rank == self._ranks.rank else [e for e in self._own() if examined.is_about(e)]
        for mine in own:
            self._note(mine, examined.notes_about(mine))
        self._shared.append(examined)
        self._unmatched += [examined] if found is not None and not own else []
        return True

    def _newest(self, requested: Episode | None) -> tuple[Episode | None, bool]:
        """The newest version of the episode, and whether it has been examined before."""
        if requested is None:
            return None, False
        return next((e for e in self._own() if e.id == requested.id), requested), requested.id in self._seen

    def _own(self) -> list[Episode]:
        return [e for e in self.flight.store.episodes if e.kind in EXAMINED]

    def _note_known(self, changed: Sequence[Episode]) -> None:
        """Notes results of an earlier shared examination about an episode that this rank sees only now."""
        for episode in changed:
            known = [e for e in self._shared if episode.id in self._waiting and e.is_about(episode)]
            for examined in known:
                self._note(episode, examined.notes_about(episode))
                self._unmatched = [other for other in self._unmatched if other is not examined]

    def _has_outgrown(self, episode: Episode) -> bool:
        """Whether the peak needs an examination too: severity grew since the only one, which blamed the batch."""
        severities = self._seen.get(episode.id, [])
        if len(severities) != 1 or episode.severity <= MIN_SEVERITY_GROWTH * severities[0]:
            return False
        shares = jump_shares(self.flight.store.experiments.get(episode.id))
        return not shares or max(shares, key=lambda group: shares[group]) is Group.DATA

    def _examine(
        self, batch: TrainingBatch, episode: Episode, *, repeated: bool, by: int = 0
    ) -> tuple[Experiments | None, Action | None]:
        """Examines an episode within the budget; returns what to note, the same on all ranks."""
        extent, why = self._ranks.broadcast(self._extent(batch, episode), by=0)
        if extent is None:
            return None if repeated else Experiments(episode=episode.id, not_run=why), None
        started = time.monotonic()
        found = self._experiments(batch, episode, extent, repeated=repeated, by=by)
        seconds = time.monotonic() - started
        is_done = found.not_run is None
        self._budget.book(seconds, extent=extent if is_done else "triage", severity=episode.severity)
        if not is_done:
            return None if repeated else found, None
        detail = {"episode": episode.id, "extent": extent, "seconds": round(seconds, 3)}
        return found, Action(action="replay", at=batch.at, detail=detail)

    def _experiments(
        self, batch: TrainingBatch, episode: Episode, extent: Extent, *, repeated: bool, by: int
    ) -> Experiments:
        try:
            return self._replay(batch, episode, extent, repeated=repeated, by=by)
        except RankUnreachable:
            raise
        except CannotReplay as reason:
            return Experiments(episode=episode.id, not_run=str(reason))
        except Exception as error:  # noqa: BLE001 - the user's code; the training is untouched
            return Experiments(episode=episode.id, not_run=f"the replay failed: {type(error).__name__}: {error}")

    def _replay(
        self, batch: TrainingBatch, episode: Episode, extent: Extent, *, repeated: bool, by: int
    ) -> Experiments:
        examination = examine if extent == "full" else triage
        try:
            with self._ranks.stage():
                scene = live_scene(batch, episode, self._witnesses, controls=self.controls, ranks=self._ranks)
                at_peak = repeated and any(entry.at.ordinal == episode.peak.ordinal for entry in scene.entries)
                found = examination(dataclasses.replace(scene, looks_at=episode.peak.ordinal) if at_peak else scene)
        except OnsetGone as reason:
            steps = self._step_size(batch, episode) if extent == "full" else None
            if steps is None:
                return Experiments(episode=episode.id, not_run=str(reason))
            return with_step_size(None, episode, str(reason), steps)
        found = merge_experiments(self._ranks.gather(found), by=by)
        failure = unexplained(found) if extent == "full" else None
        steps = None if failure is None else self._step_size(batch, episode)
        return found if failure is None or steps is None else with_step_size(found, episode, failure, steps)

    # -- step sizes at the current weights ---------------------------------------------------------------------------

    def _step_size(self, batch: TrainingBatch, episode: Episode) -> StepSize | None:
        """The step-size test for an episode whose onset is not recorded; `None` if the steps are not too long."""
        earlier = self._ranks.broadcast(earlier_step_size(self.flight.store, episode), by=0)
        if earlier is not None:
            return earlier
        with self._ranks.stage():
            steps = self._step_size_test(batch)
        return steps if steps is not None and steps_too_long(steps) else None

    def _test_is_due(self, batch: TrainingBatch) -> bool:
        """Whether to test the step size of a run without episodes whose loss has stopped falling."""
        count = batch.at.ordinal + 1 - self._first
        if count < MIN_BATCHES_BEFORE_TEST or count & (count - 1) or not self._tests_steps:
            return False
        if any(e.kind in EXAMINED for e in self.flight.store.episodes):
            return False
        elapsed = time.monotonic() - self._began - self._budget.spent
        return stagnates(self.flight.store.history.series("loss")) and self._budget.has_room(
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
        """Extent of the examination; `None` and a reason if there is to be none."""
        if self._refusal is not None:
            return None, self._refusal
        if self._budget.examined >= self.max_episodes:
            return None, f"max_episodes={self.max_episodes} were examined already"
        elapsed = time.monotonic() - self._began - self._budget.spent
        pace = elapsed / max(batch.at.ordinal - self._first, 1)
        snapshot = self._witnesses.snapshots.latest_healthy(before=episode.onset.ordinal)
        replayed = 0 if snapshot is None else episode.onset.ordinal - snapshot.at.ordinal
        full, triage_only = pace * max(FULL_STEPS, replayed + MIN_STEPS), pace * TRIAGE_STEPS
        extent = self._budget.extent(severity=episode.severity, elapsed=elapsed, full=full, triage=triage_only)
        spent = f"replays took {self._budget.spent:.2g} s already"
        return extent, f"{spent}, and another would not fit into budget={self.budget:.3g} of the run's time"


def _remark(shared: SharedExamination) -> str:
    """The remark of a rank whose own loss did not show the episode."""
    found = Experiments(episode=shared.episode.id) if shared.found is None else shared.found
    known = dataclasses.replace(found, rank=shared.rank)
    return sentences.remark_of_other_rank(known, shared.episode.kind, shared.episode.onset.step)


def _should_wait(episode: Episode, batch: TrainingBatch) -> bool:
    """Whether to wait for the next loss: if the onset's batch is the newest one, the jump may be still to come."""
    if episode.kind is EpisodeKind.NONFINITE or batch.at.ordinal > episode.onset.ordinal:
        return False
    return not _is_last(batch.trainer)


def _is_last(trainer: Trainer) -> bool:
    """Whether this is the last batch of the training, as far as known; the same on all ranks."""
    in_last_epoch = trainer.max_epochs is not None and 0 <= trainer.max_epochs <= trainer.current_epoch + 1
    is_last = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    return is_last or (in_last_epoch and trainer.is_last_batch)
