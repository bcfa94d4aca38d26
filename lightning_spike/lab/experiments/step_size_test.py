"""Step-size test at the current weights, for episodes that cannot be replayed."""

from collections.abc import Mapping, Sequence
from typing import Final

from lightning.pytorch import LightningModule, Trainer

from lightning_spike.errors import CannotReplay
from lightning_spike.experiments import StepSize
from lightning_spike.lab.experiments.step_size import change_and_promise, summarized
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.lab.replay.update import make_update, updates_of
from lightning_spike.ranks.rank_coordination import SINGLE_RANK, Ranks
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.update_settings import Settings
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.sandbox.state import TrainState

TESTED_UPDATES: Final = 24
"""Tested updates, twice as many as a replay keeps; engineering choice."""
STEP_SIZE_TEST_STEPS: Final = 40
"""Training steps' worth of time that it takes: the updates, a forward pass after each, and copies of the state
(`python benchmarks/lab.py --fault "rate too high all along"`, the column cost)."""

MIN_PREDICTED_DECREASE: Final = 1e-5
"""Share of the loss that a gradient must predict to be above rounding; engineering choice."""


def step_size_test(
    trainer: Trainer,
    module: LightningModule,
    entries: Sequence[RingEntry],
    settings: Mapping[int, Sequence[Settings]],
    *,
    ranks: Ranks = SINGLE_RANK,
) -> StepSize | None:
    """Trains the newest batches again from the current weights and compares steps with gradients (science.md 2.3).

    No snapshot is needed, no loss is compared with a recorded one, and nothing is explained: it tells whether steps of
    this size, with the optimizer as it stands, suit the loss surface that the run is on. Leaves no trace; blocks. With
    several ranks each must call it with its own batches of the same ordinals.

    Args:
        trainer: Between two batches, with its optimizers set up.
        module: What it trains.
        entries: Batches in order, none left out, the newest last; the newest itself only ends the last update but one.
        settings: Of the optimizer steps, by the ordinal of the batch they were made in.
        ranks: The ranks of the test.

    Returns:
        `None` where too few updates can be made again or promise anything at all, or a gradient of one is not finite.

    Raises:
        CannotReplay: `training_step` cannot be run again, or the settings of the updates are not known.
        Exception: What the module's own code raises. The training is untouched all the same.
    """
    if any(entry.mutated for entry in entries):
        msg = "training_step changes the batch in place: what the batches were is not known any more"
        raise CannotReplay(msg)
    updates = updates_of(entries, settings, by_hand=not module.automatic_optimization)[-TESTED_UPDATES:]
    with isolated(trainer, module, with_optimizers=True, ranks=ranks) as sandbox:
        after = TrainState.take(sandbox, entries[-1].at)
        kept: list[tuple[float, float]] = []
        for update in updates:
            before = after
            before.load(sandbox)
            made = make_update(sandbox, update)
            if made.spoilt_at is not None:
                return None
            after = TrainState.take(sandbox, update.entries[-1].at)
            change, promise = change_and_promise(
                sandbox, ReplayedUpdate(before=before, update=update, made=made), after
            )
            if abs(promise) > MIN_PREDICTED_DECREASE * abs(made.losses[0]):
                kept.append((change, promise))
    return summarized(kept, source="present")
