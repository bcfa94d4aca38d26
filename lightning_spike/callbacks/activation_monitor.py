"""`ActivationMonitor`.

How large activations are, how many units are dead or saturated, and whether modules are in train mode.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.loss import _Loss
from torch.utils.hooks import RemovableHandle
from torchmetrics import Metric
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.detectors.layer_falls import Fall, FlatUnits
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.records import Episode, Finding, LayerRow, Moment
from lightning_spike.signals.activations import (
    Shape,
    activation_size,
    dead_units,
    first_tensor,
    saturated_share,
    shape_of,
)

NOT_RUN: Final = -1.0
"""Stands in the vectors for a module that this batch did not pass through."""
NAMED: Final = 8
FAST_PATHS: Final = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""In eval mode these leave their fast path where a part has a hook, which changes rounding."""
FUNCTIONAL: Final[Mapping[object, type[nn.Module]]] = {functional.relu: nn.ReLU, functional.gelu: nn.GELU}
"""What torch's Transformer layers call by themselves, as modules."""
MODE_MATTERS: Final = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout),
    *(nn.RNNBase, nn.RReLU),
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Watched:
    """A module whose output is measured."""

    name: str
    module: nn.Module
    function: nn.Module
    """The activation that the output comes from, or (`is_before`) goes through next; the module itself where that is
    one."""
    shape: Shape
    is_before: bool


class ActivationMonitor(SpikeCallback):
    """Records activation statistics of every module without children, every few batches, and finds modules left in eval mode.

    Vectors, an entry for each module, -1 where the batch did not pass through it: `activation_max` (largest absolute
    value, NaN or Inf where one is in the output), `activation_rms`; over ReLU and its kin `activation_zeros` (share of
    the elements in the flat part) and `activation_dead` (share of the units, channels or features, that are flat for
    the whole batch); over sigmoid, tanh, their kin and recurrent layers `activation_saturated` (share of the elements
    in the flat parts). Where a module runs several times in a batch the largest counts.

    Forward hooks are installed before a sampled batch and removed after it. They change nothing, draw nothing and keep
    nothing alive. Modules under `torch.compile` are passed over, and the report says so; so are scripted ones, losses
    and metrics. Functions called without a module (`torch.relu`) are not seen, but for those in torch's Transformer
    layers.

    Finding: detector `"modes"`, kind `"eval_mode"`: modules that were in train mode when training began are not any
        more when a batch begins, though they are not frozen; looked at
    for every batch. `names` (the first eight), `count`, `of`, `matters` (those of them whose result depends on it:
    dropout, batch norm) and `text`.

    Finding: detector `"activations"`, kind `"flat"`, once for each layer: its units have gone flat (dead or saturated)
        from one look to the next, and were so at the look after, too.
    `names` (the first eight), `count`, `of`, `share` (of the outputs that are flat, in the worst), `before` and `text`.

    Args:
        every: Batches between two that are measured; 1 for each. The batch after an episode has been noticed is
            measured, too.

    Raises:
        ConfigurationError: `every` is not a whole number of at least 1.
    """

    def __init__(self, every: int = 50) -> None:
        self.every = whole_number("ActivationMonitor(every)", every, at_least=1, do="Use 1 for every batch.")
        self._reset()

    def _reset(self) -> None:
        self._watched: list[_Watched] = []
        self._handles: list[RemovableHandle] = []
        self._seen: dict[str, dict[str, Tensor]] = {}
        self._in_train_mode: list[tuple[str, nn.Module]] = []
        self._reported: set[int] = set()
        self._error: Exception | None = None
        self._asked = False
        self._episodes: set[int] = set()
        self._flat: dict[str, FlatUnits] = {}

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._reset()
        self._watched = list(_watched(module))
        self._in_train_mode = [(name, part) for name, part in module.named_modules() if part.training]
        names = self.flight.store.layer_names
        names["activation_max"] = names["activation_rms"] = tuple(w.name for w in self._watched)
        one_sided = tuple(w.name for w in self._watched if w.shape is Shape.ONE_SIDED)
        names["activation_zeros"] = names["activation_dead"] = one_sided
        names["activation_saturated"] = tuple(w.name for w in self._watched if w.shape is Shape.TWO_SIDED)
        if any(map(_is_compiled, module.modules())):
            self.flight.store.note(
                "ActivationMonitor passes over modules under torch.compile: a hook in them is not called."
            )

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        self._look_at_modes(batch.at)
        self._seen = {}
        if batch.at.ordinal % self.every == 0 or self._asked:
            self._asked = False
            self._install(batch.module)

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        self._remove()
        seen, self._seen = self._seen, {}
        if self._error is not None:
            raise self._error
        if not seen:
            return
        for signal, names in self.flight.store.layer_names.items():
            if names and signal in SIGNALS:
                of_signal = [seen.get(name, {}).get(signal) for name in names]
                if any(value is not None for value in of_signal):
                    self.flight.recorder.put_vector(signal, _stacked(of_signal))

    @override
    def judge(self, arrival: Arrival) -> None:
        for row in arrival.layers:
            if row.signal in FLATNESS:
                self._judge_flatness(row)

    @override
    def act(self, batch: TrainingBatch, changed: Sequence[Episode]) -> None:
        known, self._episodes = self._episodes, {episode.id for episode in self.flight.store.episodes}
        self._asked = self._asked or bool(self._episodes - known)

    @override
    def release(self) -> None:
        self._remove()
        self._reset()

    # -- activations -------------------------------------------------------------------------------------------------

    def _install(self, module: LightningModule) -> None:
        idle = {
            id(part)
            for fast in module.modules()
            if isinstance(fast, FAST_PATHS) and not fast.training
            for part in fast.modules()
        }
        try:
            for watched in self._watched:
                if id(watched.module) not in idle:
                    self._handles.append(watched.module.register_forward_hook(_Hook(self, watched)))
        except Exception:
            self._remove()
            raise

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def take(self, watched: _Watched, output: object) -> None:
        """Measure what a module returned. Called inside the user's forward pass, so that nothing may be raised here."""
        try:
            if (tensor := first_tensor(output)) is not None:
                self._add(watched.name, _measured(watched, tensor))
        except Exception as error:  # noqa: BLE001 - raised in our own phase, where it switches us off
            self._error = error

    def _add(self, name: str, values: dict[str, Tensor]) -> None:
        known = self._seen.get(name)
        self._seen[name] = values if known is None else {key: torch.maximum(known[key], v) for key, v in values.items()}

    def _judge_flatness(self, row: LayerRow) -> None:
        fall = self._flat.setdefault(row.signal, FlatUnits()).push(np.asarray(row.values, np.float64))
        if fall is not None:
            detail = _flat(fall, self.flight.store.layer_names[row.signal], FLATNESS[row.signal])
            self.flight.store.note(Finding(detector="activations", kind="flat", at=row.at, detail=detail))

    # -- modes -------------------------------------------------------------------------------------------------------

    def _look_at_modes(self, at: Moment) -> None:
        idle = [(name, part) for name, part in self._in_train_mode if not part.training]
        fresh = [(name, part) for name, part in idle if id(part) not in self._reported and not _is_frozen(part)]
        self._reported = {id(part) for _, part in idle}
        if not fresh:
            return
        names = [name or type(part).__name__ for name, part in fresh]
        matters = [name for name, part in fresh if isinstance(part, MODE_MATTERS)]
        some = ", ".join((matters or names)[:NAMED])
        text = f"{len(names)} of {len(self._in_train_mode)} modules that were in train mode when training began are in eval mode: {some}."
        detail = {
            "names": names[:NAMED],
            "count": len(names),
            "of": len(self._in_train_mode),
            "matters": matters[:NAMED],
            "text": text,
        }
        self.flight.store.note(Finding(detector="modes", kind="eval_mode", at=at, detail=detail))


SIGNALS: Final = frozenset(
    {"activation_max", "activation_rms", "activation_zeros", "activation_dead", "activation_saturated"}
)

FLATNESS: Final[Mapping[str, str]] = {"activation_zeros": "dead", "activation_saturated": "saturated"}


class _Hook:
    """The forward hook of one module; nothing of it remains in a graph that is compiled meanwhile."""

    def __init__(self, monitor: ActivationMonitor, watched: _Watched) -> None:
        self._monitor = monitor
        self._watched = watched

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._monitor.take(self._watched, output)


def _watched(module: LightningModule) -> Iterator[_Watched]:
    """The modules without children that are neither compiled nor scripted, nor losses or metrics, nor inside such ones."""
    if getattr(module, "_compiler_ctx", None) is not None:  # fit(torch.compile(module)): Lightning has unwrapped it
        return
    called = {
        id(layer.linear1): FUNCTIONAL[layer.activation]()
        for layer in module.modules()
        if isinstance(layer, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        and layer.activation in FUNCTIONAL
    }
    for name, part in _open_modules(module, ""):
        if name and next(part.children(), None) is None:
            function = called.get(id(part), part)
            yield _Watched(
                name=name, module=part, function=function, shape=shape_of(function), is_before=function is not part
            )


def _open_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if _is_compiled(module) or isinstance(module, (torch.jit.ScriptModule, _Loss, Metric)):
        return
    yield name, module
    for key, child in module.named_children():
        yield from _open_modules(child, f"{name}.{key}" if name else key)


def _is_compiled(module: nn.Module) -> bool:
    whole = getattr(module, "_compiler_ctx", None) is not None
    return whole or hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _is_frozen(part: nn.Module) -> bool:
    """Whether it has parameters, and none that is trained: a module that is frozen is put into eval mode on purpose."""
    parameters = list(part.parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _measured(watched: _Watched, output: Tensor) -> dict[str, Tensor]:
    size = activation_size(output)
    values = {"activation_max": size.largest, "activation_rms": size.rms}
    if watched.shape is Shape.ONE_SIDED:
        through = watched.function(output.detach()) if watched.is_before else output
        values["activation_zeros"], values["activation_dead"] = dead_units(watched.function, through)
    elif watched.shape is Shape.TWO_SIDED:
        values["activation_saturated"] = saturated_share(watched.function, output)
    return values


def _flat(fall: Fall, names: tuple[str, ...], what: str) -> dict[str, Any]:
    worst = fall.places[0]
    share, before = float(fall.now[worst]), float(fall.before[worst])
    return {
        "names": [names[k] for k in fall.places[:NAMED]],
        "count": len(fall.places),
        "of": len(names),
        "share": share,
        "before": before,
        "text": f"{100.0 * share:.3g} % of the outputs of {names[worst]} are {what} (before: {100.0 * before:.3g} %), and they have stayed so.",
    }


def _stacked(values: list[Tensor | None]) -> Tensor:
    device = next(value.device for value in values if value is not None)
    none = torch.full((), NOT_RUN, device=device)
    return torch.stack([none if value is None else value.to(device, non_blocking=True) for value in values])
