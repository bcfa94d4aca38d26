"""`ActivationMonitor`: activation sizes, dead and saturated units, and modules left in eval mode."""

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
from lightning_spike.callbacks.base import SpikeCallback, counted, first_names
from lightning_spike.detectors.layer_falls import Fall, FlatUnits
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.records import Episode, Finding, Moment
from lightning_spike.signals.activations import (
    Shape,
    activation_size,
    dead_units,
    first_tensor,
    saturated_share,
    shape_of,
)

NOT_RUN: Final = -1.0
"""Vector entry of a module that the batch did not pass through."""
FAST_PATHS: Final = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
"""In eval mode a hook inside these modules disables torch's fast path, which changes rounding."""
FUNCTIONAL: Final[Mapping[object, type[nn.Module]]] = {functional.relu: nn.ReLU, functional.gelu: nn.GELU}
"""Activation functions that torch's Transformer layers call directly, with the module of each."""
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
    """The activation that makes the output or, with `is_before`, takes it next; the module itself if it is one."""
    shape: Shape
    is_before: bool


class ActivationMonitor(SpikeCallback):
    """Records activation statistics of all leaf modules every few batches, and finds modules left in eval mode.

    Each vector has an entry per module, -1 where the batch did not pass through it:

    - `activation_max`: largest absolute value, NaN or Inf where the output has one; `activation_rms`;
    - for ReLU and similar, `activation_zeros`: share of the elements in the flat part; `activation_dead`: share of the
      units (channels or features) that are flat for the whole batch;
    - for sigmoid, tanh and recurrent layers, `activation_saturated`: share of the elements in the flat parts.

    If a module runs several times in a batch, the largest value counts.

    Forward hooks are installed before a measured batch and removed after it. They change nothing and keep nothing
    alive. Compiled modules are skipped, and the report says so; scripted modules, losses and metrics are skipped too.
    Functions called without a module (`torch.relu`) are seen in torch's Transformer layers only.

    Findings:

    - detector `"modes"`, kind `"eval_mode"`, checked at every batch: modules in train mode at the start of training are
      in eval mode and not frozen; `names` (the first eight), `count`, `of`, `matters` (those whose output depends on
      the mode: dropout, batch norm), `text`;
    - detector `"activations"`, kind `"flat"`, once per layer: its units went flat (dead or saturated) between two
      measurements and stayed flat; `names` (the first eight), `count`, `of`, `share` (flat outputs of the worst),
      `before`, `text`.

    Args:
        every: Measure every N batches; 1 for each. The batch after a new episode is measured too.

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
        for signal in SIGNALS:
            values = [seen.get(name, {}).get(signal) for name in self.flight.store.layer_names[signal]]
            if any(value is not None for value in values):
                self.flight.recorder.put_vector(signal, _stacked(values))

    @override
    def judge(self, arrival: Arrival) -> None:
        for row in arrival.layers:
            if row.signal not in FLATNESS:
                continue
            fall = self._flat.setdefault(row.signal, FlatUnits()).push(np.asarray(row.values, np.float64))
            if fall is not None:
                detail = _flat(fall, self.flight.store.layer_names[row.signal], FLATNESS[row.signal])
                self.flight.store.note(Finding(detector="activations", kind="flat", at=row.at, detail=detail))

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
        """Measures a module's output, inside the user's forward pass: an error is kept and raised after it."""
        try:
            if (tensor := first_tensor(output)) is not None:
                self._add(watched.name, _measured(watched, tensor))
        except Exception as error:  # noqa: BLE001 - raised in our own phase, where it switches us off
            self._error = error

    def _add(self, name: str, values: dict[str, Tensor]) -> None:
        known = self._seen.get(name)
        self._seen[name] = values if known is None else {key: torch.maximum(known[key], v) for key, v in values.items()}

    # -- modes -------------------------------------------------------------------------------------------------------

    def _look_at_modes(self, at: Moment) -> None:
        idle = [(name, part) for name, part in self._in_train_mode if not part.training]
        fresh = [(name, part) for name, part in idle if id(part) not in self._reported and not _is_frozen(part)]
        self._reported = {id(part) for _, part in idle}
        if not fresh:
            return
        names = [name or type(part).__name__ for name, part in fresh]
        matters = [name for name, part in fresh if isinstance(part, MODE_MATTERS)]
        total = len(self._in_train_mode)
        text = (
            f"{len(names)} of {total} modules that were in train mode when training began are in eval mode: "
            f"{', '.join(first_names(matters or names))}."
        )
        detail = counted(names, total, text) | {"matters": first_names(matters)}
        self.flight.store.note(Finding(detector="modes", kind="eval_mode", at=at, detail=detail))


SIGNALS: Final = ("activation_max", "activation_rms", "activation_zeros", "activation_dead", "activation_saturated")

FLATNESS: Final[Mapping[str, str]] = {"activation_zeros": "dead", "activation_saturated": "saturated"}


class _Hook:
    """The forward hook of one module; it does nothing while torch compiles."""

    def __init__(self, monitor: ActivationMonitor, watched: _Watched) -> None:
        self._monitor = monitor
        self._watched = watched

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._monitor.take(self._watched, output)


def _watched(module: LightningModule) -> Iterator[_Watched]:
    """The leaf modules outside compiled and scripted modules, losses and metrics."""
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
    """Whether no parameter of the module is trained; a frozen module is in eval mode on purpose."""
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
    text = (
        f"{100.0 * share:.3g} % of the outputs of {names[worst]} are {what} (before: {100.0 * before:.3g} %), "
        "and they have stayed so."
    )
    return counted([names[k] for k in fall.places], len(names), text) | {"share": share, "before": before}


def _stacked(values: list[Tensor | None]) -> Tensor:
    device = next(value.device for value in values if value is not None)
    none = torch.full((), NOT_RUN, device=device)
    return torch.stack([none if value is None else value.to(device, non_blocking=True) for value in values])
