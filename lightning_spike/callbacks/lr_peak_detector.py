"""`LRPeakDetector`: the learning rate of every update, and what it did.

Restarts, peaks, the end of a warm-up, jumps that no schedule explains.
"""

import math
from typing import Any, Final

from lightning.pytorch import LightningModule, Trainer
from torch.optim import Optimizer
from typing_extensions import override

from lightning_spike.arguments import number
from lightning_spike.callbacks.base import SpikeCallback
from lightning_spike.detectors.learning_rate import LearningRateDetector
from lightning_spike.record.participant import TrainingBatch
from lightning_spike.record.recorder import Arrival
from lightning_spike.records import Finding
from lightning_spike.signals.learning_rate import learning_rates, optimizer_names

PREFIX: Final = "lr-"
LEAST_JUMP: Final = 1.5
"""Ratio from which the detector calls a move of the rate a jump at all."""
BY_RATIO: Final = frozenset({"restart", "unexplained_jump", "drop"})


class LRPeakDetector(SpikeCallback):
    """Records the learning rate that every update really uses, of every optimizer and parameter group, and tells what it does.

    It goes by the rates themselves, so it works for any scheduler, for one of your own and for none: a warm restart,
    the peak of a cycle, the end of a warm-up, a jump that no configured schedule explains, a length that counts batches
    where epochs were meant. What it finds is evidence for the ranking. The rates are read in
    `on_before_optimizer_step`, for at a batch's end Lightning has stepped the scheduler already; they are numbers on
    the host, so nothing blocks (a rate that is a device tensor travels with the other signals).

    Args:
        jump: Report a move of the rate from one update to the next (a restart, a jump, a drop) from this ratio on, at
            least 1.5. A larger value keeps small planned restarts out of the report.

    Raises:
        ConfigurationError: `jump` is not a finite number of at least 1.5.
    """

    def __init__(self, jump: float = LEAST_JUMP) -> None:
        do = f"Use {LEAST_JUMP:g} to see every jump; smaller moves are a schedule's ordinary steps."
        self.jump = number("LRPeakDetector(jump)", jump, at_least=LEAST_JUMP, do=do)
        self._names: dict[int, str] = {}
        self._detector = LearningRateDetector()
        self._resumed_state: dict[str, Any] | None = None

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        self._names = dict(zip(map(id, trainer.optimizers), optimizer_names(trainer.optimizers), strict=True))
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
        """Kept until `begin`: Lightning restores callbacks before the schedulers are known."""
        self._resumed_state = state["detector"]

    def _reported(self, finding: Finding) -> bool:
        ratio = finding.detail.get("ratio")
        return finding.kind not in BY_RATIO or not ratio or max(ratio, 1.0 / ratio) >= self.jump
