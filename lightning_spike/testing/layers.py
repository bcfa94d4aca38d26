"""The layers of any module, in the order in which its forward pass calls them."""

from collections.abc import Callable
from typing import Any, Final

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_spike.testing.fault import Fault

KINDS: Final = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.RNNBase)
"""What counts as a layer: what multiplies by a matrix of weights of its own."""


class Layers:
    """The layers of a module with weights that are trained, in the order of their calls in the last forward pass.

    Before the first one, in that of registration.

    Looks on by forward hooks that are taken off when the fit ends. Parts of `nn.MultiheadAttention` that torch never
    calls are left out once a forward pass has been seen.

    Args:
        fault: Who asks; takes the hooks off.
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
        """All of them."""
        return list(self._called or self._registered)

    def hidden(self) -> list[nn.Module]:
        """All but the last, and without embeddings."""
        return [part for part in self.all()[:-1] if not isinstance(part, nn.Embedding)]

    def last(self) -> nn.Module | None:
        """The one whose output comes last, as a rule the head; `None` where there is none."""
        return self.all()[-1] if self._registered else None

    def _note(self, part: nn.Module, args: object, output: object) -> None:
        """A layer that is called again moves to the end."""
        del args, output
        if part in self._called:
            self._called.remove(part)
        self._called.append(part)


def on_output(part: nn.Module, change: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    """Let `change` stand in for what a layer returns, of a tuple (recurrent layers) its first tensor.

    Returns what takes it off again.
    """

    def hook(part: nn.Module, args: object, output: Any) -> Any:
        del part, args
        if isinstance(output, Tensor):
            return change(output)
        if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
            return (change(output[0]), *output[1:])
        return None

    return part.register_forward_hook(hook).remove
