"""All measurements of one episode that fit its case, each for itself: one that fails takes no other with it."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from lightning_spike.lab.isolation import Bench
from lightning_spike.lab.measure.loss_scale import LossScaleMeasures, measure_loss_scale
from lightning_spike.lab.measure.modes import ModeMeasures, measure_modes
from lightning_spike.lab.measure.modules import ModuleMeasures, measure_modules
from lightning_spike.lab.measure.precision import PrecisionMeasures, measure_precision
from lightning_spike.lab.measure.samples import SampleMeasures, measure_samples
from lightning_spike.lab.measure.updates import UpdateMeasures, measure_update
from lightning_spike.lab.reproduce import Reproduction
from lightning_spike.lab.scene import Scene

__all__ = ["measure"]

Measures = ModuleMeasures | UpdateMeasures | PrecisionMeasures | ModeMeasures | LossScaleMeasures | SampleMeasures


def measure(
    scene: Scene, bench: Bench, again: Reproduction, *, located: int | None, blames_batch: bool, blames_weights: bool
) -> list[dict[str, Any]]:
    """Measure in the re-run what training could not bear to; 3 to 16 passes, some of single samples.

    The module measurements cost two forward and backward passes, those of the update one forward pass a batch of it, the modes four forward passes, the
    precision two (under autocast only), the samples two passes and five of single samples.

    Args:
        scene: The episode.
        bench: Inside `isolated(..., with_optimizers=True)`.
        again: The re-run, up to the onset.
        located: Ordinal of the update that did the damage; the last one before the onset where none was found.
        blames_batch: The batch has a part in the jump: its samples are measured.
        blames_weights: The weights have a part in it: update and modes are measured.

    Returns:
        One for each measurement: `"what"` (`"modules"`, `"updates"`, `"precision"`, `"modes"`, `"loss_scale"` or `"samples"`), `"text"`, and its numbers. Of one that failed the text
        says why, and there are no numbers.
    """
    ordinary, old, new = scene.ordinary()[0], scene.snapshot.model, again.weights
    ways: list[tuple[str, Callable[[], Measures | None]]] = [
        ("modules", lambda: measure_modules(bench, scene.spike, ordinary, old=old, new=new)),
        ("precision", lambda: measure_precision(bench, new, scene.spike)),
        ("loss_scale", lambda: _loss_scale(scene, bench)),
    ]
    if blames_weights:
        ways.append(("modes", lambda: measure_modes(bench, ordinary, old=old, new=new)))
        place = _place(again, located)
        if place is not None:
            ways.append(("updates", lambda: measure_update(bench, again, place)))
    if blames_batch:
        ways.append(("samples", lambda: measure_samples(bench, scene.spike, ordinary, old)))
    return list(_told(bench, ways))


def _told(bench: Bench, ways: list[tuple[str, Callable[[], Measures | None]]]) -> Iterator[dict[str, Any]]:
    for what, way in ways:
        try:
            with bench.ranks.stage():
                found = way()
        except Exception as error:  # noqa: BLE001 - the user's code, run in a mode that it was not made for; the other answers stand
            yield {"what": what, "text": f"It could not be measured: {type(error).__name__}: {error}"}
            continue
        if found is not None:
            yield {"what": what} | dataclasses.asdict(found)


def _place(again: Reproduction, located: int | None) -> int | None:
    places = [k for k, leg in enumerate(again.legs) if located is None or leg.update.ordinal == located]
    return places[-1] if places else None


def _loss_scale(scene: Scene, bench: Bench) -> LossScaleMeasures | None:
    bench.rewind()
    return measure_loss_scale(bench.trainer, scene.snapshot.scaler)
