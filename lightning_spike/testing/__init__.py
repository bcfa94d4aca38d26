"""Fault injection: make a training go wrong in a known way, to see what is said about it.

```python
from lightning_spike.testing import ExtremeValues, faults_for

Trainer(callbacks=[*suite(), ExtremeValues.strong(at=400)])  # one corrupt batch
faults_for("lr_scheduler_fault")  # every fault that should be diagnosed as this cause
```

Every fault is a Lightning callback for any LightningModule and any loader; see `Fault` for what all of them promise.
`FAULTS` has them all, at least one for each cause; `DECOYS` are harmless, `UNCOVERED` are faults that no cause of the
catalogue covers. One file for each cause or family is in `faults/`.
"""

from lightning_spike.testing.fault import Description, Fault, LastingFault, Needs, OneOffFault, Scale
from lightning_spike.testing.faults.activation_saturation import UnitsSaturate
from lightning_spike.testing.faults.adam import EpsilonUnderflow, GradientsOutgrowSecondMoment, NoiseAtFullSize
from lightning_spike.testing.faults.bad_batch import CorruptTokens, ExtremeValues
from lightning_spike.testing.faults.code_bug import (
    EvalModeLeftOn,
    GradientsNotZeroed,
    ParametersNotOptimized,
    WeightsOverwritten,
)
from lightning_spike.testing.faults.data_drift import TokenDrift, ValueDrift
from lightning_spike.testing.faults.decoys import HarmlessNoise, HarmlessRate, HarmlessScale, HarmlessTokens
from lightning_spike.testing.faults.distributed_desync import GradientsNotAveraged, RankDrifts
from lightning_spike.testing.faults.generalization import FewBatches, SwingsAfterOverfitting
from lightning_spike.testing.faults.gradient import GradientsExplode, GradientsVanish, SigmoidStack
from lightning_spike.testing.faults.gradient_reversal import GradientsTurnRound
from lightning_spike.testing.faults.hard_sample_streak import SortedStretch
from lightning_spike.testing.faults.hardware_fault import BitFlips, WrongResult
from lightning_spike.testing.faults.label_noise import WrongLabels
from lightning_spike.testing.faults.learning_rate import RateCreepsUp, RateJump, RateTooHigh, ShortWarmUp, WarmRestarts
from lightning_spike.testing.faults.loss_scaling import LossScaleHeldDown, LossScaleJumps
from lightning_spike.testing.faults.momentum_reversal import MomentumTooHigh
from lightning_spike.testing.faults.nonfinite_input import NonfiniteInput
from lightning_spike.testing.faults.numerical_instability import DivisionByZero, ExpOverflow, LogOfZero, SqrtAtZero
from lightning_spike.testing.faults.optimizer_state import StateRescaled, StateScrambled
from lightning_spike.testing.faults.resume_fault import (
    ResumeLosesMoments,
    ResumeLosesOptimizerState,
    ResumeRestartsSchedule,
)
from lightning_spike.testing.faults.sample_weight_blowup import WeightsPileUp
from lightning_spike.testing.faults.uncovered import DropoutSurge, LossMultiplied, PenaltySwitchedOn
from lightning_spike.testing.faults.weights import InitialWeightsScaled, WeightsGrow
from lightning_spike.testing.registry import DECOYS, FAULTS, UNCOVERED, faults_for

__all__ = [
    "DECOYS",
    "FAULTS",
    "UNCOVERED",
    "BitFlips",
    "CorruptTokens",
    "Description",
    "DivisionByZero",
    "DropoutSurge",
    "EpsilonUnderflow",
    "EvalModeLeftOn",
    "ExpOverflow",
    "ExtremeValues",
    "Fault",
    "FewBatches",
    "GradientsExplode",
    "GradientsNotAveraged",
    "GradientsNotZeroed",
    "GradientsOutgrowSecondMoment",
    "GradientsTurnRound",
    "GradientsVanish",
    "HarmlessNoise",
    "HarmlessRate",
    "HarmlessScale",
    "HarmlessTokens",
    "InitialWeightsScaled",
    "LastingFault",
    "LogOfZero",
    "LossMultiplied",
    "LossScaleHeldDown",
    "LossScaleJumps",
    "MomentumTooHigh",
    "Needs",
    "NoiseAtFullSize",
    "NonfiniteInput",
    "OneOffFault",
    "ParametersNotOptimized",
    "PenaltySwitchedOn",
    "RankDrifts",
    "RateCreepsUp",
    "RateJump",
    "RateTooHigh",
    "ResumeLosesMoments",
    "ResumeLosesOptimizerState",
    "ResumeRestartsSchedule",
    "Scale",
    "ShortWarmUp",
    "SigmoidStack",
    "SortedStretch",
    "SqrtAtZero",
    "StateRescaled",
    "StateScrambled",
    "SwingsAfterOverfitting",
    "TokenDrift",
    "UnitsSaturate",
    "ValueDrift",
    "WarmRestarts",
    "WeightsGrow",
    "WeightsOverwritten",
    "WeightsPileUp",
    "WrongLabels",
    "WrongResult",
    "faults_for",
]
