"""All measurements of one episode that fit its case, each alone: one that fails takes no other with it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from lightning_spike.experiments import Experiments, FailedMeasurement, LossScaleMeasurement
from lightning_spike.lab.measure.modes import measure_modes
from lightning_spike.lab.measure.modules import measure_modules
from lightning_spike.lab.measure.precision import measure_loss_scale, measure_precision
from lightning_spike.lab.measure.samples import measure_samples
from lightning_spike.lab.measure.updates import measure_update
from lightning_spike.lab.replay.reproduce import Reproduction
from lightning_spike.lab.scene import Scene
from lightning_spike.sandbox.isolation import Sandbox


@dataclasses.dataclass(frozen=True, slots=True)
class _Measurement:
    """One measurement."""

    field: str
    """Of `Experiments`."""
    question: str
    """In words, where it is left out."""
    gradients: int
    """Forward and backward passes that it takes at most."""
    run: Callable[[], object]
    """Gives the record, or `None`."""


def measure(
    scene: Scene, sandbox: Sandbox, replay: Reproduction, *, located: int | None, blames_weights: bool
) -> Experiments:
    """Measure in the replay what is too expensive in training; 2 to 9 passes, as far as they fit into the sandbox's allowance.

    The module measurements cost two forward and backward passes, those of the update one to three forward passes a
    batch of it, the modes four forward passes, the precision two (under autocast only).

    Args:
        scene: The episode.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        replay: The replay, up to the onset.
        located: Ordinal of the update that did the damage; the last one before the onset where none was found.
        blames_weights: The weights have a part in it: update and modes are measured.

    Returns:
        What was measured, and what failed.
    """
    ordinary, old, new, spike = scene.ordinary()[0], scene.snapshot.model, replay.weights, scene.spike
    place = _place(replay, located) if blames_weights else None
    low_precision = 2 if "mixed" in str(scene.trainer.precision) else 0
    chosen = [
        _Measurement("modules", "activations and gradients by module", 2, lambda: measure_modules(sandbox, spike, ordinary, old=old, new=new)),
        _Measurement("precision", "the loss in float32", low_precision, lambda: measure_precision(sandbox, new, spike)),
        _Measurement("loss_scale", "the loss scale", 0, lambda: _loss_scale(scene, sandbox)),
    ]  # fmt: skip
    if place is not None:  # it takes least and says most
        update = _Measurement("update", "how long the update was", 1, lambda: measure_update(sandbox, replay, place))
        chosen = [update, *chosen]
    if blames_weights:
        chosen.append(_Measurement("modes", "train mode against eval mode", 2, lambda: measure_modes(sandbox, ordinary, old=old, new=new)))  # fmt: skip
    return _run(scene, sandbox, chosen)


def measure_single_samples(scene: Scene, sandbox: Sandbox) -> Experiments:
    """Measure the samples of the batch in question one by one.

    Two passes, which may be known by now, and five of single samples.
    """
    ordinary, old = scene.ordinary()[0], scene.snapshot.model
    question = "losses and gradients of single samples"
    one = _Measurement("samples", question, 5, lambda: measure_samples(sandbox, scene.spike, ordinary, old))
    return _run(scene, sandbox, [one])


def _run(scene: Scene, sandbox: Sandbox, chosen: Sequence[_Measurement]) -> Experiments:
    found: dict[str, Any] = {}
    failed: list[FailedMeasurement] = []
    for one in chosen:
        if one.gradients and not sandbox.affords(one.question, gradients=one.gradients):
            continue
        try:
            with sandbox.ranks.stage():
                found[one.field] = one.run()
        except Exception as error:  # noqa: BLE001 - the user's code, run in a mode that it was not made for; the others stand
            failed.append(FailedMeasurement(measurement=one.field, error=f"{type(error).__name__}: {error}"))
    empty = Experiments(episode=scene.episode.id, failed=tuple(failed))
    return dataclasses.replace(empty, **found)


def _place(replay: Reproduction, located: int | None) -> int | None:
    places = [k for k, leg in enumerate(replay.updates_replayed) if located is None or leg.update.ordinal == located]
    return places[-1] if places else None


def _loss_scale(scene: Scene, sandbox: Sandbox) -> LossScaleMeasurement | None:
    sandbox.rewind()
    return measure_loss_scale(sandbox.trainer, scene.snapshot.scaler)
