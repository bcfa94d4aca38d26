"""`LayerFault`: something that happens to what layers hand on, in the steps in which the fault is on."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_spike.testing.fault import LastingFault, Needs
from lightning_spike.testing.layers import Layers, on_output


class LayerFault(LastingFault):
    """Base of the faults that lie in the forward pass of some layers, as if the module's own code did it.

    In validations too, and where a lab runs one of the steps again. Which layers is decided before the batch `at`, by
    the order of the last forward pass.
    It works by forward hooks, which a module that was compiled before the batch `at` does not call: leave
    `torch.compile` out.
    """

    @abstractmethod
    def parts(self, layers: Layers) -> Sequence[nn.Module]:
        """The layers that it concerns."""

    @abstractmethod
    def changed(self, output: Tensor) -> Tensor:
        """What stands in for the output of such a layer."""

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._layers = Layers(self, module)
        self._installed = False

    @override
    def before_batch(self, trainer: Trainer, module: LightningModule, batch: Any, ordinal: int) -> Any:
        if self._installed:
            return batch
        self._installed = True
        parts = self.parts(self._layers)
        if not parts:
            raise self.refuse(Needs.HIDDEN_LAYERS, type(module).__name__)
        for part in parts:
            self.later(on_output(part, lambda output: self.changed(output) if self.is_on(trainer) else output))
        return batch
