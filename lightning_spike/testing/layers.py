"""`Layers` lists the layers of any module in forward order; `LayerFault` changes their outputs."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_spike.testing.fault import Fault, LastingFault, Needs

KINDS: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.RNNBase)
"""Modules that count as layers: those that multiply by their own weight matrix."""


class Layers:
    """The layers of a module with trained weights, in the order of the last forward pass.

    Before the first forward pass the order is that of registration. Forward hooks record it until the fit ends. Parts
    of `nn.MultiheadAttention` that torch never calls are left out after the first pass.

    Args:
        fault: The fault, which removes the hooks.
        module: The module.
    """

    def __init__(self, fault: Fault, module: LightningModule) -> None:
        self._registered = [
            part
            for part in module.modules()
            if isinstance(part, KINDS) and any(p.requires_grad for p in part.parameters(recurse=False))
        ]
        self._called: list[nn.Module] = []
        for part in self._registered:
            fault.later(part.register_forward_hook(self._note).remove)

    def all(self) -> list[nn.Module]:
        """All layers."""
        return list(self._called or self._registered)

    def hidden(self) -> list[nn.Module]:
        """All layers but the last and embeddings."""
        return [part for part in self.all()[:-1] if not isinstance(part, nn.Embedding)]

    def last(self) -> nn.Module | None:
        """The layer called last, usually the head; `None` if there is none."""
        return self.all()[-1] if self._registered else None

    def _note(self, part: nn.Module, args: object, output: object) -> None:
        """Moves a called layer to the end."""
        del args, output
        if part in self._called:
            self._called.remove(part)
        self._called.append(part)


def on_output(part: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Replaces a layer's output, or the first tensor of a tuple, by `change` of it; returns a function to undo that."""

    def hook(part: nn.Module, args: object, output: Any) -> Any:
        del part, args
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (change(output[0]), *output[1:])
        return None

    return part.register_forward_hook(hook).remove


class LayerFault(LastingFault):
    """Base of the faults in the forward pass of some layers, also in validations and replays.

    The layers are chosen at the batch `at`, by the order of the last forward pass. The fault uses forward hooks, which
    a module compiled before that batch does not call: leave `torch.compile` out.
    """

    @abstractmethod
    def parts(self, layers: Layers) -> Sequence[nn.Module]:
        """The affected layers."""

    @abstractmethod
    def changed(self, output: Tensor) -> Tensor:
        """The changed output of such a layer."""

    @override
    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        self._layers = Layers(self, module)

    @override
    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        for part in self.require(self.parts(self._layers), Needs.HIDDEN_LAYERS, type(module).__name__):
            self.later(on_output(part, lambda output: self.changed(output) if self.is_on(trainer) else output))
