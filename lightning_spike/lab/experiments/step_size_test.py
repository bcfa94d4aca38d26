"""Where no moment can be gone back to: are the steps that the run makes now too long?"""

from collections.abc import Mapping, Sequence
from typing import Final

from lightning.pytorch import LightningModule, Trainer

from lightning_spike.errors import CannotReplay
from lightning_spike.lab.experiments.step_size import CHRONIC, EDGE, Consistency, kept_promise, summed_up
from lightning_spike.lab.replay.reproduce import ReplayedUpdate
from lightning_spike.lab.replay.update import make_update, updates_of
from lightning_spike.ranks.rank_coordination import ALONE, Ranks
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.update_settings import Settings
from lightning_spike.sandbox.isolation import isolated
from lightning_spike.sandbox.state import TrainState

UPDATES: Final = 24
"""Updates that are looked at; twice as many as the re-run of a moment keeps, for there is nothing else to go by."""
STEP_SIZE_TEST_STEPS: Final = 40
"""Training steps' worth of time that it takes: the updates, a forward pass after each, and copies of the state (`python benchmarks/lab.py --fault "rate too high all along"`, the column cost)."""

HALF: Final = 0.5
"""Of what the gradients promised: a healthy run's updates keep more."""
NOTHING: Final = 1e-5
"""Share of the loss that a gradient must promise for what became of it to be more than rounding."""
OVERSHOT: Final = 0.2
"""Share of overshooting updates that is too many: ten times that of worsened ones in a healthy run (`consistency.HEALTHY`)."""


def are_too_long(steps: Consistency) -> bool:
    """Whether steps are too long for the loss surface, where there is trouble and nothing else is known of it.

    Too many updates are worse than none, and that is not momentum alone, which carries an update up the gradient of its own batch now and then in a healthy run too: of
    what the gradients promised too little is kept, or too many went down their gradient and overshot.
    """
    return steps.p_chronic >= CHRONIC and (steps.rho < EDGE or steps.overshot >= OVERSHOT)


def break_their_promise(steps: Consistency) -> bool:
    """Whether steps are so much too long that it is told of a run that shows no trouble: a net that trains well at a brisk rate must not be."""
    return steps.p_chronic >= CHRONIC and steps.rho < HALF


def step_size_test(
    trainer: Trainer,
    module: LightningModule,
    entries: Sequence[RingEntry],
    settings: Mapping[int, Sequence[Settings]],
    *,
    ranks: Ranks = ALONE,
) -> Consistency | None:
    """Train the newest batches once more from the present weights on, and see whether each step keeps the promise of its gradient (science.md 2.3).

    No snapshot is needed, no loss is compared with a recorded one, and nothing is explained: it tells whether steps of this size, with the optimizer as it stands, suit the loss
    surface that the run is on. Leaves no trace; blocks. With several ranks each must call it with its own batches of the same ordinals.

    Args:
        trainer: Between two batches, with its optimizers set up.
        module: What it trains.
        entries: Batches in order, none left out, the newest last; the newest itself only ends the last update but one.
        settings: Of the optimizer steps, by the ordinal of the batch they were made in.
        ranks: Those that look together.

    Returns:
        `None` where too few updates can be made again or promise anything at all, or a gradient of one is not finite.

    Raises:
        CannotReplay: `training_step` cannot be run again, or the settings of the updates are not known.
        Exception: What the module's own code raises. The training is untouched all the same.
    """
    if any(entry.mutated for entry in entries):
        msg = "training_step changes the batch in place: what the batches were is not known any more"
        raise CannotReplay(msg)
    updates = updates_of(entries, settings, by_hand=not module.automatic_optimization)[-UPDATES:]
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
            change, promise = kept_promise(sandbox, ReplayedUpdate(before=before, update=update, made=made), after)
            if abs(promise) > NOTHING * abs(made.losses[0]):
                kept.append((change, promise))
    return summed_up(kept)
