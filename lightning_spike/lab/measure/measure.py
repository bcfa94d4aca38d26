"""Takes the measurements of one episode; one that fails does not stop the others."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from lightning_spike.experiments import (
    Experiments,
    FailedMeasurement,
    LossScaleMeasurement,
    ModeMeasurement,
    PrecisionMeasurement,
)
from lightning_spike.lab.measure.modules import measure_modules
from lightning_spike.lab.measure.samples import measure_samples
from lightning_spike.lab.measure.updates import measure_update
from lightning_spike.lab.replay.reproduce import Reproduction
from lightning_spike.lab.scene import Scene
from lightning_spike.record.batch_ring import RingEntry
from lightning_spike.record.state_copy import copy_scaler, load_module
from lightning_spike.sandbox.isolation import Sandbox, loss_of


@dataclasses.dataclass(frozen=True, slots=True)
class _Measurement:
    """One measurement."""

    field: str
    """Its field of `Experiments`."""
    question: str
    """Its name if it is left out."""
    gradients: int
    """Maximum number of forward and backward passes."""
    run: Callable[[], object]
    """Returns the record, or `None`."""


def measure(
    scene: Scene, sandbox: Sandbox, replay: Reproduction, *, located: int | None, blames_weights: bool
) -> Experiments:
    """Takes measurements that are too expensive in training, 2 to 9 passes within the sandbox's allowance.

    Modules take two forward and backward passes, the update one to three forward passes per batch, the modes four
    forward passes, the precision two (under autocast only).

    Args:
        scene: The episode.
        sandbox: Inside `isolated(..., with_optimizers=True)`.
        replay: The replay, up to the onset.
        located: Ordinal of the damaging update; `None` for the last one before the onset.
        blames_weights: Whether the weights are at fault, so that update and modes are measured.

    Returns:
        The measurements and failures.
    """
    ordinary, old, new, spike = scene.ordinary()[0], scene.snapshot.model, replay.weights, scene.spike
    place = _place(replay, located) if blames_weights else None
    low_precision = 2 if "mixed" in str(scene.trainer.precision) else 0
    modules = functools.partial(measure_modules, sandbox, spike, ordinary, old=old, new=new)
    chosen = [
        _Measurement("modules", "activations and gradients by module", 2, modules),
        _Measurement("precision", "the loss in float32", low_precision, lambda: measure_precision(sandbox, new, spike)),
        _Measurement("loss_scale", "the loss scale", 0, lambda: _loss_scale(scene, sandbox)),
    ]
    if place is not None:  # the cheapest and most informative one
        update = _Measurement("update", "how long the update was", 1, lambda: measure_update(sandbox, replay, place))
        chosen = [update, *chosen]
    if blames_weights:
        modes = functools.partial(measure_modes, sandbox, ordinary, old=old, new=new)
        chosen.append(_Measurement("modes", "train mode against eval mode", 2, modes))
    return _run(scene, sandbox, chosen)


def measure_single_samples(scene: Scene, sandbox: Sandbox) -> Experiments:
    """Measures the samples of the target batch one by one, in about seven passes."""
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
        except Exception as error:  # noqa: BLE001 - the user's code; the other measurements remain
            failed.append(FailedMeasurement(measurement=one.field, error=f"{type(error).__name__}: {error}"))
    empty = Experiments(episode=scene.episode.id, failed=tuple(failed))
    return dataclasses.replace(empty, **found)


def _place(replay: Reproduction, located: int | None) -> int | None:
    places = [k for k, leg in enumerate(replay.updates_replayed) if located is None or leg.update.ordinal == located]
    return places[-1] if places else None


def _loss_scale(scene: Scene, sandbox: Sandbox) -> LossScaleMeasurement | None:
    sandbox.rewind()
    return measure_loss_scale(sandbox.trainer, scene.snapshot.scaler)


def measure_precision(sandbox: Sandbox, weights: Mapping[str, Tensor], entry: RingEntry) -> PrecisionMeasurement | None:
    """The batch's loss with and without autocast, in two passes; `None` without autocast or without a loss.

    Args:
        sandbox: Inside `isolated`.
        weights: Weights at the onset.
        entry: The onset's batch.
    """
    precision = str(sandbox.trainer.precision)
    if "mixed" not in precision:
        return None
    low, full = (_loss(sandbox, weights, entry, in_float32=in_float32) for in_float32 in (False, True))
    if low is None or full is None:
        return None
    return PrecisionMeasurement(precision=precision, low=low, float32=full)


def measure_loss_scale(trainer: Trainer, saved: Mapping[str, Tensor | None] | None) -> LossScaleMeasurement | None:
    """The gradient scaler's factor in the snapshot and now; `None` without a scaler or before its first use.

    It takes no pass and reads two numbers from the device.

    Args:
        trainer: The trainer, with its scaler as it was when the isolation began.
        saved: The snapshot's scaler, as `copy_scaler` gives it.
    """
    before, now = _scale(saved), _scale(copy_scaler(trainer))
    return None if before is None or now is None else LossScaleMeasurement(before=before, now=now)


def _scale(saved: Mapping[str, Tensor | None] | None) -> float | None:
    scale = None if saved is None else saved.get("scale")
    return None if scale is None else float(scale)


def measure_modes(
    sandbox: Sandbox, entry: RingEntry, *, old: Mapping[str, Tensor], new: Mapping[str, Tensor]
) -> ModeMeasurement | None:
    """A control batch's loss in train and eval mode, in up to four passes; `None` for a step without a loss.

    Args:
        sandbox: Inside `isolated`.
        entry: A control batch.
        old: Weights and buffers of the snapshot.
        new: Weights and buffers at the onset.
    """
    now = [_loss(sandbox, new, entry, in_eval=in_eval) for in_eval in (False, True)]
    differ = now[0] != now[1]
    then = [_loss(sandbox, old, entry, in_eval=in_eval) for in_eval in (False, True)] if differ else [None, None]
    if now[0] is None or now[1] is None:
        return None
    sandbox.rewind()
    return ModeMeasurement(train=now[0], eval=now[1], usual_train=then[0], usual_eval=then[1], frozen=_frozen(sandbox))


def _loss(
    sandbox: Sandbox,
    weights: Mapping[str, Tensor],
    entry: RingEntry,
    *,
    in_float32: bool = False,
    in_eval: bool = False,
) -> float | None:
    sandbox.rewind()
    load_module(sandbox.module, weights)
    if in_eval:
        sandbox.module.eval()
    loss = loss_of(sandbox.step(entry.batch, entry.at.batch_idx, random=entry.rng, at=entry.at, in_float32=in_float32))
    return None if loss is None else float(sandbox.ranks.mean("a loss", [float(loss.detach())])[0])


def _frozen(sandbox: Sandbox) -> tuple[str, ...]:
    resting = [name for name, part in sandbox.module.named_modules() if not part.training]
    outermost = [n for n in resting if not any(o != n and (not o or n.startswith(f"{o}.")) for o in resting)]
    return tuple(outermost)
