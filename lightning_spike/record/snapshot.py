"""Snapshots of the training state, taken now and then, and believed only once they are proven healthy."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.record import state_copy
from lightning_spike.record.attribute_state import OwnState, copy_own
from lightning_spike.record.participant import Participant, TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.record.running_means import RunningMean, take_running_means
from lightning_spike.records import Episode, EpisodeKind, Moment
from lightning_spike.signals.random_state import RandomState

FLAG: Final = "snapshot/finite"
"""Signal that says whether everything in the snapshot taken at this batch is finite: 1 or 0; one a device,
`snapshot/finite/<device>` for further ones."""
CONFIRM: Final = 8
"""Batches after a snapshot whose losses must be accepted before it is believed: what poisons weights shows in the next
loss, or the one after that; a rise that is slower is dated back by the detector, and then takes the snapshot with
it."""
SLOTS: Final = 4
"""Snapshots held at most, where memory allows: one that waits for its proof, and three to go back to."""
NEAR_SLOTS: Final = 8
"""The same where near ones are wanted: five a cadence of 16 apart reach back 72 batches (`lab.live_scene.REACH`), one
waits, one is far, one is let go."""
NEAREST: Final = 16
"""Batches between near snapshots, where memory allows: so that, with the proof, 8 to 24 batches lie between one and the
onset of a trouble."""
FARTHEST: Final = 50
"""Batches between them at most, however large the model."""
NEAR_MB: Final = 1024
"""Memory for all near snapshots together; a model of more than 10 M parameters under Adam is held fewer times, and more
rarely."""
LEAST_SLOTS: Final = 2
"""One to go back to while the next waits for its proof."""
REACH: Final = 8
"""The oldest snapshot is kept until it is this many cadences old: troubles that are noticed late are dated back past
the recent ones."""
ON_DEVICE_MB: Final = 256
"""Up to this size in all, snapshots stay on the device; larger ones go to pinned host memory (12 bytes a parameter
under Adam: 5 M parameters, 2.5 M near)."""
MB: Final = 1 << 20
LOSS_TROUBLES: Final = frozenset(
    {EpisodeKind.SPIKE, EpisodeKind.DIVERGENCE, EpisodeKind.NONFINITE, EpisodeKind.OSCILLATION}
)
"""Kinds of episodes whose weights are not to be gone back to."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """The training state as it was before the forward pass of one batch.

    Clones, on the device or in pinned host memory.
    """

    at: Moment
    """The batch before which it was taken."""
    model: dict[str, Tensor]
    """Parameters and buffers by name, non-persistent buffers included."""
    optimizers: list[dict[str, Any]]
    """One a `trainer.optimizers`, in the form of `Optimizer.state_dict()`."""
    scaler: dict[str, Tensor | None] | None
    """`scale` and `growth_tracker` of the GradScaler, `None` without one."""
    rng: RandomState
    averages: dict[str, dict[str, Tensor]]
    """Averaged models that callbacks hold (EMA, SWA), by place."""
    means: dict[str, RunningMean]
    """The running means of `self.log(on_epoch=True)` as they stood."""
    own: OwnState | None = None
    """What the module keeps in attributes: counters, metrics, hidden states. For re-runs only."""
    gradients: dict[str, Tensor] | None = None
    """Under manual optimisation, where nobody else knows whether they are used up; by parameter name. For re-runs
    only."""

    def load_into(self, trainer: Trainer, module: LightningModule, *, hyperparameters: bool = False) -> None:
        """Put weights, buffers, optimizers, loss scale and averaged models back, in place.

        Never aliases, so it can be done again.

        Random states, gradients, schedulers, loops, logged means and attributes of the module are left alone, as the
        run goes on from where it is. Does not wait for the device.

        Args:
            trainer: The trainer whose optimizers and precision plugin are written to.
            module: The module that the snapshot was taken of.
            hyperparameters: Put back what schedulers write into parameter groups too (lr, betas, momentum, weight
                decay).
        """
        state_copy.load_module(module, self.model)
        for optimizer, saved in zip(trainer.optimizers, self.optimizers, strict=True):
            state_copy.load_optimizer(optimizer, saved, hyperparameters=hyperparameters)
        state_copy.load_scaler(trainer, self.scaler)
        state_copy.load_averages(trainer, module, self.averages)


@dataclasses.dataclass(slots=True, eq=False)
class _Held:
    snapshot: Snapshot
    is_first: bool
    """The state a run began with is what the user gave: one accepted loss is proof enough."""
    is_finite: bool = False
    is_verified: bool = False

    @property
    def ordinal(self) -> int:
        return self.snapshot.at.ordinal


class Snapshots(Participant):
    """Takes snapshots and proves them; shared by all callbacks that need some.

    A snapshot is taken before the forward pass of the first batch of an accumulation window, on a grid of every `every`
    batches that is the same on all ranks, and not while the loss is in trouble. It is verified once a flag computed on
    the device has arrived that says that parameters, buffers and optimizer states are all finite, and the losses of its
    batch and of the `CONFIRM` batches after it were accepted. An episode
    takes with it all snapshots from its onset on. Nothing blocks: clones are queued on the stream of the training. For
    re-runs they are denser, as far as memory allows (`want_near`).

    Args:
        every: Batches between two snapshots, unless somebody wants another cadence.
        memory_mb: Memory for all snapshots together, unless somebody wants another limit; where two do not fit, none
            are taken and the report says so.
    """

    def __init__(self, every: int = 50, memory_mb: int = 4096) -> None:
        self.unavailable: str | None = None
        """Why there are no snapshots in this run, as a sentence; `None` where there are."""
        self._default = (every, memory_mb)
        self._wanted: list[tuple[int, int]] = []
        self._reach = 0
        self._near = NEAREST
        self._held: list[_Held] = []
        self._last = -1
        self._is_first = True
        self._has_said = False

    @property
    def every(self) -> int:
        """Batches between two snapshots: the densest cadence that was wanted."""
        return min([*self._cadences(), *([self._near] if self._reach else [])])

    @property
    def memory_mb(self) -> int:
        """Memory for all snapshots together: the largest limit that was wanted."""
        return max((memory for _, memory in self._wanted), default=self._default[1])

    def want(self, *, every: int, memory_mb: int) -> None:
        """What one of those who share it was asked for by the user; who came first makes no difference."""
        self._wanted.append((every, memory_mb))

    def want_near(self, reach: int) -> None:
        """Somebody trains again from them.

        Snapshots as dense as `NEAR_MB` of memory allows, that reach back this many batches.
        """
        self._reach = max(self._reach, reach)

    def latest_healthy(self, before: int | None = None) -> Snapshot | None:
        """The newest verified snapshot whose `at.ordinal` is below `before`; `None` where there is none."""
        return next(reversed(self.verified(before)), None)

    def verified(self, before: int | None = None) -> list[Snapshot]:
        """All verified snapshots whose `at.ordinal` is below `before`, oldest first."""
        return [h.snapshot for h in self._held if h.is_verified and (before is None or h.ordinal < before)]

    def rewound(self, to: Snapshot) -> None:
        """The run has gone back to this snapshot: later ones are of a course that was given up."""
        self._held = [h for h in self._held if h.ordinal <= to.at.ordinal]

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self.unavailable = refuses_snapshots(trainer)
        if self.unavailable is not None:
            self.flight.store.note(f"No snapshots: {self.unavailable}")

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        if self._is_due(batch) and self._make_room(batch):
            self._take(batch)

    @override
    def judge(self, arrival: Arrival) -> None:
        healthy = self.flight.episodes.healthy
        self._held = [h for h in self._held if h.is_verified or self._stands(h, arrival, healthy=healthy)]

    @override
    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        for episode in changed:
            if episode.kind in LOSS_TROUBLES:
                self._held = [h for h in self._held if not _inside(h.ordinal, episode)]

    @override
    def release(self) -> None:
        self._held = []

    def _is_due(self, batch: TrainingBatch) -> bool:
        opens_window = batch.at.batch_idx % batch.trainer.accumulate_grad_batches == 0
        return (
            self.unavailable is None
            and opens_window
            and (self._is_first or batch.at.ordinal // self.every > self._last // self.every)
            and self.flight.episodes.healthy
        )

    def _make_room(self, batch: TrainingBatch) -> bool:
        """Let go of one too many.

        False where that would be one that waits for its proof, or the memory is too small for two.
        """
        slots = self._slots(max(_size(batch.trainer, batch.module), 1))
        if slots < LEAST_SLOTS:
            self._give_up(batch)
            return False
        while len(self._held) >= slots and (index := self._dispensable(batch.at.ordinal)) is not None:
            del self._held[index]
        return len(self._held) < slots

    def _slots(self, size: int) -> int:
        """How many are held of this size in bytes; sets the cadence of the near ones by it."""
        slots = min(SLOTS, self.memory_mb * MB // size)
        if self._reach:
            near = min(NEAR_SLOTS, NEAR_MB * MB // size, self.memory_mb * MB // size)
            self._near = near_cadence(near, self._reach)
            slots = max(slots, near)
        return slots

    def _cadences(self) -> list[int]:
        asked = [every for every, _ in self._wanted]
        return asked or ([] if self._reach else [self._default[0]])

    def _dispensable(self, ordinal: int) -> int | None:
        """Index of the snapshot to let go.

        The second oldest while the oldest is not too old, so that both far and near ones are held.
        """
        verified = [i for i, h in enumerate(self._held) if h.is_verified]
        if len(verified) < LEAST_SLOTS:
            return None
        too_old = ordinal - self._held[verified[0]].ordinal > REACH * max([*self._cadences(), self.every])
        return verified[0] if too_old or len(verified) == LEAST_SLOTS else verified[1]

    def _give_up(self, batch: TrainingBatch) -> None:
        need = LEAST_SLOTS * _size(batch.trainer, batch.module) // MB + 1
        self._held = []
        self.unavailable = (
            f"two snapshots of this model and its optimizer take {need} MB, and memory_mb is {self.memory_mb}."
        )
        self.flight.store.note(f"No snapshots: {self.unavailable}")

    def _take(self, batch: TrainingBatch) -> None:
        trainer, module = batch.trainer, batch.module
        to_host = _size(trainer, module) * (NEAR_SLOTS if self._reach else SLOTS) > ON_DEVICE_MB * MB
        snapshot = Snapshot(
            at=batch.at,
            model=state_copy.copy_module(module, to_host=to_host),
            optimizers=[state_copy.copy_optimizer(o, to_host=to_host) for o in trainer.optimizers],
            scaler=state_copy.copy_scaler(trainer),
            rng=RandomState.take(),
            averages=state_copy.copy_averages(trainer, module, to_host=to_host),
            means=take_running_means(trainer),
            own=copy_own(module),
            gradients=None if module.automatic_optimization else state_copy.copy_gradients(module, to_host=to_host),
        )
        for name, flag in _finite_flags(trainer, module).items():
            self.flight.recorder.put(name, flag)
        self._held.append(_Held(snapshot, self._is_first))
        self._last, self._is_first = batch.at.ordinal, False
        self._say_left_out(snapshot)

    def _say_left_out(self, snapshot: Snapshot) -> None:
        left_out = snapshot.own.left_out if snapshot.own is not None else ()
        if left_out and not self._has_said:
            self._has_said = True
            names = ", ".join(left_out[:3]) + (", …" if len(left_out) > 3 else "")  # noqa: PLR2004 - enough to see which
            self.flight.store.note(
                f"Snapshots leave out {names}, as too large or of a kind that cannot be copied: should the loss depend on it, a re-run comes out differently."
            )

    def _stands(self, held: _Held, arrival: Arrival, *, healthy: bool) -> bool:
        """Whether a waiting snapshot can still be believed after this batch; marks it once it is."""
        age = arrival.row.at.ordinal - held.ordinal
        if age < 0:
            return True
        if age == 0:
            held.is_finite = _says_finite(arrival.row.values)
        held.is_verified = healthy and held.is_finite and age >= (0 if held.is_first else CONFIRM)
        return healthy and held.is_finite


def near_cadence(slots: int, reach: int) -> int:
    """Batches between two near snapshots.

    So many that those that are neither waiting nor about to be let go reach back far enough.
    """
    return min(max(-(-reach // max(slots - 2, 1)), NEAREST), FARTHEST)


def refuses_snapshots(trainer: Trainer) -> str | None:
    """Why this strategy's state cannot be put back in memory, as a sentence; `None` where it can.

    Sharded strategies (FSDP, FSDP2 as ModelParallel, DeepSpeed, XLA FSDP) load model and optimizer from disk only:
    their in-memory loading does nothing, silently.
    """
    lineage = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    sharded = next((name for name in lineage if any(s in name for s in ("FSDP", "DeepSpeed", "ModelParallel"))), None)
    if sharded is None:
        return None
    return (
        f"{sharded} shards weights and optimizer over the ranks and can put them back from a checkpoint on disk only."
    )


def _inside(ordinal: int, episode: Episode) -> bool:
    return episode.onset.ordinal <= ordinal and (episode.end is None or ordinal <= episode.end.ordinal)


def _live_tensors(trainer: Trainer, module: LightningModule) -> list[Tensor]:
    states = [dict(o.state) for o in trainer.optimizers]
    return [*module.parameters(), *module.buffers(), *state_copy.tensors_in(*(list(s.values()) for s in states))]


def _size(trainer: Trainer, module: LightningModule) -> int:
    """Bytes that a snapshot takes, read off the shapes."""
    return sum(t.numel() * t.element_size() for t in _live_tensors(trainer, module))


def _finite_flags(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """A flag a device, float32 of shape `()`, 1 where nothing is poisoned; not read here.

    Poisoned is a NaN anywhere and an Inf in parameters and optimizer states. A buffer may hold Inf by design: an
    attention mask does.
    """
    by_design = {id(buffer) for buffer in module.buffers()}
    groups: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for tensor in _live_tensors(trainer, module):
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel():
            live = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
            groups.setdefault((live.device, live.dtype, id(tensor) in by_design), []).append(live)
    sound: dict[torch.device, list[Tensor]] = {}
    for (device, _, may_be_inf), members in groups.items():
        told = _telling(device, members)
        sound.setdefault(device, []).append((~told.isnan() if may_be_inf else told.isfinite()).all())
    flags = {device: torch.stack(all_).all().float() for device, all_ in sound.items()}
    home = module.device if module.device in flags else next(iter(flags), None)
    return {FLAG if device == home else f"{FLAG}/{device}": flag for device, flag in flags.items()}


def _telling(device: torch.device, members: list[Tensor]) -> Tensor:
    """A number for each tensor that is finite exactly if all of it is, shape `(len(members),)`.

    On the GPU the largest magnitudes, one kernel for all. On the CPU that takes twenty times as long as a sum; a sum of
    float32 overflows only where the weights are past all use.
    """
    if device.type == "cuda":
        return torch.stack(torch._foreach_norm(members, math.inf))  # as torch's own clipping does
    wide = torch.float64 if members[0].dtype == torch.float64 else torch.float32
    return torch.stack([member.sum(dtype=wide) for member in members])


def _says_finite(values: Mapping[str, float]) -> bool:
    flags = [value for name, value in values.items() if name == FLAG or name.startswith(f"{FLAG}/")]
    return all(flag == 1.0 for flag in flags)
