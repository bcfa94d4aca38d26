"""All measurements of one episode that fit its case, each for itself: one that fails takes no other with it."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from lightning_spike.lab.measure.loss_scale import LossScaleMeasures, measure_loss_scale
from lightning_spike.lab.measure.modes import ModeMeasures, measure_modes
from lightning_spike.lab.measure.modules import ModuleMeasures, measure_modules
from lightning_spike.lab.measure.precision import PrecisionMeasures, measure_precision
from lightning_spike.lab.measure.samples import SampleMeasures, measure_samples
from lightning_spike.lab.measure.updates import UpdateMeasures, measure_update
from lightning_spike.lab.replay.reproduce import Reproduction
from lightning_spike.lab.scene import Scene
from lightning_spike.sandbox.isolation import Sandbox

Measures = ModuleMeasures | UpdateMeasures | PrecisionMeasures | ModeMeasures | LossScaleMeasures | SampleMeasures


@dataclasses.dataclass(frozen=True, slots=True)
class _Way:
    """One measurement."""

    what: str
    question: str
    """In words, where it is left out."""
    gradients: int
    """Forward and backward passes that it takes at most."""
    run: Callable[[], Measures | None]


def measure(
    scene: Scene, sandbox: Sandbox, replay: Reproduction, *, located: int | None, blames_weights: bool
) -> list[dict[str, Any]]:
    """Measure in the re-run what training could not bear to; 2 to 9 passes, as far as they fit into the sandbox's allowance.

    The module measurements cost two forward and backward passes, those of the update one to three forward passes a batch of it, the modes four forward passes, the
    precision two (under autocast only).

    Args:
        scene: The episode.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        replay: The re-run, up to the onset.
        located: Ordinal of the update that did the damage; the last one before the onset where none was found.
        blames_weights: The weights have a part in it: update and modes are measured.

    Returns:
        One for each measurement: `"what"` (`"modules"`, `"updates"`, `"precision"`, `"modes"` or `"loss_scale"`), `"text"`, and its numbers. Of one that failed the text
        says why, and there are no numbers.
    """
    ordinary, old, new = scene.ordinary()[0], scene.snapshot.model, replay.weights
    place = _place(replay, located) if blames_weights else None
    ways = []
    if place is not None:  # it takes least and tells most
        ways.append(_Way("updates", "how long the update was", 1, lambda: measure_update(sandbox, replay, place)))
    ways += [
        _Way("modules", "activations and gradients by module", 2, lambda: measure_modules(sandbox, scene.spike, ordinary, old=old, new=new)),
        _Way("precision", "the loss in float32", 2 if "mixed" in str(scene.trainer.precision) else 0, lambda: measure_precision(sandbox, new, scene.spike)),
        _Way("loss_scale", "the loss scale", 0, lambda: _loss_scale(scene, sandbox)),
    ]  # fmt: skip
    if blames_weights:
        ways.append(_Way("modes", "train mode against eval mode", 2, lambda: measure_modes(sandbox, ordinary, old=old, new=new)))  # fmt: skip
    return list(_told(sandbox, ways))


def measure_single_samples(scene: Scene, sandbox: Sandbox) -> list[dict[str, Any]]:
    """Measure the samples of the struck batch one by one, as `measure` does the rest; two passes, which may be known by now, and five of single samples."""
    ordinary, old = scene.ordinary()[0], scene.snapshot.model
    way = _Way(
        "samples",
        "losses and gradients of single samples",
        5,
        lambda: measure_samples(sandbox, scene.spike, ordinary, old),
    )
    return list(_told(sandbox, [way]))


def _told(sandbox: Sandbox, ways: list[_Way]) -> Iterator[dict[str, Any]]:
    for way in ways:
        if way.gradients and not sandbox.affords(way.question, gradients=way.gradients):
            continue
        try:
            with sandbox.ranks.stage():
                found = way.run()
        except Exception as error:  # noqa: BLE001 - the user's code, run in a mode that it was not made for; the other answers stand
            yield {"what": way.what, "text": f"It could not be measured: {type(error).__name__}: {error}"}
            continue
        if found is not None:
            yield {"what": way.what} | dataclasses.asdict(found)


def _place(replay: Reproduction, located: int | None) -> int | None:
    places = [k for k, leg in enumerate(replay.updates_replayed) if located is None or leg.update.ordinal == located]
    return places[-1] if places else None


def _loss_scale(scene: Scene, sandbox: Sandbox) -> LossScaleMeasures | None:
    sandbox.rewind()
    return measure_loss_scale(sandbox.trainer, scene.snapshot.scaler)
