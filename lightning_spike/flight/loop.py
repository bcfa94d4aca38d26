"""The shared loop of all callbacks of a run: sense, judge, act, explain."""

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_spike.detectors.episodes import EpisodeDetector
from lightning_spike.flight.facts import run_facts
from lightning_spike.flight.warn import warn
from lightning_spike.record.participant import Participant, TrainingBatch
from lightning_spike.record.recorder import Arrival, Recorder
from lightning_spike.records import Disabled, Episode, Moment, RunFacts, RunStatus
from lightning_spike.signals.loss import batch_losses
from lightning_spike.store import ATTRIBUTE, TrainerStateStore

P = TypeVar("P", bound=Participant)


class Flight:
    """One fit: the store, the recorder, the episode detector and all participants.

    The first callback of the suite in the trainer's list drives it (see `base`). It lasts from `setup` to the end of
    the fit.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.store = TrainerStateStore(RunFacts(started=dt.datetime.now(dt.UTC).isoformat(timespec="seconds")))
        self.recorder = Recorder()
        self.episodes = EpisodeDetector()
        self.closed = False
        self.broken = False
        """Whether the loop itself failed, which ends all phases."""
        self.default_dirpath = Path(trainer.log_dir or trainer.default_root_dir) / "spike"
        """Default folder for files; `trainer.log_dir` is a collective, so every rank reads it here."""
        self._participants: list[Participant] = []
        self._batch: TrainingBatch | None = None
        self._next_ordinal = 0
        self._usual_batch_size: int | None = None
        self._backward_losses: list[Tensor] = []

    @classmethod
    def of(cls, trainer: Trainer) -> "Flight":
        """The open flight of this trainer, or a new one."""
        flight = vars(trainer).get(ATTRIBUTE)
        if flight is None or flight.closed:
            flight = cls(trainer)
            setattr(trainer, ATTRIBUTE, flight)
        return flight

    def join(self, participant: P, trainer: Trainer, module: LightningModule) -> P:
        """Add a participant; its `attach` can raise, so that a bad configuration stops the fit early."""
        participant.flight = self
        participant.attach(trainer, module)
        self._participants.append(participant)
        return participant

    def share(self, kind: type[P], make: Callable[[], P], trainer: Trainer, module: LightningModule) -> P:
        """The shared participant of this kind, made at the first call."""
        shared = next((p for p in self._participants if type(p) is kind), None)
        return self.join(make(), trainer, module) if shared is None else shared

    def taking_part(self, kind: type[P]) -> P | None:
        """The participant of this kind; `None` without one or after its failure."""
        return next((p for p in self._participants if isinstance(p, kind)), None)

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """`on_train_start`: read the settings and prepare all participants."""
        self.store.facts = run_facts(trainer, module, started=self.store.facts.started)
        self._each(lambda p: p.begin(trainer, module))

    def batch_start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """`on_train_batch_start`: open a new row."""
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
        """`on_before_backward`: record the loss under manual optimisation, which `training_step` need not return."""
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
        """`on_train_batch_end`: close the row, judge rows on the host, act."""
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

    def conclude(self, trainer: Trainer, status: RunStatus, error: BaseException | None = None) -> None:
        """`on_fit_end` or `on_exception`: settle, explain and close, once."""
        if self.closed:
            return
        self.closed = True
        self._settle()
        self._each(lambda p: p.conclude(trainer, status, error))
        self._each(lambda p: p.explain(trainer, status, error))
        self.release()

    def _settle(self) -> None:
        """Judge the remaining rows; a failure, such as after a device error, goes into the report."""
        for part, step in (
            ("recorder", lambda: self._judge(self.recorder.flush())),
            ("episodes", lambda: self.update_episodes(self.episodes.finish())),
        ):
            try:
                step()
            except Exception as error:  # noqa: BLE001 - the report has the rows before
                self.store.note(Disabled(part=part, reason=f"{type(error).__name__}: {error}"))

    def release(self) -> None:
        """Undo what participants installed, and drop references to the training."""
        self._each(lambda p: p.release())
        self._batch = None
        self._backward_losses = []

    def state_dict(self) -> dict[str, Any]:
        """Plain data of bounded size for the user's checkpoint."""
        return {
            "next_ordinal": self._next_ordinal,
            "usual_batch_size": self._usual_batch_size,
            "episodes": self.episodes.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._next_ordinal = state["next_ordinal"]
        self._usual_batch_size = state["usual_batch_size"]
        self.episodes.load_state_dict(state["episodes"])
        self.update_episodes(self.episodes.episodes)

    def last_moment(self, trainer: Trainer) -> Moment:
        """The last batch, or the present position without one."""
        ordinal = max(self._next_ordinal - 1, 0)
        return Moment(
            ordinal=ordinal,
            step=trainer.global_step,
            epoch=trainer.current_epoch,
            batch_idx=max(trainer.fit_loop.batch_idx, 0),
        )

    def update_episodes(self, changed: Iterable[Episode]) -> None:
        """Store new or changed episodes."""
        for episode in changed:
            self.store.replace_episode(episode)

    def _put_losses(self, outputs: object) -> None:
        facts = self.store.facts
        divided_by = facts.accumulate_grad_batches if facts.automatic_optimization else 1
        for name, loss in batch_losses(outputs, self._backward_losses, divided_by=divided_by).items():
            self.recorder.put(name, loss)

    def _judge(self, arrivals: Sequence[Arrival]) -> list[Episode]:
        """Store and judge rows; returns the newest versions of new or changed episodes."""
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
        """Run one phase for all participants; one that raises is switched off."""
        for participant in tuple(self._participants):
            try:
                phase(participant)
            except Exception as error:  # noqa: BLE001 - the training continues
                self._switch_off(participant, error)

    def _switch_off(self, participant: Participant, error: Exception) -> None:
        self._participants.remove(participant)
        name = type(participant).__name__
        where = self._batch.at.step if self._batch else None
        self.store.note(Disabled(part=name, reason=f"{type(error).__name__}: {error}", step=where))
        warn(f"{name} broke and is switched off; the training continues. {type(error).__name__}: {error}")


def batch_size(batch: object) -> int | None:
    """The number of samples: the most common first dimension of the batch's tensors; `None` without any."""
    lengths = [leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return max(lengths, key=lengths.count, default=None)
