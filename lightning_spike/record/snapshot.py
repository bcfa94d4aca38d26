"""Snapshots of the training state, which must be verified as healthy."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_spike.record import state_copy
from lightning_spike.record.attribute_state import AttributeState, copy_attributes
from lightning_spike.record.participant import Participant, TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.record.running_means import RunningMean, take_running_means
from lightning_spike.records import Episode, EpisodeKind, Moment
from lightning_spike.signals.random_state import RandomState

FLAG: Final = "snapshot/finite"
"""Signal that is 1 if all of the snapshot at this batch is finite, else 0; `snapshot/finite/<device>` for further
devices."""
CONFIRMING_BATCHES: Final = 8
"""Batches after a snapshot whose losses must be accepted: bad weights show in the next loss or two, and the detector
dates slower rises back; engineering choice."""
SLOTS: Final = 4
"""Snapshots that are held: one that is unverified and three to return to; engineering choice."""
NEAR_SLOTS: Final = 8
"""The same with near snapshots: five at a cadence of 16 reach back 72 batches (as
`lab.live_scene.RECORDED_BATCHES`)."""
MIN_NEAR_CADENCE: Final = 16
"""Batches between near snapshots where memory allows: 8 to 24 batches before an onset, with the proof;
engineering choice."""
MAX_NEAR_CADENCE: Final = 50
"""Largest number of batches between them, for a large model; engineering choice."""
NEAR_MB: Final = 1024
"""Memory for all near snapshots; beyond 10 M parameters under Adam there are fewer; engineering choice."""
MIN_SLOTS: Final = 2
"""One to return to while the next is unverified."""
MAX_AGE: Final = 8
"""Cadences for which the oldest snapshot is kept: late episodes are dated back past recent ones; engineering choice."""
ON_DEVICE_MB: Final = 256
"""Largest total size of snapshots on the device; larger ones go to pinned host memory; engineering choice."""
MB: Final = 1 << 20
LOSS_TROUBLES: Final = frozenset(set(EpisodeKind) - {EpisodeKind.STALL, EpisodeKind.OVERFIT})
"""Kinds of episodes whose weights are no place to return to."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Snapshot:
    """Clone of the training state before the forward pass of one batch, on the device or in pinned host memory."""

    at: Moment
    """The next batch."""
    model: dict[str, Tensor]
    """Parameters and buffers by name, non-persistent buffers included."""
    optimizers: list[dict[str, Any]]
    """One per entry of `trainer.optimizers`, in the form of `Optimizer.state_dict()`."""
    scaler: dict[str, Tensor | None] | None
    """`scale` and `growth_tracker` of the GradScaler, `None` without one."""
    rng: RandomState
    averages: dict[str, dict[str, Tensor]]
    """Averaged models that callbacks hold (EMA, SWA), by place."""
    means: dict[str, RunningMean]
    """Running means of `self.log(on_epoch=True)`."""
    own: AttributeState | None = None
    """Attributes of the module: counters, metrics, hidden states. For replays only."""
    gradients: dict[str, Tensor] | None = None
    """Gradients by parameter name, under manual optimisation. For replays only."""

    def load_into(self, trainer: Trainer, module: LightningModule, *, hyperparameters: bool = False) -> None:
        """Restore weights, buffers, optimizers, loss scale and averaged models in place, any number of times.

        Leaves random states, gradients, schedulers, loops, logged means and module attributes alone. Does not wait for
        the device.

        Args:
            trainer: The trainer whose optimizers and precision plugin are written to.
            module: The module of the snapshot.
            hyperparameters: Also restore what schedulers write (lr, betas, momentum, weight decay).
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
    """Whether it is the first state of the run, for which one accepted loss suffices."""
    is_finite: bool = False
    is_verified: bool = False

    @property
    def ordinal(self) -> int:
        return self.snapshot.at.ordinal


class Snapshots(Participant):
    """Takes and verifies snapshots, for all callbacks that need them.

    Takes a snapshot every `every` batches, the same on all ranks, before the first batch of an accumulation window and
    outside of episodes. It is verified once parameters, buffers and optimizer states are known to be finite and the
    losses of the next `CONFIRMING_BATCHES` batches were accepted. An episode removes all snapshots from its onset on.
    Nothing blocks: clones are queued on the training's stream. For replays they are denser (`want_near`).

    Args:
        every: Batches between two snapshots, unless another cadence is wanted.
        memory_mb: Memory for all snapshots, unless another limit is wanted; where two do not fit, there are none.
    """

    def __init__(self, every: int = 50, memory_mb: int = 4096) -> None:
        self.unavailable: str | None = None
        """Why there are no snapshots, as a sentence; `None` where there are."""
        self._default = (every, memory_mb)
        self._wanted: list[tuple[int, int]] = []
        self._reach = 0
        self._near = MIN_NEAR_CADENCE
        self._held: list[_Held] = []
        self._last = -1
        self._is_first = True
        self._has_noted = False

    @property
    def every(self) -> int:
        """Batches between two snapshots, the densest wanted cadence."""
        return min([*self._cadences(), *([self._near] if self._reach else [])])

    @property
    def memory_mb(self) -> int:
        """Memory for all snapshots, the largest wanted limit."""
        return max((memory for _, memory in self._wanted), default=self._default[1])

    def want(self, *, every: int, memory_mb: int) -> None:
        """Ask for a cadence and a memory limit, in any order."""
        self._wanted.append((every, memory_mb))

    def want_near(self, reach: int) -> None:
        """Ask for snapshots for replays that reach back this many batches, as dense as `NEAR_MB` allows."""
        self._reach = max(self._reach, reach)

    def latest_healthy(self, before: int | None = None) -> Snapshot | None:
        """The newest verified snapshot with `at.ordinal` below `before`; `None` without one."""
        return next(reversed(self.verified(before)), None)

    def verified(self, before: int | None = None) -> list[Snapshot]:
        """All verified snapshots with `at.ordinal` below `before`, oldest first."""
        return [h.snapshot for h in self._held if h.is_verified and (before is None or h.ordinal < before)]

    def rewound(self, to: Snapshot) -> None:
        """Drop snapshots after this one, to which the run was rolled back."""
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
        """Drop verified snapshots for a new one; false where unverified ones or the memory leave no room."""
        slots = self._slots(max(_size(batch.trainer, batch.module), 1))
        if slots < MIN_SLOTS:
            self._give_up(batch)
            return False
        while len(self._held) >= slots and (index := self._dispensable(batch.at.ordinal)) is not None:
            del self._held[index]
        return len(self._held) < slots

    def _slots(self, size: int) -> int:
        """Number of snapshots of this size in bytes; also sets the near cadence."""
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
        """Index of the snapshot to drop: the second oldest, unless the oldest is too old."""
        verified = [i for i, h in enumerate(self._held) if h.is_verified]
        if len(verified) < MIN_SLOTS:
            return None
        too_old = ordinal - self._held[verified[0]].ordinal > MAX_AGE * max([*self._cadences(), self.every])
        return verified[0] if too_old or len(verified) == MIN_SLOTS else verified[1]

    def _give_up(self, batch: TrainingBatch) -> None:
        need = MIN_SLOTS * _size(batch.trainer, batch.module) // MB + 1
        self._held = []
        self.unavailable = f"two snapshots of model and optimizer take {need} MB, and memory_mb is {self.memory_mb}."
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
            own=copy_attributes(module),
            gradients=None if module.automatic_optimization else state_copy.copy_gradients(module, to_host=to_host),
        )
        for name, flag in _finite_flags(trainer, module).items():
            self.flight.recorder.put(name, flag)
        self._held.append(_Held(snapshot, self._is_first))
        self._last, self._is_first = batch.at.ordinal, False
        self._note_left_out(snapshot)

    def _note_left_out(self, snapshot: Snapshot) -> None:
        left_out = snapshot.own.left_out if snapshot.own is not None else ()
        if left_out and not self._has_noted:
            self._has_noted = True
            names = ", ".join([*left_out[:3], "…"] if left_out[3:] else left_out)
            self.flight.store.note(
                f"Snapshots leave out {names}: too large, or impossible to copy. "
                "If the loss depends on it, a replay gives another loss."
            )

    def _stands(self, held: _Held, arrival: Arrival, *, healthy: bool) -> bool:
        """Whether an unverified snapshot stays valid after this batch; marks it once verified."""
        age = arrival.row.at.ordinal - held.ordinal
        if age < 0:
            return True
        if age == 0:
            held.is_finite = _is_finite(arrival.row.values)
        held.is_verified = healthy and held.is_finite and age >= (0 if held.is_first else CONFIRMING_BATCHES)
        return healthy and held.is_finite


def near_cadence(slots: int, reach: int) -> int:
    """Batches between two near snapshots, so that all but an unverified and the oldest one reach back far enough."""
    return min(max(-(-reach // max(slots - 2, 1)), MIN_NEAR_CADENCE), MAX_NEAR_CADENCE)


def refuses_snapshots(trainer: Trainer) -> str | None:
    """Why this strategy's state cannot be restored in memory, as a sentence; `None` where it can.

    Sharded strategies (FSDP, FSDP2 as ModelParallel, DeepSpeed, XLA FSDP) load from disk only: their in-memory loading
    silently does nothing.
    """
    lineage = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    sharded = next((name for name in lineage if any(s in name for s in ("FSDP", "DeepSpeed", "ModelParallel"))), None)
    if sharded is None:
        return None
    return f"{sharded} shards weights and optimizer over the ranks and can restore them from a checkpoint on disk only."


def _inside(ordinal: int, episode: Episode) -> bool:
    return episode.onset.ordinal <= ordinal and (episode.end is None or ordinal <= episode.end.ordinal)


def _live_tensors(trainer: Trainer, module: LightningModule) -> list[Tensor]:
    states = [dict(o.state) for o in trainer.optimizers]
    return [*module.parameters(), *module.buffers(), *state_copy.tensors_in(*(list(s.values()) for s in states))]


def _size(trainer: Trainer, module: LightningModule) -> int:
    """Bytes of a snapshot, by the shapes."""
    return sum(t.numel() * t.element_size() for t in _live_tensors(trainer, module))


def _finite_flags(trainer: Trainer, module: LightningModule) -> dict[str, Tensor]:
    """One flag per device, float32 of shape `()`, 1 without NaN and without Inf outside of buffers; not read here.

    A buffer can hold Inf by design, such as an attention mask.
    """
    by_design = {id(buffer) for buffer in module.buffers()}
    groups: dict[tuple[torch.device, torch.dtype, bool], list[Tensor]] = {}
    for tensor in _live_tensors(trainer, module):
        if (tensor.is_floating_point() or tensor.is_complex()) and tensor.numel():
            live = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
            groups.setdefault((live.device, live.dtype, id(tensor) in by_design), []).append(live)
    sound: dict[torch.device, list[Tensor]] = {}
    for (device, _, may_be_inf), members in groups.items():
        markers = _finite_markers(device, members)
        sound.setdefault(device, []).append((~markers.isnan() if may_be_inf else markers.isfinite()).all())
    flags = {device: torch.stack(all_).all().float() for device, all_ in sound.items()}
    home = module.device if module.device in flags else next(iter(flags), None)
    return {FLAG if device == home else f"{FLAG}/{device}": flag for device, flag in flags.items()}


def _finite_markers(device: torch.device, members: list[Tensor]) -> Tensor:
    """One number per tensor that is finite exactly if all of it is, shape `(len(members),)`.

    On the GPU the largest magnitudes, in one kernel. On the CPU they take twenty times as long as a sum, which
    overflows only for useless weights.
    """
    if device.type == "cuda":
        return torch.stack(torch._foreach_norm(members, math.inf))  # as torch's own clipping does
    wide = torch.float64 if members[0].dtype == torch.float64 else torch.float32
    return torch.stack([member.sum(dtype=wide) for member in members])


def _is_finite(values: Mapping[str, float]) -> bool:
    return all(value == 1.0 for name, value in values.items() if name == FLAG or name.startswith(f"{FLAG}/"))
