"""What other systems do, beside ours.

The real class where it can be run, the published rule written anew where it cannot.
"""

import math
import tempfile
import warnings
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Protocol

import torch
from lightning.fabric.utilities.spike import SpikeDetection, TrainingSpikeException

__all__ = ["RULES", "LightningSpikeDetection", "Rule"]


class Rule(Protocol):
    """One loss in, one verdict out."""

    def flag(self, loss: float) -> bool:
        """Whether the rule calls this loss a spike."""
        ...


class LightningSpikeDetection:
    """The class of the installed Lightning, with its defaults; what it raises is counted and the run goes on.

    Its batch index is handed on as the step, so that its warm-up does not start again; a run of it would end at the
    first spike.
    """

    def __init__(self) -> None:
        """Give it the least of a Fabric that it asks for."""
        strategy = SimpleNamespace(
            root_device=torch.device("cpu"),
            barrier=lambda: None,
            reduce_boolean_decision=lambda decision, **_: decision,
        )
        self._fabric: Any = SimpleNamespace(strategy=strategy, global_rank=1)
        self._detection = SpikeDetection(exclude_batches_path=str(Path(tempfile.gettempdir()) / "skip.json"))
        self._step = 0

    def flag(self, loss: float) -> bool:
        """Run its hook."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self._detection.on_train_batch_end(self._fabric, torch.tensor(loss), None, self._step)
            except TrainingSpikeException:
                return True
            finally:
                self._step += 1
                self._detection.bad_batches.clear()
        return False


class _Moments:
    """Mean and standard deviation of the last values, whatever they are: one NaN poisons them for a whole window."""

    def __init__(self, size: int) -> None:
        self.values: deque[float] = deque(maxlen=size)
        self._sum = self._squares = 0.0
        self._wild = 0

    def push(self, value: float) -> None:
        if len(self.values) == self.values.maxlen:
            self._count(self.values[0], -1)
        self.values.append(value)
        self._count(value, 1)

    def _count(self, value: float, sign: int) -> None:
        if math.isfinite(value):
            self._sum += sign * value
            self._squares += sign * value * value
        else:
            self._wild += sign

    @property
    def mean(self) -> float:
        return math.nan if self._wild else self._sum / len(self.values)

    @property
    def deviation(self) -> float:
        count = len(self.values)
        if self._wild or count < 2:  # noqa: PLR2004 - no deviation of one value
            return math.nan
        return math.sqrt(max(0.0, (self._squares - self._sum * self._sum / count) / (count - 1)))


class KillLossSpike:
    """llm-foundry: five losses in a row of twice the mean of the last 100 (5 % of a run), or half a window over 10."""

    def __init__(self) -> None:
        """Defaults: window 100, multiplier 2, patience 4, cap 10."""
        self._window = _Moments(100)
        self._row = 0

    def flag(self, loss: float) -> bool:
        """A window that is not full says nothing."""
        self._window.push(loss)
        values = self._window.values
        if len(values) < 100:  # noqa: PLR2004 - the window
            return False
        self._row = self._row + 1 if loss >= 2.0 * self._window.mean else 0
        high = sum(value > 10.0 for value in values) >= len(values) / 2  # noqa: PLR2004 - the cap
        return self._row > 4 or high  # noqa: PLR2004 - the patience


class SkipStep:
    """OLMo-core: more than six standard deviations from the mean of the last 128, outliers and NaN included in both.

    A comparison with NaN is false, and the update is then skipped: flagged.
    """

    def __init__(self) -> None:
        """Defaults: window 128, six sigma, active from 64 values."""
        self._window = _Moments(128)

    def flag(self, loss: float) -> bool:
        """The newest value is judged by the ones before it."""
        count = len(self._window.values)
        mean, deviation = (self._window.mean, self._window.deviation) if count else (math.nan, math.nan)
        self._window.push(loss)
        return count >= 64 and not abs(loss - mean) <= 6.0 * deviation  # noqa: PLR2004 - half of the window


class Megatron:
    """Megatron-LM: not finite, or at least ten times the largest of the first hundred losses."""

    def __init__(self) -> None:
        """Defaults: factor 10, 100 samples."""
        self._seen = 0
        self._largest = -math.inf

    def flag(self, loss: float) -> bool:
        """The first hundred are only measured."""
        if not math.isfinite(loss):
            return True
        if self._seen < 100:  # noqa: PLR2004 - the samples
            self._seen += 1
            self._largest = max(self._largest, abs(loss))
            return False
        return abs(loss) >= 10.0 * self._largest


class ThreeTimesEma:
    """The rule of many home-grown monitors.

    Not finite, or above three times an exponential mean (0.98) of the finite losses.
    """

    def __init__(self) -> None:
        """Start without a mean."""
        self._mean: float | None = None

    def flag(self, loss: float) -> bool:
        """Spikes enter the mean, non-finite ones do not."""
        if not math.isfinite(loss):
            return True
        spike = self._mean is not None and loss > 3.0 * self._mean
        self._mean = loss if self._mean is None else 0.98 * self._mean + 0.02 * loss
        return spike


class ZClip:
    """ZClip's rule, on the loss.

    Z > 2.5 against exponential mean and variance (0.97), which take in the clipped value.
    """

    def __init__(self) -> None:
        """Defaults: alpha 0.97, threshold 2.5, 25 values of warm-up."""
        self._warmup: list[float] = []
        self._mean = self._variance = 0.0

    def flag(self, loss: float) -> bool:
        """Nothing is said in the warm-up; NaN compares false and poisons the mean."""
        if len(self._warmup) < 25:  # noqa: PLR2004 - the warm-up
            self._warmup.append(loss)
            self._mean = sum(self._warmup) / len(self._warmup)
            self._variance = sum((value - self._mean) ** 2 for value in self._warmup) / len(self._warmup)
            return False
        deviation = math.sqrt(self._variance) + 1e-6 if self._variance >= 0.0 else math.nan
        score = (loss - self._mean) / deviation
        spike = score > 2.5  # noqa: PLR2004 - the threshold
        kept = self._mean + 2.5 * deviation / (score / 2.5) if spike else loss
        self._mean = 0.97 * self._mean + 0.03 * kept
        self._variance = 0.97 * self._variance + 0.03 * (kept - self._mean) ** 2
        return spike


RULES: Final[dict[str, type[Rule]]] = {
    "Lightning": LightningSpikeDetection,
    "KillLossSpike": KillLossSpike,
    "OLMo SkipStep": SkipStep,
    "Megatron": Megatron,
    "3x EMA": ThreeTimesEma,
    "ZClip": ZClip,
}
