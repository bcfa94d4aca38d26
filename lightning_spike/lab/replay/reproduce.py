"""Train again from a snapshot to the onset.

The same batches, random states and learning rates, so that every state on the way is at hand.
"""

import dataclasses
import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final

from torch import Tensor
from torch.optim import LBFGS

from lightning_spike.errors import CannotReplay
from lightning_spike.lab.replay.update import Update, UpdateOutcome, make_update, updates_of
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.update_settings import Settings
from lightning_spike.sandbox.isolation import Sandbox, loss_of
from lightning_spike.sandbox.state import TrainState

MAX_EQUAL_DIFFERENCE: Final = 1e-3
"""Relative difference of two equal losses: non-deterministic kernels and compiled code move a loss by less, a spike by
more; engineering choice. On the CPU the difference is 0."""
LEGS: Final = 12
"""Updates before the onset whose states are kept: among them the one that did the damage is looked for (science.md
2b.2, K = 12)."""
MAX_STATE_BYTES: Final = 1 << 30
"""Memory for these states; a larger model keeps fewer of them, at least two. An engineering choice."""
MIN_LEGS: Final = 2
"""States of updates that are kept whatever their size; engineering choice."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReplayedUpdate:
    """One update of the replay, and the state before it."""

    before: TrainState
    update: Update
    made: UpdateOutcome


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Reproduction:
    """The replay of a run: its states, updates and end."""

    updates_replayed: tuple[ReplayedUpdate, ...]
    """The last updates, oldest first."""
    end: TrainState
    """Before the batch `reached`."""
    reached: int
    """Ordinal of the onset, or of the first batch of an earlier update whose gradients were not finite."""
    steps: int
    """Batches that were trained on again."""
    differs_at: int | None
    """Ordinal of the first batch, `reached` included, whose loss came out differently from the recorded one; `None`
    where all agree."""
    replayed: float
    """The loss of the batch `reached` in the replay."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """Parameters and buffers as they were before the batch `reached`, as `load_module` takes them."""
        return self.end.weights


def reproduce(
    sandbox: Sandbox,
    start: TrainState,
    entries: Sequence[RingEntry],
    settings: Mapping[int, Sequence[Settings]],
    recorded: Mapping[int, float],
) -> Reproduction:
    """Train from a state up to the last of the entries, and evaluate that one.

    With several ranks (DDP) every rank must call it at once, with its own batches and the same ordinals; losses are
    means over the ranks. See `make_update` for how. What changed the state of the run from outside (a callback, a fault
    of the machine) is not in it, and shows as a difference.

    Args:
        sandbox: From `isolated(..., with_optimizers=True)`; left with the weights of the end in it.
        start: Where to begin.
        entries: Every batch from that state's on, in order, none left out; the last is the onset.
        settings: Of the optimizer steps, by the ordinal of the batch they were made in; see `settings_of`.
        recorded: The training losses by ordinal; with several ranks the means over them.

    Raises:
        CannotReplay: Settings that are not known, or a batch that is not held any more or was changed in place.
    """
    _check_together(sandbox, _why_not(start, entries))
    start.load(sandbox)
    updates_replayed: deque[ReplayedUpdate] = deque(maxlen=_legs_to_keep(start))
    differs_at: int | None = None
    by_hand = not sandbox.module.automatic_optimization
    for update in updates_of(entries, settings, by_hand=by_hand):
        leg = ReplayedUpdate(
            before=TrainState.take(sandbox, update.entries[0].at), update=update, made=make_update(sandbox, update)
        )
        differs_at = _first_difference(leg, recorded) if differs_at is None else differs_at
        if leg.made.spoilt_at is not None:
            return _ended(
                updates_replayed, leg.before, update.entries[leg.made.spoilt_at], start, differs_at, leg.made.losses[-1]
            )
        updates_replayed.append(leg)
    end, loss = start, math.nan
    for entry in entries[-1:] if by_hand else _open_window(entries):
        end, loss = TrainState.take(sandbox, entry.at), _loss(sandbox, entry, settings)
        if differs_at is None and not is_same(loss, recorded.get(entry.at.ordinal)):
            differs_at = entry.at.ordinal
    if _updates_first(sandbox):
        end.load(sandbox)
    return _ended(updates_replayed, end, entries[-1], start, differs_at, loss)


def go_on(
    sandbox: Sandbox,
    known: Reproduction,
    entries: Sequence[RingEntry],
    settings: Mapping[int, Sequence[Settings]],
    recorded: Mapping[int, float],
) -> Reproduction | None:
    """Take a replay further, from its last update on; `None` where it has none, or went another way than the training.

    As `reproduce`, with the same start.

    Args:
        sandbox: As there.
        known: What is there of it, up to an earlier batch.
        entries: As there, to a later one.
        settings: As there.
        recorded: As there.
    """
    if not known.updates_replayed or known.differs_at is not None:
        return None
    start = known.updates_replayed[-1].before
    rest = [entry for entry in entries if entry.at.ordinal >= start.at.ordinal]
    found = reproduce(sandbox, start, rest, settings, recorded)
    updates_replayed = (*known.updates_replayed[:-1], *found.updates_replayed)[-_legs_to_keep(start) :]
    return dataclasses.replace(
        found, updates_replayed=updates_replayed, steps=known.steps + found.reached - known.reached
    )


def is_same(replayed: float, recorded: float | None) -> bool:
    """Whether two losses are the same but for the rounding of kernels; nothing recorded is the same as anything."""
    if recorded is None:
        return True
    if not (math.isfinite(replayed) and math.isfinite(recorded)):
        return math.isfinite(replayed) == math.isfinite(recorded)
    return math.isclose(replayed, recorded, rel_tol=MAX_EQUAL_DIFFERENCE, abs_tol=1e-9)


def _ended(
    updates_replayed: Sequence[ReplayedUpdate],
    end: TrainState,
    reached: RingEntry,
    start: TrainState,
    differs_at: int | None,
    replayed: float,
) -> Reproduction:
    ordinal = reached.at.ordinal
    return Reproduction(
        updates_replayed=tuple(updates_replayed),
        end=end,
        reached=ordinal,
        steps=ordinal - start.at.ordinal,
        differs_at=differs_at,
        replayed=replayed,
    )


def _why_not(start: TrainState, entries: Sequence[RingEntry]) -> str | None:
    wanted = range(start.at.ordinal, start.at.ordinal + len(entries))
    if not entries or [entry.at.ordinal for entry in entries] != list(wanted):
        return "not all batches since the snapshot are still held"
    if any(entry.mutated for entry in entries):
        return "training_step changes the batch in place: what the batches were is not known any more"
    return None


def _check_together(sandbox: Sandbox, why_not: str | None) -> None:
    """A rank that cannot takes the others with it: they would wait for its gradients for ever."""
    if sandbox.ranks.any("what keeps from a replay", mine=why_not is not None):
        raise CannotReplay(why_not or "another rank cannot run the moment again")


def _legs_to_keep(state: TrainState) -> int:
    return max(MIN_LEGS, min(LEGS, MAX_STATE_BYTES // max(state.nbytes, 1)))


def _open_window(entries: Sequence[RingEntry]) -> list[RingEntry]:
    """The last batch, and those before it whose gradients go into the same update.

    All are computed with the same weights.
    """
    return [entry for entry in entries if entry.at.step == entries[-1].at.step]


def _loss(sandbox: Sandbox, entry: RingEntry, settings: Mapping[int, Sequence[Settings]]) -> float:
    """The loss of one batch as the training had it.

    Under manual optimisation and LBFGS that is one from after its own first updates.
    """
    if _updates_first(sandbox):
        made = make_update(sandbox, Update(entries=(entry,), settings=tuple(settings.get(entry.at.ordinal, ()))))
        return made.losses[0]
    loss = loss_of(sandbox.loss_as_trained(entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at))
    if loss is None:
        msg = f"training_step returned no loss at step {entry.at.step}"
        raise CannotReplay(msg)
    accumulated = sandbox.trainer.accumulate_grad_batches  # Lightning divides by it, and the record is multiplied back
    return float(sandbox.ranks.mean("the last loss", [float(loss.detach() / accumulated * accumulated)])[0])


def _updates_first(sandbox: Sandbox) -> bool:
    return not sandbox.module.automatic_optimization or isinstance(sandbox.trainer.optimizers[0], LBFGS)


def _first_difference(leg: ReplayedUpdate, recorded: Mapping[int, float]) -> int | None:
    pairs = zip(leg.update.entries, leg.made.losses, strict=True)
    return next((e.at.ordinal for e, loss in pairs if not is_same(loss, recorded.get(e.at.ordinal))), None)
