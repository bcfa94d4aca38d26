"""`LRPeakDetector`: the learning rate of every update, its restarts, peaks and unexplained jumps."""

import math
from typing import Any, Final

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.arguments import number
from lightning_spike.callbacks.base import SpikeCallback, names_by_optimizer
from lightning_spike.detectors.learning_rate import LearningRateDetector
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.records import Finding
from lightning_spike.signals.learning_rate import learning_rates

PREFIX: Final = "lr-"
MIN_JUMP: Final = 1.5
"""Smallest ratio of two successive rates that the detector calls a jump."""
BY_RATIO: Final = frozenset({"restart", "unexplained_jump", "drop"})


class LRPeakDetector(SpikeCallback):
    """Records the learning rate of every update, per optimizer and parameter group, and finds its events.

    It reads the rates themselves, so it works with any scheduler and with none. Events are a warm restart, the peak of
    a cycle, the end of a warm-up, a jump that no configured schedule explains, and a length in batches where epochs
    were meant. They are evidence for the ranking. The rates are read in `on_before_optimizer_step`, because at the end
    of a batch Lightning has already stepped the scheduler. Reading never blocks.

    Args:
        jump: Smallest ratio between two successive rates that is reported as a restart, jump or drop, at least 1.5.
            A larger value keeps small planned restarts out of the report.

    Raises:
        ConfigurationError: `jump` is not a finite number of at least 1.5.
    """

    def __init__(self, jump: float = MIN_JUMP) -> None:
        do = f"Use {MIN_JUMP:g} to see every jump; smaller moves are a schedule's ordinary steps."
        self.jump = number("LRPeakDetector(jump)", jump, at_least=MIN_JUMP, do=do)
        self._names: dict[int, str] = {}
        self._detector = LearningRateDetector()
        self._resumed_state: dict[str, Any] | None = None

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._names = names_by_optimizer(trainer)
        facts = self.flight.store.facts
        batches = facts.batches_per_epoch
        self._detector = LearningRateDetector(
            facts.schedulers,
            max_epochs=facts.max_epochs,
            steps_per_epoch=None if batches is None else math.ceil(batches / facts.accumulate_grad_batches),
        )
        if self._resumed_state is not None:
            self._detector.load_state_dict(self._resumed_state)
            self._resumed_state = None

    @override
    def sense_gradients(self, batch: TrainingBatch, optimizer: Optimizer) -> None:
        name = self._names.get(id(optimizer))
        if name is None:  # not one of the trainer's: it has no name that a reader would know
            return
        for signal, rate in learning_rates(name, optimizer).items():
            self.flight.recorder.put(signal, rate)

    @override
    def judge(self, arrival: Arrival) -> None:
        for signal, rate in arrival.row.values.items():
            if signal.startswith(PREFIX):
                found = self._detector.observe(signal.removeprefix(PREFIX), arrival.row.at, rate)
                self.flight.store.note(*filter(self._reported, found))

    @override
    def own_state(self) -> dict[str, Any]:
        return {"detector": self._detector.state_dict()}

    @override
    def load_own_state(self, state: dict[str, Any]) -> None:
        """Stores the state until `begin`: Lightning restores callbacks before the schedulers are known."""
        self._resumed_state = state["detector"]

    def _reported(self, finding: Finding) -> bool:
        ratio = finding.detail.get("ratio")
        return finding.kind not in BY_RATIO or not ratio or max(ratio, 1.0 / ratio) >= self.jump
