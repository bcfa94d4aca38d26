"""`OptimizerMonitor`: second moments and momentum of the optimizer, and errors of the training step."""

import weakref
from collections.abc import Callable
from typing import Any, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.callbacks.base import SpikeCallback, first_names, names_by_optimizer, plain_name
from lightning_spike.detectors.second_moment import SecondMomentDetector
from lightning_spike.experiments import OutsideWrite
from lightning_spike.record.gradient_checks import GradientChecks
from lightning_spike.record.outside_writes import OutsideWrites
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.record.resume_check import NotRestored, not_restored, summary
from lightning_spike.record.setting_changes import SettingChange, SettingChanges
from lightning_spike.record.update_meter import NO_UPDATE, NOT_MEASURED, UpdateMeter
from lightning_spike.records import Finding, Moment
from lightning_spike.signals.learning_rate import optimizer_names
from lightning_spike.signals.optimizer import Memory, corrected_roots, eps_shares, memories, momentum_cosine, update_rms

RMS: Final = "update_rms"
EPS: Final = "eps_share"
COSINE: Final = "momentum_cosine"
MIN_EMPTY_UPDATES: Final = 2
"""Measured updates in a row without a change of the weights before a finding."""


class OptimizerMonitor(SpikeCallback):
    """Compares the optimizer's state with the gradients every few updates, and finds errors of the training step.

    For Adam's kind and RMSprop: `update_rms`, the highest over the parameters of RMS_t = sqrt(mean(g² / max(v, eps²)))
    (Wortsman et al. 2023) with the gradient that the update used and the second moment from before it, and the vector
    of the same for every parameter; `eps_share`, the share of all coordinates whose sqrt(v) is below 10 eps, and the
    vector.
    For any optimizer with momentum: `momentum_cosine`, the cosine between the gradient and the momentum before the
    update. A parameter with more than 16,384 elements is measured on a subset. A vector has -1 for a parameter without
    the value. With several optimizers the highest RMS_t and the lowest cosine count.

    Findings, with few false alarms:

    - those of `GradientChecks`: detector `"optimizer"`, kinds `"not_optimized"`, `"no_gradient"`, `"not_zeroed"`;
    - detector `"optimizer"`, kind `"no_update"`: two measured updates in a row changed no weight, with gradients and
      a learning rate above a thousandth of its maximum; `text`;
    - detector `"optimizer"`, kind `"second_moment_stale"` of `SecondMomentDetector`;
    - detector `"optimizer"`, kind `"settings_changed"`: a setting other than the learning rate (weight decay, eps,
      betas, momentum, …), constant for eight updates, changes at the update of the batch `at`; `optimizer` (Lightning's
      name), `group` (from 1), `name`, `before`, `after`, `text`;
    - detector `"outside_writes"`, kinds `"weights"` and `"optimizer_state"`: code outside the optimizer's step wrote to
      them in place, between the start of the batch `at` and the next one; `names` (the first eight), `count`, `text`.
      With a validation in between the kinds are `"weights_at_validation"` and `"optimizer_state_at_validation"`, since
      averaged weights are swapped in and out there;
    - detector `"resume"`, kinds `"optimizer_state"` and `"schedule"`, at the first batch after a resume: optimizer
      state, learning rates or scheduler position differ from the checkpoint (`record.resume_check`); `optimizer`,
      `what`, `saved`, `restored`, `text`. A checkpoint written without this callback cannot be compared.

    Args:
        every: Measure the optimizer's state every N updates; 1 for each. Errors are looked for at every step.

    Raises:
        ConfigurationError: `every` is not a whole number of at least 1.
    """

    def __init__(self, every: int = 10) -> None:
        self.every = whole_number("OptimizerMonitor(every)", every, at_least=1, do="Use 1 for every update.")
        self._handles: list[RemovableHandle] = []
        self._trainer: Callable[[], Trainer | None] = _no_trainer
        self._reset()

    def _reset(self) -> None:
        self._sizes: dict[int, int] = {}
        """Number of elements by the parameter's id, in the order of the vectors."""
        self._updates: dict[int, int] = {}
        self._due: dict[int, tuple[list[Memory], list[Tensor]]] = {}
        """By the optimizer's id: states and root second moments that its next update is compared with."""
        self._rms: dict[int, Tensor] = {}
        self._shares: dict[int, Tensor] = {}
        self._cosines: list[Tensor] = []
        self._error: Exception | None = None
        self._settings = SettingChanges()
        self._moments = SecondMomentDetector()
        self._names: dict[int, str] = {}
        self._empty_updates = 0
        self._reported_until = -1
        self._last: Moment | None = None
        self._validated = False
        self._saved: dict[str, Any] = {}
        """Summary of the optimizers in the checkpoint that this run resumed from."""
        self._not_restored: list[NotRestored] = []

    @override
    def attach(self, trainer: Trainer, module: LightningModule) -> None:
        self._reset()
        self._trainer = weakref.ref(trainer)
        self.flight.share(UpdateMeter, UpdateMeter, trainer, module).measure_every(self.every)
        self.flight.share(GradientChecks, GradientChecks, trainer, module)
        self._outside = self.flight.share(OutsideWrites, OutsideWrites, trainer, module)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        named = [(plain_name(n), p) for n, p in module.named_parameters()]
        self._sizes = {id(p): p.numel() for _, p in named}
        store = self.flight.store
        store.layer_names[RMS] = store.layer_names[EPS] = tuple(n for n, _ in named)
        self._names = names_by_optimizer(trainer)
        self._handles = [o.register_step_post_hook(self._stepped) for o in trainer.optimizers]
        if self._saved and trainer.global_rank == 0:
            self._not_restored = not_restored(self._saved, summary(trainer), optimizer_names(trainer.optimizers))

    @override
    def sense_batch(self, batch: TrainingBatch) -> None:
        self._due, self._rms, self._shares, self._cosines = {}, {}, {}, []
        self._report_outside_writes()
        for one in self._not_restored:
            self.flight.store.note(Finding(detector="resume", kind=one.kind, at=batch.at, detail=one.detail))
        self._not_restored = []
        self._last, self._validated = batch.at, False

    @override
    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        key = id(optimizer)
        for change in self._settings.of(optimizer):
            self.flight.store.note(_settings_finding(change, self._names.get(key, type(optimizer).__name__), batch.at))
        count = self._updates[key] = self._updates.get(key, -1) + 1
        if count % self.every:
            return
        held = [memory for memory in memories(optimizer) if id(memory.parameter) in self._sizes]
        if with_momentum := [memory for memory in held if memory.momentum is not None]:
            self._cosines.append(momentum_cosine(with_momentum))
        if adaptive := [memory for memory in held if memory.second is not None]:
            roots, eps = corrected_roots(adaptive), [memory.eps for memory in adaptive]
            self._due[key] = adaptive, roots
            self._shares |= _by_parameter(adaptive, eps_shares(roots, eps))

    @override
    def sense_outcome(self, batch: TrainingBatch, outputs: object) -> None:
        self._due = {}
        if self._error is not None:
            self.release()
            raise self._error
        recorder = self.flight.recorder
        if self._cosines:
            recorder.put(COSINE, torch.stack(self._cosines).amin())
        if self._rms:
            recorder.put(RMS, torch.stack(list(self._rms.values())).amax())
            recorder.put_vector(RMS, self._laid_out(self._rms))
        if self._shares:
            recorder.put(EPS, self._share_of_all())
            recorder.put_vector(EPS, self._laid_out(self._shares))

    @override
    def sense_validation(self, trainer: Trainer, module: LightningModule, at: Moment) -> None:
        self._validated = True

    @override
    def judge(self, arrival: Arrival) -> None:
        self.flight.store.note(*self._moments.observe(arrival.row))
        empty = arrival.row.values.get(NO_UPDATE)
        if empty is None:
            return
        self._empty_updates = self._empty_updates + 1 if empty == 1.0 else 0
        if self._empty_updates == MIN_EMPTY_UPDATES:
            text = (
                "Updates do not change the weights, though there are gradients and a learning rate: they are lost in "
                "rounding, or the optimizer holds other tensors."
            )
            self.flight.store.note(
                Finding(detector="optimizer", kind="no_update", at=arrival.row.at, detail={"text": text})
            )

    @override
    def release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._due, self._rms, self._shares, self._sizes = {}, {}, {}, {}

    @override
    def own_state(self) -> dict[str, Any]:
        """A summary of the optimizers, which a resumed run compares with its own.

        Reading the norms of the optimizers' states waits for the device, as writing the checkpoint does.
        """
        trainer = self._trainer()
        try:
            found = {} if trainer is None else summary(trainer)
        except Exception:  # noqa: BLE001 - a custom optimizer must not cost the user the checkpoint
            found = {}
        return {"summary": found} if found else {}

    @override
    def load_own_state(self, state: dict[str, Any]) -> None:
        self._saved = state.get("summary", {})

    def _stepped(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Measures an update, as torch's post hook of the optimizer's step: an error is kept and raised after it."""
        del args, kwargs
        due = self._due.pop(id(optimizer), None)
        if due is None or torch.compiler.is_compiling():
            return
        try:
            pairs = [(m, root) for m, root in zip(*due, strict=True) if m.parameter.grad is not None]
            if pairs:
                gradients = [m.parameter.grad for m, _ in pairs if m.parameter.grad is not None]
                rms = update_rms(gradients, [root for _, root in pairs], [m.eps for m, _ in pairs])
                self._rms |= _by_parameter([m for m, _ in pairs], rms)
        except Exception as error:  # noqa: BLE001 - raised in our own phase, where it switches us off
            self._error = error

    def _laid_out(self, values: dict[int, Tensor]) -> Tensor:
        first = next(iter(values.values()))
        absent = torch.full((), NOT_MEASURED, device=first.device)
        return torch.stack([values.get(key, absent).to(first.device, non_blocking=True) for key in self._sizes])

    def _share_of_all(self) -> Tensor:
        """Mean of the parameters' shares, weighted by their sizes."""
        sizes = [self._sizes[key] for key in self._shares]
        first = next(iter(self._shares.values()))
        parts = [
            share.to(first.device, non_blocking=True) * (size / sum(sizes))
            for share, size in zip(self._shares.values(), sizes, strict=True)
        ]
        return torch.stack(parts).sum()

    def _report_outside_writes(self) -> None:
        at = self._last
        for write in self._outside.writes:
            if at is not None and write.ordinal == at.ordinal and write.ordinal > self._reported_until:
                self.flight.store.note(_finding(write, at, validated=self._validated))
        if at is not None:
            self._reported_until = at.ordinal


def _no_trainer() -> Trainer | None:
    """Stands in for the trainer before the first fit."""
    return None


def _by_parameter(held: list[Memory], values: Tensor) -> dict[int, Tensor]:
    return {id(memory.parameter): value for memory, value in zip(held, values.unbind(), strict=True)}


def _settings_finding(change: SettingChange, optimizer: str, at: Moment) -> Finding:
    text = (
        f"{change.name} of {optimizer} (group {change.group}) went from {_short(change.before)} to "
        f"{_short(change.after)} at step {at.step}."
    )
    before, after = (list(v) if isinstance(v, tuple) else v for v in (change.before, change.after))
    detail = {
        "optimizer": optimizer,
        "group": change.group,
        "name": change.name,
        "before": before,
        "after": after,
        "text": text,
    }
    return Finding(detector="optimizer", kind="settings_changed", at=at, detail=detail)


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finding(write: OutsideWrite, at: Moment, *, validated: bool) -> Finding:
    kind, what = ("weights", "weights") if write.kind == "weights" else ("optimizer_state", "states of the optimizer")
    names, count = first_names(write.names), len(write.names)
    listed = ", ".join([*names, "…"] if count > len(names) else names)
    text = f"{count} {what} were written to outside of the optimizer's step: {listed}."
    detail = {"names": names, "count": count, "text": text}
    return Finding(detector="outside_writes", kind=f"{kind}_at_validation" if validated else kind, at=at, detail=detail)
