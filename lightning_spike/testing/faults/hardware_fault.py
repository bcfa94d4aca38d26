"""Errors of the machine, which a replay of the step does not show."""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_spike.arguments import whole_number
from lightning_spike.errors import ConfigurationError
from lightning_spike.testing.batch_edit import generator_for
from lightning_spike.testing.fault import OneOffFault, Scale
from lightning_spike.testing.layers import Layers, on_output

WORDS: Final[Mapping[torch.dtype, torch.dtype]] = {
    torch.float64: torch.int64,
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}
"""The integer type of the same width."""


class BitFlips(OneOffFault):
    """Bits of the weights flip in memory, as by a defect that error correction did not catch.

    In so many weights, drawn evenly over the module, one bit is flipped, past autograd's version counters as the
    hardware would. Counted from the top: 0 is the sign, 1 the top of the exponent, which makes a weight below 1 some
    1e38 times larger (in float32); the next ones make a usual weight nearly 0, and those from about 5 on change it by
    factors of up to 65536.

    Args:
        at: The batch before which it happens: batches begun in the whole run, from 0.
        strength: How many weights, a whole number; no more than there are.
        seed: Of the choice of weights.
        bit: Which bit, from the top.
    """

    cause = "hardware_fault"
    SCALE: ClassVar[Scale] = Scale(means="the number of weights in which a bit flips", at_least=1)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 200, "bit": 6}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 5, "bit": 1}

    def __init__(self, at: int, strength: float, seed: int = 0, bit: int = 1) -> None:
        super().__init__(at, strength, seed)
        if not self.strength.is_integer():
            raise ConfigurationError.of(
                "BitFlips(strength)", expected="a whole number", given=strength, do="It is a number of weights."
            )
        self.bit = whole_number(
            "BitFlips(bit)", bit, at_least=0, do="Use 0 for the sign, 1 for the top of the exponent."
        )
        if self.bit > 15:  # noqa: PLR2004 - of the shortest word
            raise ConfigurationError.of(
                "BitFlips(bit)", expected="at most 15", given=bit, do="Half-precision weights have no more."
            )
        self._options = {"bit": self.bit}

    @override
    @torch.no_grad()
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        parameters = [p for p in module.parameters() if p.dtype in WORDS and p.is_contiguous()]
        ends = torch.tensor([p.numel() for p in parameters]).cumsum(0)
        total = int(ends[-1])
        drawn = torch.randperm(total, generator=generator_for(self.seed, ordinal))[: int(self.strength)]
        for place in drawn.tolist():
            number = int(torch.searchsorted(ends, place, right=True))
            parameter = parameters[number]
            self._flip(parameter, place - int(ends[number]) + parameter.numel())
        return batch

    def _flip(self, parameter: nn.Parameter, place: int) -> None:
        word = WORDS[parameter.dtype]
        bits = torch.iinfo(word).bits
        mask = torch.iinfo(word).min if self.bit == 0 else 1 << (bits - 1 - self.bit)
        words = parameter.data.view(-1).view(word)
        words[place] = words[place] ^ mask


class WrongResult(OneOffFault):
    """One layer computes wrong numbers in one forward pass: silent data corruption, an overclocked or ageing chip.

    See Dixit et al. 2021, "Silent Data Corruptions at Scale". To a hundredth of the outputs of one layer, at least one,
    noise of so many standard deviations of the output is added, once, in the training itself. Nobody who runs the batch
    again sees it.

    Args:
        at: The batch in which it happens: batches begun in the whole run before it, from 0.
        strength: Standard deviation of the error, in those of the layer's output.
        seed: Of the layer, the places and the errors.
    """

    cause = "hardware_fault"
    SCALE: ClassVar[Scale] = Scale(means="the error, in standard deviations of the layer's output", above=0)
    MILD: ClassVar[Mapping[str, Any]] = {"strength": 100.0}
    STRONG: ClassVar[Mapping[str, Any]] = {"strength": 10000.0}

    SHARE: ClassVar[float] = 0.01

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._armed = False
        self._layers = Layers(self, module)

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        parts = self._layers.all()
        part = parts[int(torch.randint(len(parts), (), generator=generator_for(self.seed, ordinal)))]
        self._armed = True
        self.later(on_output(part, self._wrong))
        return batch

    def _wrong(self, output: Tensor) -> Tensor:
        if not self._armed:
            return output
        self._armed = False
        generator = generator_for(self.seed, self.at)
        hit = torch.rand(output.shape, generator=generator)
        hit = (hit <= hit.min().clamp_min(self.SHARE)).to(output)
        noise = torch.randn(output.shape, generator=generator).to(output)
        return output + hit * noise * output.detach().std(correction=0) * self.strength
