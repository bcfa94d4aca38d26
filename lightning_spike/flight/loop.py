"""The loop that all callbacks of a run drive together: sense, judge, act, explain."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_spike.detectors.episodes import EpisodeDetector
from lightning_spike.flight.facts import first_facts, run_facts
from lightning_spike.flight.warn import warn
from lightning_spike.record.participant import Participant, TrainingBatch
from lightning_spike.record.recorder import Arrival, Recorder
from lightning_spike.records import Disabled, Episode, Moment, RunStatus
from lightning_spike.signals.loss import batch_losses
from lightning_spike.store import ATTRIBUTE, TrainerStateStore

P = TypeVar("P", bound=Participant)


class Flight:
    """One fit, as the suite sees it: the store, the recorder, the episode detector and all participants.

    The first callback of the suite in the trainer's list drives it (see `base`); the others only take part. It is made
    in `setup` and closed when the fit ends, so that a second `fit` begins a new one.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.store = TrainerStateStore(first_facts())
        self.recorder = Recorder()
        self.episodes = EpisodeDetector()
        self.closed = False
        self.broken = False
        """The loop itself has failed: nothing is sensed or judged any more."""
        self.default_dirpath = Path(trainer.log_dir or trainer.default_root_dir) / "spike"
        """Where files go that no callback was given a place for. `trainer.log_dir` is a collective, so it is asked for
        here, on every rank."""
        self._participants: list[Participant] = []
        self._batch: TrainingBatch | None = None
        self._next_ordinal = 0
        self._usual_batch_size: int | None = None
        self._backward_losses: list[Tensor] = []

    # -- who takes part ----------------------------------------------------------------------------------------------

    @classmethod
    def of(cls, trainer: Trainer) -> "Flight":
        """The open flight of this trainer; a new one where there is none or the last one is closed."""
        flight = vars(trainer).get(ATTRIBUTE)
        if flight is None or flight.closed:
            flight = cls(trainer)
            setattr(trainer, ATTRIBUTE, flight)
        return flight

    def join(self, participant: P, trainer: Trainer, module: LightningModule) -> P:
        """Let a participant take part from now on.

        Its `attach` may raise, for a bad configuration must stop the fit before it begins.
        """
        participant.flight = self
        participant.attach(trainer, module)
        self._participants.append(participant)
        return participant

    def share(self, kind: type[P], make: Callable[[], P], trainer: Trainer, module: LightningModule) -> P:
        """The one participant of this kind that all callbacks share; made by the first that asks."""
        for participant in self._participants:
            if type(participant) is kind:
                return participant
        return self.join(make(), trainer, module)

    def taking_part(self, kind: type[P]) -> P | None:
        """The participant of this kind, `None` where there is none or it has been switched off."""
        return next((p for p in self._participants if isinstance(p, kind)), None)

    # -- one training step -------------------------------------------------------------------------------------------

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """`on_train_start`: read the settings, let everybody get ready."""
        self.store.facts = run_facts(trainer, module, started=self.store.facts.started)
        self._each(lambda p: p.begin(trainer, module))

    def batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """`on_train_batch_start`: a new row is opened."""
        at = Moment(
            ordinal=self._next_ordinal, step=trainer.global_step, epoch=trainer.current_epoch, batch_idx=batch_idx
        )
        self._next_ordinal += 1
        self._backward_losses = []
        size = batch_size(batch)
        self._usual_batch_size = max(filter(None, (self._usual_batch_size, size)), default=None)
        self.recorder.begin(at, batch_size=size, usual_batch_size=self._usual_batch_size)
        current = self._batch = TrainingBatch(trainer=trainer, module=module, at=at, batch=batch)
        self._each(lambda p: p.sense_batch(current))

    def backward(self, loss: Tensor) -> None:
        """`on_before_backward`.

        Under manual optimisation this is where a loss that `training_step` does not return is seen.
        """
        if (current := self._batch) is None:
            return
        if not self.store.facts.automatic_optimization and loss.numel() == 1:
            self._backward_losses.append(loss.detach())
        self._each(lambda p: p.sense_backward(current, loss))

    def gradients(self, optimizer: Optimizer) -> None:
        """`on_before_optimizer_step`."""
        if (current := self._batch) is not None:
            self._each(lambda p: p.sense_gradients(current, optimizer))

    def batch_end(self, outputs: object) -> None:
        """`on_train_batch_end`: close the row, judge what has arrived, act."""
        if (current := self._batch) is None:  # a loader that yielded None: Lightning skips the start hook
            return
        self._put_losses(outputs)
        self._each(lambda p: p.sense_outcome(current, outputs))
        self.recorder.end()
        self._batch = None
        changed = self._judge(self.recorder.arrived())
        self._each(lambda p: p.act(current, changed))
        self._each(lambda p: p.heal(current, changed))

    def validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """`on_validation_end`, not for the sanity check."""
        at = self.last_moment(trainer)
        self._each(lambda p: p.sense_validation(trainer, module, at))

    # -- the end -----------------------------------------------------------------------------------------------------

    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None = None) -> None:
        """`on_fit_end` or `on_exception`.

        Settle what is open, let everybody explain, and close; only the first call counts.
        """
        if self.closed:
            return
        self.closed = True
        self._settle()
        self._each(lambda p: p.conclude(trainer, status, error))
        self._each(lambda p: p.explain(trainer, status, error))
        self.release()

    def _settle(self) -> None:
        """Take in what is still under way.

        Where that fails (after an error of the device nothing can be read from it) the report says so and goes without.
        """
        for part, step in (
            ("recorder", lambda: self._judge(self.recorder.flush())),
            ("episodes", lambda: self.update_episodes(self.episodes.finish())),
        ):
            try:
                step()
            except Exception as error:  # noqa: BLE001 - what has arrived before is worth a report
                self.store.note(Disabled(part=part, reason=f"{type(error).__name__}: {error}"))

    def release(self) -> None:
        """Undo what participants installed, and let go of the training's objects."""
        self._each(lambda p: p.release())
        self._batch = None
        self._backward_losses = []

    # -- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """For the user's checkpoint: plain numbers, strings, lists and dicts only, bounded in size."""
        return {
            "next_ordinal": self._next_ordinal,
            "usual_batch_size": self._usual_batch_size,
            "episodes": self.episodes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where the run that wrote the checkpoint was."""
        self._next_ordinal = state["next_ordinal"]
        self._usual_batch_size = state["usual_batch_size"]
        self.episodes.load_state_dict(state["episodes"])
        self.update_episodes(self.episodes.episodes)

    def last_moment(self, trainer: Trainer) -> Moment:
        """The batch that was begun last, or the present position where none was."""
        ordinal = max(self._next_ordinal - 1, 0)
        return Moment(
            ordinal=ordinal,
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            batch_idx=max(trainer.fit_loop.batch_idx, 0),
        )

    # -- inside ------------------------------------------------------------------------------------------------------

    def update_episodes(self, changed: Iterable[Episode]) -> None:
        """Take in episodes that a participant's own detector opened or changed."""
        for episode in changed:
            self.store.replace_episode(episode)

    def _put_losses(self, outputs: object) -> None:
        facts = self.store.facts
        divided_by = facts.accumulate_grad_batches if facts.automatic_optimization else 1
        for name, loss in batch_losses(outputs, self._backward_losses, divided_by=divided_by).items():
            self.recorder.put(name, loss)

    def _judge(self, arrivals: Sequence[Arrival]) -> list[Episode]:
        """Store and judge what has arrived; the episodes that are new or changed, each once, in its newest version."""
        changed: dict[int, Episode] = {}
        for arrival in arrivals:
            changed |= {episode.id: episode for episode in self._take_in(arrival)}
        return list(changed.values())

    def _take_in(self, arrival: Arrival) -> list[Episode]:
        self.store.append(arrival.row, arrival.layers)
        changed = self.episodes.observe(arrival.row)
        self.update_episodes(changed)
        self._each(lambda p: p.judge(arrival))
        return changed

    def _each(self, phase: Callable[[Participant], object]) -> None:
        """Run one phase for all.

        Who raises is switched off, for an observer that breaks must never break the training.
        """
        for participant in tuple(self._participants):
            try:
                phase(participant)
            except Exception as error:  # noqa: BLE001 - whatever it is, the training goes on
                self._switch_off(participant, error)

    def _switch_off(self, participant: Participant, error: Exception) -> None:
        self._participants.remove(participant)
        name = type(participant).__name__
        where = self._batch.at.step if self._batch else None
        self.store.note(Disabled(part=name, reason=f"{type(error).__name__}: {error}", step=where))
        warn(f"{name} broke and is switched off; the training goes on. {type(error).__name__}: {error}")


def batch_size(batch: object) -> int | None:
    """The number of samples.

    The length of the first dimension that most tensors of the batch share, `None` where there is none.
    """
    lengths = [leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return max(lengths, key=lengths.count, default=None)
